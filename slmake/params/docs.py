"""The pages generated from the parameter models: docs/params.schema.json and docs/params.md.

python -m slmake.params.docs --output docs
"""

import argparse
import inspect
import json
from pathlib import Path

from pydantic import BaseModel

from slmake.params.errors import models_in
from slmake.params.load import Params


def reference() -> str:
    """docs/params.md: every section and field with type, default and meaning."""
    lines = [
        "# params.yaml",
        "",
        "Generated from `slmake/params/` by `make docs`; do not edit. One section per rule; a rule runs again when its own",
        "section changes. Unknown names, wrong types and values out of range are refused before anything runs.",
    ]
    schema = Params.model_json_schema(by_alias=False)

    def allowed(spec: dict) -> str:
        if "$ref" in spec:
            return f"`{spec['$ref'].rsplit('/', 1)[1]}`"
        if "anyOf" in spec:
            return " or ".join(allowed(option) for option in spec["anyOf"])
        if "const" in spec:
            return json.dumps(spec["const"])
        if "enum" in spec:
            return ", ".join(str(value) for value in spec["enum"])
        if spec.get("type") == "array":
            return f"list of ({allowed(spec['items'])})"
        bounds = [f"{sign} {spec[key]:g}" for key, sign in _BOUNDS.items() if key in spec]
        return " ".join([spec.get("type", "any"), *bounds])

    def table(title: str, model: type[BaseModel]) -> None:
        lines.extend(
            [
                "",
                title,
                "",
                inspect.cleandoc(model.__doc__),
                "",
                "| field | default | allowed | meaning |",
                "|---|---|---|---|",
            ]
        )
        spec = schema["$defs"][model.__name__]["properties"]
        for key, info in model.model_fields.items():
            default = "required" if info.is_required() else f"`{json.dumps(info.default)}`"
            text = (info.description or "").replace("|", "\\|")
            lines.append(f"| `{key}` | {default} | {allowed(spec[key])} | {text} |")
        for inner in dict.fromkeys(
            inner for info in model.model_fields.values() for inner in models_in(info.annotation)
        ):
            table(f"### `{inner.__name__}`", inner)

    for name, field in Params.model_fields.items():
        table(f"## `{name}`", models_in(field.annotation)[0])
    return "\n".join(lines) + "\n"


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def write_docs(folder: Path) -> None:
    """Write the JSON Schema and the reference page into `folder`."""
    schema = json.dumps(Params.model_json_schema(), indent=2, ensure_ascii=False)
    (folder / "params.schema.json").write_text(schema + "\n", encoding="utf-8")
    (folder / "params.md").write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("docs"), help="folder to write both pages to (default: docs)"
    )
    write_docs(parser.parse_args().output)
