"""params.yaml is read and written, and its mistakes are reported: one line for each, with the field, the value and what is allowed."""

import difflib
import json
import re
from typing import get_args

import yaml
from pydantic import BaseModel

from slmake.credentials import scrub

MOST_VALUES = 100_000  # of a file; an alias counts as what it stands for
# Plain values of a type that YAML 1.2, which DVC reads, takes for others: 010, 1:30, 1_000, 0b1, yes, off, 0o17.
AMBIGUOUS = {
    "int": re.compile(
        r"[-+]?(0[0-7_]*[0-7]|0b_*[01][01_]*|0x[0-9a-f]+_[0-9a-f_]*|\d[\d_]*(:[0-5]?\d)+|\d+_[\d_]*)", re.I
    ),
    "float": re.compile(r"[-+]?\d[\d_.]*(_|:[0-5]?\d)[\d_.:]*"),
    "bool": re.compile(r"yes|no|on|off", re.I),
    "str": re.compile(r"[-+]?(0o[0-7]+|0\d+)"),
}
TEXT = "tag:yaml.org,2002:str"
NEVER = re.compile(r"(?!)")


class Loader(yaml.SafeLoader):
    """YAML 1.1 with two repairs: `2e-4` is a number, and a key given twice is an error.

    What PyYAML answers with a traceback is a yaml.YAMLError with line and column, too.
    """

    def get_single_data(self):
        try:
            node = self.get_single_node()
            if node is None:
                return None
            if _values(node, {}) > MOST_VALUES:
                problem = f"aliases (`*name`) make more than {MOST_VALUES:,} values of it"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
            return self.construct_document(node)
        except RecursionError:
            problem = "nested too deeply, or recursive"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.get_mark()) from None

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except RecursionError:
            problem = "nested too deeply"
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # 2026-02-30, 0x_, !!bool 2
            kind = node.tag.rpartition(":")[2]
            problem = f"it looks like a value of type {kind} and is none: correct it, or put it in quotes if it is text"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class ParamsLoader(Loader):
    """For params.yaml, which DVC reads as YAML 1.2: values that are others there, or that it does not take, are errors."""

    def construct_object(self, node, deep=False):
        kind = node.tag.rpartition(":")[2]
        if kind == "timestamp":
            problem = f"`{node.value}` is a date for YAML, and DVC records none: put it in quotes, as text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        if (
            isinstance(node, yaml.ScalarNode)
            and node.style is None
            and AMBIGUOUS.get(kind, NEVER).fullmatch(node.value)
        ):
            problem = (
                f"YAML 1.1 and YAML 1.2 read `{node.value}` as different values, and DVC's record would have the other one: write "
                f"{'true or false' if kind == 'bool' else 'the number in decimal digits alone'}, or put it in quotes if it is text"
            )
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_object(node, deep)


def _values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Values that a node stands for, itself and those of its aliases included.

    Raises:
        RecursionError: an alias stands for what it is in.
    """
    if id(node) not in counted:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        parts = [part for pair in pairs for part in pair] if pairs else node.value
        inner = parts if isinstance(node, yaml.CollectionNode) else ()
        counted[id(node)] = 1 + sum(_values(part, counted) for part in inner)
    return counted[id(node)]


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


class _Dumper(yaml.SafeDumper):
    """Puts texts in quotes that a Loader, or DVC, would take for something else."""


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    """Double quotes around what a number may begin with, and what has line ends that only double quotes keep."""
    known = Loader("").resolve(yaml.ScalarNode, text, (True, False)) == TEXT
    plain = known and not re.match(r"[-+.\d]", text) and not re.search("[\r\x85\u2028\u2029\ufeff]", text)
    return dumper.represent_scalar(TEXT, text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def dumped(content: object) -> str:
    """YAML that a ParamsLoader reads as the same content."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML file, and where, without the line itself: it may hold a credential."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return scrub(" ".join(str(error).split()))
    said = [(error.context, error.context_mark), (error.problem, error.problem_mark)]
    parts = [
        " ".join(text.split()) + (f" in line {mark.line + 1}, column {mark.column + 1}" if mark else "")
        for text, mark in said
        if text
    ]
    return scrub(", ".join(parts))


def _mapping(loader, node, deep=False):
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (list, dict, set)):
            raise yaml.constructor.ConstructorError(
                None, None, "a list or mapping cannot be a name", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"`{key}` is given twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


Loader.add_constructor("tag:yaml.org,2002:map", lambda loader, node: _mapping(loader, node, deep=True))


def lines(errors: list[dict], data: dict, root: type[BaseModel]) -> list[str]:
    """One line per mistake: pydantic gives one error per alternative of a field that takes several types."""
    locations = [_location(item, data) for item in errors]
    explained: dict[tuple, list[str]] = {}
    for location, item in zip(locations, errors, strict=True):
        if any(other[: len(location)] == location and len(other) > len(location) for other in locations):
            continue  # another alternative fits better: its own errors lie deeper
        explained.setdefault(location, []).append(_explain({**item, "loc": location}, item["loc"], root))
    joined = []
    for same in explained.values():
        first, *others = dict.fromkeys(same)
        rest = [line.partition(" is not allowed: ")[2].rstrip(".") for line in others]
        joined.append(scrub(first + "".join(f" Or {line}." for line in rest if line)))
    return joined


def _location(error: dict, data: dict) -> tuple:
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
    if kind == "invalid_key":  # 7, or `on`, which is true in YAML 1.1: never the name of a field
        location = (*location[:-1], json.dumps(error["input"], default=str))
        where = ".".join(map(str, location))
    if kind in ("extra_forbidden", "invalid_key"):
        model = _model_at(full, root)
        names = list(model.model_fields) if model else []
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
        hint = f" Did you mean `{near[0]}`?" if near else f" Known here: {', '.join(names)}." if names else ""
        return f"{where}: unknown name.{hint}"
    if kind == "missing":
        return f"{where}: missing. Add it."
    if kind == "value_error":
        text = f"{context['error']}."  # an error of prompts.py names the field itself
        return text if text.startswith(f"{where}.") else f"{where}: {text}"
    if kind == "model_type" and error["input"] is None:
        return f"{where}: should be a section of parameters, not empty."
    value = json.dumps(error["input"], default=str)
    if kind == "literal_error":
        near = difflib.get_close_matches(
            str(error["input"]), [p.strip("'") for p in context["expected"].replace(" or ", ", ").split(", ")], n=1
        )
        hint = f" Did you mean `{near[0]}`?" if near else ""
        return f"{where}: {value} is not allowed: choose {context['expected']}.{hint}"
    # pydantic says "Input should be …", "List should have …".
    message = re.sub(r"^\w+ should ", "", error["msg"]).replace(" after validation", "")
    if kind == "model_type":
        message = "be a section of parameters"
    return f"{where}: {value} is not allowed: it should {message}."
