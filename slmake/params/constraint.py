"""What `evaluate.constrain` and `package.constrain` can be: what answers are held to."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator

KINDS = ("regex", "json_schema")


def _known(value: str | dict[str, str]) -> str | dict[str, str]:
    if isinstance(value, str):
        return value
    if len(value) != 1 or next(iter(value)) not in KINDS:
        raise ValueError("write `none`, `labels`, `tools`, `{regex: PATTERN}` or `{json_schema: FILE}`")
    if "regex" in value:
        try:
            re.compile(value["regex"])
        except re.error as error:
            raise ValueError(f"regex: `{value['regex']}` is no regular expression: {error}") from None
    if not all(value.values()):
        raise ValueError("an empty pattern or file name")
    return value


Constraint = Annotated[Literal["none", "labels", "tools"] | dict[str, str], AfterValidator(_known)]


def file_of(constraint: str | dict[str, str]) -> list[str]:
    """The JSON Schema file that a constraint names, as a list; an empty one for other constraints."""
    return [constraint["json_schema"]] if "json_schema" in constraint else []
