"""A file or a folder on this disk, or the files that match a pattern."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from slmake import cli
from slmake.errors import UserError
from slmake.sources.base import Source

ROW_FILES = re.compile(r"[^.].*\.(jsonl?|ndjson|csv|tsv|parquet)(\.gz)?")  # in a folder of a dataset
SPLIT_NAMES = re.compile(r"(train|test|validation|valid|dev|eval)(?=[-_.])")


def row_files(path: str) -> list[str]:
    """The files that a local dataset source names, sorted: itself, those that match the pattern, or those with rows in the folder.

    A source that names no file is returned as it is.
    """
    if os.path.isdir(path):  # noqa: PTH112 (False, where Path.is_dir raises, for a name that is too long)
        names = [f"{path.rstrip('/')}/{name}" for name in os.listdir(path) if ROW_FILES.fullmatch(name)]  # noqa: PTH208
    elif glob.has_magic(path) and not os.path.lexists(path):
        names = [name for name in glob.glob(path) if os.path.isfile(name)]  # noqa: PTH207, PTH113
    else:
        names = []
    return sorted(names) or [path]


def check_one_split(path: str, names: list[str]) -> None:
    """Raise UserError where a folder holds the files of several splits, as a hub's folders do."""
    splits = sorted({match[0] for name in names if (match := SPLIT_NAMES.match(os.path.basename(name)))})  # noqa: PTH119
    if len(splits) > 1 and os.path.isdir(path):  # noqa: PTH112
        lines = ", ".join(f"{split}: {path.rstrip('/')}/{split}-*" for split in splits)
        raise UserError(
            f"prepare.source: {path} holds files of several splits: {', '.join(splits)}. Name them by patterns, such as {lines} (the keys of "
            "prepare.source are train, eval and test)."
        )


@dataclass(frozen=True, kw_only=True)
class LocalPath(Source):
    """`path/to/file`; any text without a scheme."""

    kind = "local"
    prefixes = ()
    form = "a local path"
    pin_needed = False

    @classmethod
    def parse(cls, text: str) -> Self:
        if text != text.strip() or text.startswith("//"):
            raise ValueError(
                "a path with outer white space, or one that begins with `//`: write a local path without them, or an address with its scheme "
                "and without a user"
            )
        plain = Path(text).as_posix() if text else text  # ./data/x is data/x, here and in what records the source
        return cls(text=plain, path=plain)

    def fetch(self, use: str, folder: Path, job: cli.Job) -> tuple[Path, dict]:
        path = Path(self.path)
        if not path.exists():
            from slmake.sources.schemes import FORMS

            raise UserError(f"{self.path}: no such file or folder. Correct the source in params.yaml: {FORMS}.")
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{self.path}: a pipe or a device, not a file. Save its content to a file and name that.")
        return path, {}
