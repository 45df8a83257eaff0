"""JSON of datasets: each key of an object once, no NaN, and numbers that are written as they were given."""

import json
import math
from decimal import Decimal

from slmake.generation import written_alike


class Refused(ValueError):
    """JSON as Python reads it, but not such that a row is what its file says."""


class Written(float):
    """A number with more digits than a float holds: as text it is what stands in the file."""

    def __new__(cls, text: str):
        made = super().__new__(cls, text)
        made.text = text
        return made

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple:
        return Written, (self.text,)


def number(text: str) -> float:
    """A number that is not whole."""
    value = float(text)
    if len(text) < 16 or repr(value) == text or not math.isfinite(value) or Decimal(repr(value)) == Decimal(text):
        return value
    return Written(text)


def unique(pairs: list[tuple[str, object]]) -> dict:
    """An object of its members; Refused if two have the same key."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise twice(next(key for key in keys if keys.count(key) > 1))
    return made


def twice(key: str) -> Refused:
    return Refused(f"an object has the key `{key[:60]}` twice. Keep one of them")


def _constant(text: str) -> None:
    raise Refused(f"{text} is not JSON. Write null, or leave the field out")


_decoder = json.JSONDecoder(object_pairs_hook=unique, parse_float=number, parse_constant=_constant)


def read_json(text: str) -> object:
    """The value of a JSON text.

    Raises:
        ValueError: it is none (a JSONDecodeError), has a number of thousands of digits, or is Refused.
        RecursionError: it is nested too deeply.
    """
    if text.startswith("\ufeff"):
        raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
    return _decoder.decode(text)


def unlike(value: object) -> object:
    """What in a value a chat template of the runtime does not write as one of Python does; None without any.

    That is a number out of its range, and a date, bytes or whatever else of a Parquet file is no JSON.
    """
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict | list):
            waiting += part.values() if isinstance(part, dict) else part
        elif not isinstance(part, str | int | float | None) or (
            isinstance(part, int | float) and not written_alike(part)
        ):
            return part
    return None
