"""A build lets no `dvc repro` beside it remove what it makes: DVC removes a stage's outputs before it runs the command that would meet
Snakemake's lock.

To DVC's list of who uses which files a build is a reader of its outputs: `dvc status` goes on beside it, `dvc repro` and `dvc commit` say
who is at work.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from slmake import outputs
from slmake.errors import UserError
from slmake.platforms.dvc import BUILDING

_here: bool | None = None  # whether this process has BUILDING; None where it has not asked
_held = contextlib.ExitStack()


@contextlib.contextmanager
def until_recorded() -> Iterator[None]:
    """A block that builds and then records: meanwhile no other build holds its outputs against this one's recording."""
    global _here
    with outputs.alone(BUILDING, wait=False) as _here:
        try:
            yield
        finally:
            release()
            _here = None


def hold(names: Iterable[str]) -> None:
    """Let no DVC remove these outputs until `release`. Another build is not held up: it meets Snakemake's lock.

    Raises:
        UserError: DVC writes one of them just now.
    """
    mine = _held.enter_context(outputs.alone(BUILDING, wait=False)) if _here is None else _here
    if not mine:
        return
    from dvc.lock import LockError

    from slmake.platforms.atomic_dvc import reading

    folder = str(BUILDING.parent.absolute())
    try:
        _held.enter_context(reading(folder, [str(Path(name).absolute()) for name in names]))
    except LockError as error:
        other = str(error).splitlines()[1].strip()
        raise UserError(
            f"DVC writes what would be built: {other}. Run the same command again when it has ended; if there is no such process, remove "
            ".dvc/tmp/rwlock."
        ) from None


def release() -> None:
    """Hold nothing any more: what was built can be recorded."""
    _held.close()
