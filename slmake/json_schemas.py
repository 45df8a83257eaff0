"""JSON Schemas of the user's: complete in themselves, and checked without reading anything else."""

import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from slmake.errors import UserError, is_failure
from slmake.patterns import compiled

STEPS = 50_000  # parts of the schema that are held against parts of one value: a second; an answer of some pages needs a few thousand


def read(file: Path, where: str) -> tuple[dict, "Validator"]:
    """A schema and its `validator`.

    Args:
        where: the parameter that names the file, for errors.

    Raises:
        UserError: the file is not there, is no JSON, or no schema that `validator` takes.
    """
    try:
        schema = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError:
        raise UserError(f"{where}: {file}: no such file. Correct the name of the JSON Schema.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {file}: not JSON: {error}. Correct the file.") from None
    try:
        return schema, validator(schema)
    except ValueError as error:
        raise UserError(f"{where}: {file}: not a JSON Schema: {error}. Correct the file.") from None


def validator(schema: dict) -> "Validator":
    """A validator of the draft that the schema names.

    Raises:
        ValueError: the schema is none, has a pattern that takes too long, refers to what is not in it, or to itself without end or too
            often, or has what is not followed.
    """
    from jsonschema.validators import Draft3Validator, Draft202012Validator, validator_for

    if not isinstance(schema, dict):
        raise ValueError("an object is expected")
    if not isinstance(schema.get("$schema", ""), str):
        raise ValueError("$schema is no text")
    kind = validator_for(schema, default=Draft202012Validator)
    if kind is Draft3Validator:
        raise ValueError("draft-03 is not read. Write it in a later draft, and name that in $schema")
    check_schema(kind, schema)
    made = Validator(kind, schema)
    try:
        made.judge({})
    except RecursionError:
        raise ValueError("a $ref leads back to itself without end, or parts are nested too deeply") from None
    return made


def check_schema(kind: type, schema: object) -> None:
    """Hold a schema, or a part of one, against the schema of its draft.

    Raises:
        ValueError: it is none.
    """
    from jsonschema.exceptions import SchemaError

    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(error.message) from None
    except OverflowError as error:  # a pattern that repeats more often than Python counts
        raise ValueError(str(error)) from None
    except BaseException as error:  # jsonschema's registry, in Rust, panics where Python's recursion ends
        if not is_failure(error) or (isinstance(error, Exception) and not isinstance(error, RecursionError)):
            raise
        raise ValueError("its parts are nested too deeply") from None


class Validator:
    """Judges values by a schema: it never opens a file or an address, and always ends."""

    def __init__(self, kind: type, schema: dict):
        """Make jsonschema's own validator, whose steps are counted, and whose patterns are matched within a time limit.

        Args:
            kind: jsonschema's validator of a draft, which has checked the schema.

        Raises:
            ValueError: a pattern takes too long, or a reference leads out of the schema.
        """
        import attrs
        from jsonschema.validators import extend
        from jsonschema_specifications import REGISTRY

        _check_parts(kind, schema)
        own = {"pattern": _pattern, "patternProperties": _pattern_properties, "uniqueItems": _unique_items}
        own |= {"additionalProperties": _additional_properties, "multipleOf": _multiple_of}
        counted = extend(kind, own)
        fields = [(field.name, field.alias) for field in attrs.fields(counted) if field.init]

        def evolve(made: Any, **changes: Any) -> Any:
            """jsonschema's way to another part of the schema; its own goes back to the class without `own` at each $schema."""
            self.steps += 1
            if self.steps > STEPS:
                raise ValueError(f"a value needs more than {STEPS:,} steps: its $ref multiply. Write it shorter")
            _refuse_deep()
            kept = {alias: getattr(made, name) for name, alias in fields if alias not in changes}
            return counted(**kept, **changes)

        counted.evolve = evolve
        self.steps, self.made = 0, counted(schema, registry=REGISTRY)

    def judge(self, value: object) -> bool:
        """Whether the schema accepts a value.

        Raises:
            ValueError, RecursionError, ArithmeticError: that cannot be told.
        """
        self.steps = 0
        return self.made.is_valid(value)

    def is_valid(self, value: object) -> bool:
        """Whether the schema accepts a value; not where that cannot be told: it is nested too deeply, or has a number beyond all bounds."""
        try:
            return self.judge(value)
        except (ValueError, RecursionError, ArithmeticError):
            return False


def _refuse_deep() -> None:
    """Raise RecursionError before Python does: jsonschema's registry, in Rust, panics where it meets one."""
    try:
        sys._getframe(sys.getrecursionlimit() * 3 // 4)
    except ValueError:  # there are not so many
        return
    raise RecursionError("nested too deeply")


def _check_parts(kind: type, schema: dict) -> None:
    """Check the patterns and references in all parts of a schema.

    Raises:
        ValueError: see `Validator`.
    """
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012, specification_with

    draft = specification_with(kind.META_SCHEMA["$schema"], default=DRAFT202012)
    root, used, seen = draft.create_resource(schema), set(), {id(schema)}
    waiting = [(root, REGISTRY.with_resource("", root).resolver_with_root(root))]
    while waiting:
        part, within = waiting.pop()
        content = part.contents if isinstance(part.contents, dict) else {}
        used |= {"patternProperties", "unevaluatedProperties"} & content.keys()
        if len(used) > 1:  # jsonschema's check of the latter matches the former's patterns without a limit
            raise ValueError("unevaluatedProperties with patternProperties is not followed. Write additionalProperties")
        for pattern in (content.get("pattern"), *content.get("patternProperties", ())):
            if isinstance(pattern, str):
                compiled(pattern)
        for reference in (content[key] for key in ("$ref", "$dynamicRef") if key in content):
            try:
                found = within.lookup(reference)
            except (Unresolvable, TypeError, ValueError):  # the latter two: a pointer through what has no such parts
                raise ValueError(
                    f"$ref: {reference!r} is not in the schema, and no other file is read. Write it under $defs"
                ) from None
            if id(found.contents) not in seen:  # it may stand where no schema is expected
                seen.add(id(found.contents))
                check_schema(kind, found.contents)
                waiting.append((draft.create_resource(found.contents), found.resolver))
        waiting += [(inner, within.in_subresource(inner)) for inner in part.subresources()]


# jsonschema's own checks of some keywords, but with patterns that are matched within a time limit, in linear time, and with exact numbers.


def _pattern(validator: Any, pattern: str, instance: object, schema: dict) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    if validator.is_type(instance, "string") and not compiled(pattern).search(instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: dict, instance: object, schema: dict) -> Iterator[Any]:
    if not validator.is_type(instance, "object"):
        return
    for pattern, part in patterns.items():
        for name, value in instance.items():
            if compiled(pattern).search(name):
                yield from validator.descend(value, part, path=name, schema_path=pattern)


def _additional_properties(validator: Any, wanted: object, instance: object, schema: dict) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    if not validator.is_type(instance, "object"):
        return
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, value in instance.items():
        if name in known or any(compiled(pattern).search(name) for pattern in patterns):
            continue
        if wanted is False:
            yield ValidationError(f"{name!r} is not among the properties")
        elif validator.is_type(wanted, "object"):
            yield from validator.descend(value, wanted, path=name)


def _unique_items(validator: Any, wanted: bool, instance: object, schema: dict) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    if wanted and validator.is_type(instance, "array") and len(set(map(hashable, instance))) < len(instance):
        yield ValidationError("an item is there twice")


def _multiple_of(validator: Any, step: float, instance: object, schema: dict) -> Iterator[Any]:
    """By decimals as they are written: in binary, 19.99 is no multiple of 0.01. A float has at most some hundred."""
    from jsonschema.exceptions import ValidationError

    if not validator.is_type(instance, "number"):
        return
    value, unit = (Fraction(number if isinstance(number, int) else repr(number)) for number in (instance, step))
    if value % unit:
        yield ValidationError(f"not a multiple of {step!r}")


def hashable(value: object) -> object:
    """What is equal for equal JSON values: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return dict, frozenset((name, hashable(part)) for name, part in value.items())
    return (list, *map(hashable, value)) if isinstance(value, list) else (isinstance(value, bool), value)
