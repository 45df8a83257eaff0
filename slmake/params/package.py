"""The section `package` of params.yaml."""

import re
from pathlib import Path

from pydantic import Field, field_validator

from slmake.params.base import Section
from slmake.params.constraint import Constraint


class Package(Section):
    """What a user ships: build/package."""

    name: str = Field("slmake-model", min_length=1, pattern=r"^[\w.-]+$", description="The model's name.")
    license: str = Field(
        "Apache-2.0",
        min_length=1,
        description="The model's licence: an SPDX identifier, an expression of several, or a name such as `llama3.2`.",
    )
    license_files: list[str] = Field(["LICENSE"], min_length=1, description="Licence texts to ship.")
    language: list[str] = Field(["en"], description="Languages, as ISO 639 codes.")
    tags: list[str] = Field([], description="More tags for a model hub.")
    intended_use: str = Field(
        "Not described yet: say in package.intended_use what the model is for.",
        min_length=1,
        description="What the model is for.",
    )
    limitations: str = Field(
        "Scores hold for texts like those it was tested on. It was not tested for bias or misuse.",
        min_length=1,
        description="What a user must know before relying on it.",
    )
    constrain: Constraint = Field(
        "none",
        description="Hold every answer of run.py, the server, `make ask` and `make chat` to `labels`, `tools` (text, or calls that fit the "
        "schemas of a request's tools, or of those that all conversations have), `{regex: PATTERN}` or `{json_schema: FILE}`.",
    )
    signing_key: str | None = Field(
        None,
        description="File with an elliptic-curve private key (PEM, no password) to sign the package with; keep it out of the repository.",
    )

    @field_validator("license_files")
    @classmethod
    def _names_in_a_package(cls, value):
        names = [Path(file).name for file in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two files are called `{name}`, and a package has them in one folder: rename one")
            if name.startswith(".") or not name.isprintable():
                raise ValueError(
                    f"{name!r} is hidden or has control characters, and no package holds such a file: rename it"
                )
        return value

    @field_validator("signing_key")
    @classmethod
    def _names_a_file(cls, value):
        # Without its first line, too: the content of a key's file is DER in base64, of a sequence, and YAML joins its lines.
        if value and (
            "-----BEGIN" in value or "\n" in value or re.fullmatch(r"M[A-P][A-Za-z0-9+/\s]{58,}[=\s]*", value)
        ):
            raise ValueError(
                "this is a key, and the name of its file is expected. Put it into a file outside of the project; if params.yaml was in a "
                "commit meanwhile, make another key"
            )
        return value
