"""A file or a folder on this disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from slmake import cli
from slmake.errors import UserError
from slmake.sources.base import Source


@dataclass(frozen=True, kw_only=True)
class LocalPath(Source):
    """`path/to/file`; any text without a scheme."""

    kind = "local"
    prefixes = ()
    form = "a local path"
    pin_needed = False

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(text=text, path=text)

    def fetch(self, use: str, folder: Path, job: cli.Job) -> tuple[Path, dict]:
        path = Path(self.path)
        if not path.exists():
            from slmake.sources.schemes import FORMS

            raise UserError(f"{self.path}: no such file or folder. Correct the source in params.yaml: {FORMS}.")
        return path, {}
