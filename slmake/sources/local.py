"""A file or a folder on this disk, or the files that match a pattern."""

import fnmatch
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
SPLITS = ("train", "eval", "test")  # the keys of prepare.source
SPLIT_WORD = re.compile(  # of a file's name, or of a folder's
    r"(?i)(?<![a-z])(?:(?P<train>train|(?<=/)training)|(?P<eval>eval|val(?:id(?:ation)?)?|dev)|(?P<test>test|(?<=/)testing))(?![a-z])"
)


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


def several_splits(source: str, names: list[str]) -> str:
    """What to say of files that are of several splits by their names, as a hub's folders hold them; "" where they are not.

    Args:
        source: the folder or pattern that names them; what it says itself tells them not apart.
    """
    fixed = re.split(r"[*?[]", source)[0].rpartition("/")[0] if glob.has_magic(source) else source.rstrip("/")
    splits: dict[str, list[str]] = {}
    for name in names:
        if words := list(SPLIT_WORD.finditer(name.removeprefix(fixed))):
            splits.setdefault(words[-1].lastgroup, []).append(name)
    if len(splits) < 2:
        return ""
    found = ", ".join(f"{split}: {_pattern_of(splits[split], names)}" for split in SPLITS if split in splits)
    return f"{source} names files of several splits. To keep them apart, write under prepare.source: {found}"


def _pattern_of(chosen: list[str], names: list[str]) -> str:
    """One name, or a pattern that fits several of some names and no other."""
    start = os.path.commonprefix(chosen)  # noqa: RUF071 (of characters: the names of one folder differ in a number)
    end = os.path.commonprefix([name.removeprefix(start)[::-1] for name in chosen])[::-1]  # noqa: RUF071
    pattern = chosen[0] if len(chosen) == 1 else f"{start}*{end}"
    fits = [name for name in names if fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/")]
    return pattern if fits == chosen else f"a pattern that fits {' and '.join(chosen[:2])}"


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
