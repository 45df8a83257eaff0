"""What Azure ML mounts in place of a source of params.yaml. A step says so in its environment; no other run has it there."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypedDict

from slmake import cli
from slmake.sources.base import Source

ORIGINS = "SLMAKE_ORIGINS"  # environment variable: an Origin by source of params.yaml (without its pin), as JSON


class Origin(TypedDict):
    """What is read in place of a source."""

    text: str  # the source itself, or what azureml/settings.yaml names in its place
    path: str | None  # where it is mounted; None where the step fetches it
    sha256: str | None  # the source's pin, where it still holds


def origin_of(source: Source) -> Origin | None:
    """What a step reads in place of a source; None everywhere else."""
    return json.loads(os.environ.get(ORIGINS, "{}")).get(source.full)


@dataclass(frozen=True, kw_only=True)
class Mounted(Source):
    """A file or folder that Azure ML has mounted: read from `at`, and recorded as what it is, its `text`."""

    kind = "mounted"
    prefixes = ()
    form = "what Azure ML mounts"
    pin_needed = False

    at: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(text=text)

    def fetch(self, use: str, folder: Path, job: cli.Job) -> tuple[Path, dict]:
        version = re.search(r"(?:/versions/|^azureml:[\w.-]+:)([\w.-]+)$", self.text)
        return Path(self.at), {"pin": {"version": version[1]}} if version else {}
