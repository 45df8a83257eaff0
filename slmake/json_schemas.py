"""JSON Schemas of the user's: complete in themselves, and checked without reading anything else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmake.errors import UserError
from slmake.patterns import compiled


def read(file: Path, where: str) -> tuple[dict, Any]:
    """A schema and its `validator`.

    Args:
        where: the parameter that names the file, for errors.

    Raises:
        UserError: the file is not there, is no JSON, or no schema that `validator` takes.
    """
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{where}: {file}: no such file. Correct the name of the JSON Schema.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {file}: not JSON: {error}. Correct the file.") from None
    try:
        return schema, validator(schema)
    except ValueError as error:
        raise UserError(f"{where}: {file}: not a JSON Schema: {error}. Correct the file.") from None


def validator(schema: dict) -> Any:
    """A validator of the draft that the schema names; it never opens a file or an address.

    Raises:
        ValueError: the schema is none, has a pattern that takes too long, refers to what is not in it, or to itself without end.
    """
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, extend, validator_for
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012, specification_with

    if not isinstance(schema, dict):
        raise ValueError("an object is expected")
    if not isinstance(schema.get("$schema", ""), str):
        raise ValueError("$schema is no text")
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(error.message) from None
    kind = extend(kind, {"pattern": _pattern})
    root = specification_with(kind.META_SCHEMA["$schema"], default=DRAFT202012).create_resource(schema)
    resolver = REGISTRY.with_resource("", root).resolver_with_root(root)
    waiting = [(root, resolver)]
    while waiting:
        part, within = waiting.pop()
        content = part.contents if isinstance(part.contents, dict) else {}
        if isinstance(content.get("pattern"), str):
            compiled(content["pattern"])
        for reference in (content[key] for key in ("$ref", "$dynamicRef") if key in content):
            try:
                within.lookup(reference)
            except (Unresolvable, TypeError, ValueError):  # the latter two: a pointer through what has no such parts
                raise ValueError(
                    f"$ref: {reference!r} is not in the schema, and no other file is read. Write it under $defs"
                ) from None
        waiting += [(inner, within.in_subresource(inner)) for inner in part.subresources()]
    made = kind(schema, registry=REGISTRY)
    try:
        made.is_valid({})
    except RecursionError:
        raise ValueError("a $ref leads back to itself without end") from None
    return made


def _pattern(validator: Any, pattern: str, instance: object, schema: dict) -> Iterator[Any]:
    """jsonschema's own check of the keyword `pattern`, within a time limit: what cannot be told within it does not match."""
    from jsonschema.exceptions import ValidationError

    if not validator.is_type(instance, "string"):
        return
    try:
        found = compiled(pattern).search(instance)
    except ValueError as error:
        yield ValidationError(str(error))
        return
    if not found:
        yield ValidationError(f"{instance!r} does not match {pattern!r}")
