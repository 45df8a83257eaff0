"""params.yaml read and its mistakes told: one line for each, with the field, the value and what is allowed."""

import difflib
import json
import re
from typing import get_args

import yaml
from pydantic import BaseModel


class Loader(yaml.SafeLoader):
    """YAML 1.1 with two repairs: `2e-4` is a number, and a key given twice is an error."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _mapping(loader, node, deep=False):
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (list, dict)):
            raise yaml.constructor.ConstructorError(
                None, None, "a list or mapping cannot be a name", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"`{key}` is given twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


Loader.add_constructor("tag:yaml.org,2002:map", lambda loader, node: _mapping(loader, node, deep=True))


def lines(errors: list[dict], data: dict, root: type[BaseModel]) -> list[str]:
    """One line per mistake: pydantic tells one error per alternative of a field that takes several types."""
    places = [_place(item, data) for item in errors]
    found: dict[tuple, list[str]] = {}
    for place, item in zip(places, errors, strict=True):
        if any(other[: len(place)] == place and len(other) > len(place) for other in places):
            continue  # another alternative fits better: its own errors lie deeper
        found.setdefault(place, []).append(_explain({**item, "loc": place}, item["loc"], root))
    told = []
    for same in found.values():
        first, *others = dict.fromkeys(same)
        rest = [line.partition(" is not allowed: ")[2].rstrip(".") for line in others]
        told.append(first + "".join(f" Or {line}." for line in rest if line))
    return told


def _place(error: dict, data: dict) -> tuple:
    """Where the error is in the file: pydantic's location without the names of a union's alternatives."""
    kept, here = [], data
    for number, part in enumerate(error["loc"]):
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            kept.append(part)
            here = here[part]
        elif error["type"] == "missing" and number == len(error["loc"]) - 1:
            kept.append(part)
    return tuple(kept)


def _model_at(location: tuple, root: type[BaseModel]) -> type[BaseModel] | None:
    """The section model that holds the last element of a pydantic error location."""
    model: type[BaseModel] | None = root
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        if model and part in model.model_fields:
            inner = models_in(model.model_fields[part].annotation)
            model = inner[0] if len(inner) == 1 else None
    return model


def models_in(annotation) -> list[type[BaseModel]]:
    """The models that a field's annotation (a union, a list of …) names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def _explain(error: dict, full: tuple, root: type[BaseModel]) -> str:
    """One line for one pydantic error: field, value, what is allowed, and the nearest known name."""
    location = tuple(part for part in error["loc"])
    where = ".".join(str(part) for part in location) or "params"
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        model = _model_at(full, root)
        names = list(model.model_fields) if model else []
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
        hint = f" Did you mean `{near[0]}`?" if near else f" Known here: {', '.join(names)}." if names else ""
        return f"{where}: unknown name.{hint}"
    if kind == "missing":
        return f"{where}: missing. Add it."
    if kind == "value_error":
        return f"{where}: {context['error']}."
    value = json.dumps(error["input"], default=str)
    if kind == "literal_error":
        near = difflib.get_close_matches(
            str(error["input"]), [p.strip("'") for p in context["expected"].replace(" or ", ", ").split(", ")], n=1
        )
        hint = f" Did you mean `{near[0]}`?" if near else ""
        return f"{where}: {value} is not allowed: choose {context['expected']}.{hint}"
    message = error["msg"].removeprefix("Input should be ").removeprefix("String should ")
    return (
        f"{where}: {value} is not allowed: it should {'' if message.startswith(('match', 'have')) else 'be '}{message}."
    )
