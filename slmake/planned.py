"""What a build was planned with: a rule that would read other code or files stops, also where somebody puts them back before it ends.

Snakemake records the digests that it took when it planned. So what a rule loads and reads must be what was there then.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from slmake import outputs, user_reads
from slmake.cli import SOURCES
from slmake.code_inputs import PACKAGES, ROOT, code, digest, file_of, remember
from slmake.errors import UserError

FOLDER = Path(".snakemake")
KEPT = 30 * 86400  # seconds that a plan stays: rules of another build may have to read it
CHANGED = (
    "{} changed after this build was planned, so it stops: what was built so far is of what was there before. Run the same command "
    "again: it builds of what is there now."
)
READ = "{} was changed while {} read it; what it made of it is not kept. Run the same command again."

_files: dict[str, dict] | None = None  # those that the running rule may read; None where nothing is watched


def write(files: Mapping[str, list[str]]) -> str:
    """Write what each rule was planned with; its path. Two plans of the same are one file.

    Args:
        files: what a rule reads besides its code and the outputs of other rules, by rule.
    """
    plans = {
        rule: {
            "code": {name: {"is": digest([name]), "mark": outputs.mark(name)} for name in code(rule)},
            "files": {name: {"is": digest([name], exact=True)} for name in names},
        }
        for rule, names in files.items()
    }
    # A metric's file is loaded, too.
    read = {name for plan in plans.values() for kind in plan.values() for name in kind}
    own = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))  # what no result depends on, too
    _drop_stale_bytecode({*own, *map(Path, read)})
    remember()  # rules need not hash again what was hashed here
    text = json.dumps(plans).encode()
    path = FOLDER / f"slmake.plan.{hashlib.sha256(text).hexdigest()[:16]}"
    FOLDER.mkdir(exist_ok=True)
    for other in FOLDER.glob("slmake.plan.*"):
        with contextlib.suppress(OSError):  # another build removed it
            if other != path and time.time() - other.stat().st_mtime > KEPT:
                other.unlink()
    outputs.replace(path, text)
    return path.as_posix()


def _drop_stale_bytecode(files: set[Path]) -> None:
    """Remove compiled code that is no younger than its file's inode: Python takes it for the file's where size and time are the same."""
    for file in (file for file in files if file.suffix == ".py"):
        compiled = Path(importlib.util.cache_from_source(str(file)))
        with contextlib.suppress(OSError):
            if compiled.stat().st_mtime_ns <= file.stat().st_ctime_ns:
                compiled.unlink()


@contextlib.contextmanager
def watched(rule: str, started: int) -> Iterator[None]:
    """Let a block load no other code, and read no other files, than those that the build was planned with.

    Outputs of other rules that its command line names must be what these rules built.

    Args:
        rule: its name; where the build has no such rule, nothing is watched.
        started: when this process began to load code, ns since the epoch.

    Raises:
        UserError: a file differs, was changed since the process started, or was changed meanwhile.
    """
    global _files
    plan = _plan().get(rule)
    if plan is None:
        yield
        return
    inputs = [name for name in sys.argv[1:] if outputs.is_noted(name) and os.path.exists(name)]  # noqa: PTH110 (any text)
    seen, loaded = _seen(plan["files"], inputs), outputs.marks(plan["code"])  # before they are compared
    _refuse_other(plan, loaded, started)
    if "DVC_STAGE" not in os.environ:  # DVC links what a stage has built into its cache
        replaced = [name for name in inputs if not outputs.as_built(name, linked=True)]
        if replaced:
            raise UserError(f"{replaced[0]} is not what its rule has built. `make` says what to do with it.")
    finder = _Finder(plan["code"], loaded)
    sys.meta_path.insert(0, finder)
    _files = plan["files"]
    user_reads.allow([*plan["files"], *inputs])
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _files = None
        user_reads.allow(None)
    now = _seen(plan["files"], inputs)
    changed = [name for name in sorted(now.keys() | seen.keys()) if now.get(name) != seen.get(name)]
    if changed:
        raise UserError(READ.format(changed[0], rule))


def _seen(files: Iterable[str], inputs: list[str]) -> dict[str, object]:
    """What tells that files, and outputs of other rules, are still the same.

    A single output by content, for Snakemake touches it; the files of a folder by size, time and inode (see `outputs.as_built`, `linked`).
    """
    return outputs.marks(files) | {name: outputs.only(outputs.LINKED, outputs.seen_of(Path(name))) for name in inputs}


def refuse_unplanned(names: Iterable[str]) -> None:
    """Raise UserError if a rule is about to read a file of a folder or a pattern that was not there when the build was planned."""
    for name in names:
        if _files is not None and name not in _files:
            raise UserError(CHANGED.format(name))


def _plan() -> dict[str, dict]:
    try:
        return json.loads(Path(os.environ[SOURCES]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{os.environ[SOURCES]} of this build is gone. Run the same command again.") from None


def _refuse_other(plan: dict[str, dict], loaded: dict[str, list[int]], started: int) -> None:
    """Raise UserError if a file is another than the planned one, or was one for a moment since this process started."""
    for kind, exact in (("code", False), ("files", True)):
        for name, planned in plan[kind].items():
            touched = kind == "code" and loaded.get(name) != planned["mark"] and loaded.get(name, [0] * 4)[2] > started
            if touched or digest([name], exact) != planned["is"]:
                raise UserError(CHANGED.format(name))


class _Finder:
    """Finds no module, but looks at the project's own ones before Python loads them."""

    def __init__(self, planned: dict[str, dict], seen: dict[str, list[int]]):
        self.planned, self.seen = planned, seen

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise UserError if this module is another than the planned one; otherwise leave it to Python."""
        file = file_of(name) if name.split(".")[0] in PACKAGES else None
        own = file.relative_to(ROOT).as_posix() if file else None
        if own in self.planned and outputs.mark(file) != self.seen[own] and digest([own]) != self.planned[own]["is"]:
            raise UserError(CHANGED.format(own))
