"""Turn an Olive configuration into params.yaml and azureml/settings.yaml.

    python -m tools.import_olive olive-config.json --output imported

Reads the forms of Olive 0.5 to 0.9.2 (with Azure ML systems and datastores) and the present one. Writes imported/params.yaml, and
imported/settings.yaml where the configuration speaks of Azure ML, and prints what became of every field: taken over, taken over under
another name, or without meaning here and why. A field that is not understood is named and stops the import, unless
--leave-out ignores it. docs/from-olive.md walks through it.
"""

import argparse
import json
import os
from pathlib import Path

import yaml

from slmake import cli, outputs, params
from slmake.azureml import settings
from slmake.credentials import scrub
from slmake.errors import UserError
from slmake.olive import reader
from slmake.olive.models import BRANCH
from slmake.params.errors import Loader, yaml_problem
from slmake.sources import hub
from slmake.sources.schemes import parse


def read(path: Path) -> dict:
    """The configuration, JSON or YAML.

    Raises:
        UserError: no such file, neither JSON nor YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = (
            yaml.load(text, Loader) if path.suffix in (".yaml", ".yml") else json.loads(text, object_pairs_hook=unique)
        )
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        hint = " JSON has no comments and no comma before a closing bracket; a YAML file's name ends in .yaml or .yml."
        hint *= isinstance(error, json.JSONDecodeError)
        reason = yaml_problem(error) if isinstance(error, yaml.YAMLError) else " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read: {reason}.{hint}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping with `input_model` and `passes`, found {type(data).__name__}.")
    return data


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose fields are all different.

    Raises:
        ValueError: a field is there twice.
    """
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the field `{twice}` is given twice in one mapping")
    return dict(pairs)


def pin_branches(imported: reader.Reader, job: cli.Job) -> None:
    """Put today's commit in the place of a hub repository's branch, where the hub can be asked."""
    for i, row in enumerate(imported.rows):
        if row.note != BRANCH or "HF_HUB_OFFLINE" in os.environ:
            continue
        name = "adapter" if row.field.endswith("adapter_path") else "fetch_model"
        name = "prepare" if row.field.endswith("data_name") else name
        section = imported.params[name]
        sources = section["source"] if isinstance(section["source"], dict) else {None: section["source"]}
        for split, source in sources.items():
            try:
                kind = "dataset" if name == "prepare" else "model"
                commit = hub.commit_of(parse(source), kind) if source.endswith("@main") else None
            except (UserError, ValueError, OSError) as error:
                job.log(f"{scrub(source)}: the hub cannot be asked for its commit: {error}")
                continue
            sources[split] = source.removesuffix("main") + commit if commit else source
            note = f"{name}.source: {sources[split]!r}, the commit of the branch today"
            imported.rows[i] = row._replace(kind="renamed", note=scrub(note))
        section["source"] = sources.get(None, sources)


def table(rows: list[reader.Row]) -> str:
    """What became of every field, as text."""
    width = min(58, max((len(row.field) for row in rows), default=0))
    lines = []
    for kind, title in reader.KINDS.items():
        chosen = [row for row in rows if row.kind == kind]
        if chosen:
            lines += ["", f"{title} ({len(chosen)})", *(f"  {row.field:{width}}  {row.note}" for row in chosen)]
    return "\n".join(lines[1:])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="Olive's configuration, JSON or YAML")
    parser.add_argument("--output", type=Path, default=Path("imported"), help="folder to write to (default: imported)")
    parser.add_argument(
        "--revision", help="revision of a hub model that the configuration does not pin (default: main)"
    )
    parser.add_argument("--leave-out", action="store_true", help="import without the fields that are not understood")
    args = parser.parse_args(argv)
    with cli.job("import_olive") as job:
        if args.output.is_file() or (args.output.is_dir() and any(args.output.iterdir())):
            raise UserError(f"{args.output} already exists. Remove it, or name another folder: --output.")
        imported = reader.Reader(read(args.config), args.revision or "main").run()
        pin_branches(imported, job)
        print(table(imported.rows))
        strange = [row for row in imported.rows if row.kind == "unknown"]
        if strange and not args.leave_out:
            raise UserError(
                f"{args.config}: {len(strange)} field{'s' * (len(strange) > 1)} not understood: {', '.join(row.field for row in strange)}. Nothing was "
                "written. Correct or remove them, or import without them: --leave-out."
            )
        with outputs.written(args.output) as (folder,):
            (folder / "params.yaml").write_text(reader.as_yaml(imported.params), encoding="utf-8")
            try:
                params.load(folder / "params.yaml")
            except UserError as error:
                message = str(error).replace(str(folder / "params.yaml"), f"{args.config}, as params.yaml")
                raise UserError(message) from None
            if imported.settings:
                (folder / "settings.yaml").write_text(reader.settings_text(imported.settings), encoding="utf-8")
                settings.load(folder / "settings.yaml")
        more = f" and {args.output}/settings.yaml (for azureml/)" if imported.settings else ""
        job.say(f"wrote {args.output}/params.yaml{more}")


if __name__ == "__main__":
    main()
