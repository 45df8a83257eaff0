"""What a user's metric may read of the project while it runs: the files that the build knows as inputs, so that it scores again when they change."""

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from slmake.errors import UserError

UNKNOWN = (
    "{0}: a metric reads it, but the build does not know it as an input: after a change of it, nothing would be scored again. Write "
    "`INPUTS = [\"{0}\"]` into the metric's file, beside its imports; it is a list of names that start at the project's folder."
)

_project: str = ""  # the project's folder, absolute: a metric may change the working folder
_known: tuple[str, ...] | None = None  # files and folders of the running rule, absolute; None where nothing is planned
_refused: list[str] | None = None  # what was refused; None where no metric runs


def allow(names: Iterable[str] | None) -> None:
    """Set which files, and files in which folders, a metric may read; all, if None."""
    global _known, _project
    _project = os.getcwd()  # noqa: PTH109
    _known = (
        None if names is None else tuple({way(name) for name in names for way in (os.path.abspath, os.path.realpath)})
    )


@contextlib.contextmanager
def inputs_only() -> Iterator[None]:
    """Let a block read no files of the project but those that are known.

    Left out: hidden folders and the environment, which hold packages and caches, and the pipeline's own code.

    Raises:
        UserError: it read another, also where the user's code has caught that.
    """
    global _refused
    if _known is None or _refused is not None:
        yield
        return
    _watch()
    _refused = []
    try:
        yield
    finally:
        refused, _refused = _refused, None
        if refused:
            raise UserError(UNKNOWN.format(refused[0])) from None


@functools.cache
def _watch() -> None:
    """Look at every file that Python opens, which is not what libraries in C++ or Rust, or other programs, open; it cannot be undone."""
    sys.addaudithook(_look)


def _look(event: str, arguments: tuple) -> None:
    if _refused is None:
        return
    if event == "sqlite3.connect":
        event, arguments = "open", (arguments[0], None, os.O_RDWR)
    if event == "open" and (name := _unknown(*arguments)):
        _refused.append(name)
        raise UserError(UNKNOWN.format(name))


def _unknown(path: object, mode: str | None, flags: int) -> str | None:
    """The name of a file, from the project's folder, if it is read and should not be; of bytecode, its source's."""
    if not isinstance(path, str | bytes) or flags & os.O_ACCMODE == os.O_WRONLY:
        return None
    named = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
    with contextlib.suppress(ValueError, NotImplementedError):
        named = importlib.util.source_from_cache(named)
    places = {named, os.path.realpath(named)}
    if any(place == known or place.startswith(known + os.sep) for place in places for known in (*_known, sys.prefix)):
        return None
    for place, folder in ((named, _project), (os.path.realpath(named), os.path.realpath(_project))):
        if place.startswith(folder + os.sep):
            name = Path(place).relative_to(folder)
            hidden = name.parts[0].startswith(".") and len(name.parts) > 1
            own = name.parts[0] in ("slmake", "scripts") and name.suffix == ".py"
            return None if hidden or own or not Path(place).is_file() else name.as_posix()
    return None
