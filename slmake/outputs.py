"""Outputs appear whole or not at all: written to a temporary sibling, renamed at the very end."""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from slmake.cli import PLANNED
from slmake.errors import UserError

BUILT = Path(".snakemake/slmake.built")  # the marks of each output when its rule had built it
# Fields of a `mark` that say whether a file is the same: always, where links to it came and went, and in a copy of it.
WHOLE, LINKED, COPIED = (0, 1, 2, 3), (0, 1, 3), (0, 1)


def refuse_existing(*paths: Path) -> None:
    """Raise UserError if an output is already there: a script never overwrites."""
    for path in paths:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(
                f"{path} already exists. Remove it first, or let `snakemake` decide whether to build it again."
            )


@contextlib.contextmanager
def written(folder: Path | None = None, files: Iterable[Path] = (), noted: bool = True) -> Iterator[list[Path]]:
    """Temporary siblings for a folder (created empty) and files; renamed when the block ends well, removed when it fails.

    Args:
        noted: they are a rule's outputs (see `note_built`).

    Yields the temporary paths in the order given, the folder's first.

    Raises:
        UserError: an output already exists.
        OSError: the place cannot be written, or the disk is full.
    """
    paths = ([folder] if folder else []) + list(files)
    refuse_existing(*paths)
    run = secrets.token_hex(4)  # another process that still works on the same output keeps to its own names
    partial = [path.parent / f".{path.name}.{run}.partial" for path in paths]
    for path, temporary in zip(paths, partial, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        if path is folder:
            temporary.mkdir()
    try:
        yield partial
        for temporary in partial:
            _settle(temporary)
        for temporary in partial:
            temporary.stat()  # all of them are there before the first is renamed
        for path, temporary in zip(paths, partial, strict=True):
            if path.is_dir():
                path.rmdir()
            os.replace(temporary, path)
        if noted and PLANNED in os.environ:  # Snakemake runs this rule, and records what it was built from
            note_built(paths)
    except BaseException:
        for temporary in partial:
            with contextlib.suppress(OSError):
                remove(temporary)
        raise


def scratch(partial: Path) -> Path:
    """A name beside a temporary output, for what is needed while it is made; like the output's own it is removed after a kill."""
    return partial.with_name(f"{partial.stem}.scratch.partial")


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary siblings of a killed run; renamed first, so that a process of it that still lives cannot write there."""
    mine = re.compile(rf"\.{re.escape(path.name)}(\.[0-9a-f]{{8}}(\.\w+)?)?\.partial")
    for entry in list(path.parent.iterdir()):
        if mine.fullmatch(entry.name):
            aside = entry.with_name(f".{path.name}.{secrets.token_hex(4)}.removed.partial")
            with contextlib.suppress(FileNotFoundError):  # the other process removed it itself
                os.replace(entry, aside)
                remove(aside)


def remove(path: Path) -> None:
    """Delete a file or a folder; nothing happens if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """Flush to disk, and give every file the permissions that the user's umask asks for (some libraries write 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        file.chmod(0o666 & ~umask)
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def replace(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it: at any moment it holds the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def alone(path: Path, wait: bool) -> Iterator[bool]:
    """Be the only process in a block with this file, which stays; yields whether this one is known to be.

    Args:
        wait: until it is. A place that cannot be written, or has no locks, is not waited for.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(exist_ok=True)
            fcntl.flock(stack.enter_context(open(path, "a")), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            known = False
        else:
            known = True
        yield known


def write_json(path: Path, value: dict) -> None:
    """Write `value` as indented JSON with a stable key order of insertion and a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(
    path: Path, *fields: str, output: Path | None = None, check: Callable[[dict], None] | None = None
) -> dict:
    """The content of a JSON file that a rule wrote.

    Args:
        fields: names that must be in it.
        output: the whole of what the rule wrote, if that is a folder around the file.
        check: raises a ValueError that says what else is wrong with the content.

    Raises:
        UserError: it is not there, is damaged, or lacks a field.
    """
    made = output or path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lacking = [name for name in fields if not isinstance(content, dict) or name not in content]
        if lacking:
            raise ValueError(f"it has no `{lacking[0]}`")
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        if check:
            check(content)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Build it with `snakemake --cores all {made}`.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}. Remove {made} and run snakemake: it is built again.") from None
    return content


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def mark(path: Path | str) -> list[int]:
    """Size, times (ns: of the content, of the inode) and number of a file's inode: while they are the same, so is its content."""
    status = os.stat(path)  # noqa: PTH116 (faster than Path.stat; every parse of the Snakefile asks for hundreds)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def marks(paths: Iterable[Path | str]) -> dict[str, list[int]]:
    """`mark` of each file that is here, and of the files in folders (caches and marks of Python and Snakemake left out), by path."""
    seen = {}
    for path in map(Path, paths):
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".snakemake"):
                seen[file.as_posix()] = mark(file)
    return seen


def note_built(paths: Iterable[Path | str], to_be_linked: bool = False) -> None:
    """Note the marks of outputs that a rule has built, or that were found to be what it built; where that is not possible, nothing.

    Args:
        to_be_linked: DVC will link the files into its cache, which changes the inode's time; that is not compared until they are noted again.
    """
    with contextlib.suppress(OSError):
        for path in paths if BUILT.parent.is_dir() else ():
            BUILT.mkdir(exist_ok=True)
            note = _note_of(path)
            temporary = note.with_name(f".{note.name}.{secrets.token_hex(4)}.partial")
            try:
                temporary.touch()
                made = {"inode": temporary.stat().st_ino, "is": seen_of(Path(path)), "to_be_linked": to_be_linked}
                temporary.write_text(json.dumps(made), encoding="utf-8")
                os.replace(temporary, note)
            finally:
                temporary.unlink(missing_ok=True)


def as_built(path: Path | str, linked: bool = False) -> bool:
    """Whether an output is still the one that `note_built` saw: a copy from elsewhere is not, whatever its times say.

    Args:
        linked: links to its files may have come and gone since, which changes the inode's time: DVC's cache keeps the same content of
            several outputs as one inode.

    An output that was never noted counts as the one that Snakemake has a record of. Where the whole project was copied, its notes are
    copies, too: then sizes and times of the content are compared.
    """
    noted = _noted(path)
    if noted is None:
        return True
    fields = LINKED if linked or noted["to_be_linked"] else WHOLE
    fields = COPIED if noted["copied"] else fields
    return only(fields, seen_of(Path(path))) == only(fields, noted["is"])


def is_copied(path: Path | str) -> bool:
    """Whether the note of an output is a copy, as where a whole project was copied (see `as_built`)."""
    noted = _noted(path)
    return noted is not None and noted["copied"]


def _noted(path: Path | str) -> dict | None:
    """What `note_built` has written of an output, and whether that note is a copy; None if there is none that can be read."""
    note = _note_of(path)
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        return {
            "is": noted["is"],
            "copied": note.stat().st_ino != noted["inode"],
            "to_be_linked": noted.get("to_be_linked"),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_noted(path: Path | str) -> bool:
    """Whether a rule's output of that name was noted."""
    with contextlib.suppress(OSError):  # a text that is no path
        return _note_of(path).is_file()
    return False


def only(fields: tuple[int, ...], seen: dict[str, list[int]] | str | None) -> dict[str, list[int]] | str | None:
    """What `seen_of` gives with some fields of each mark alone; what is of a single file stays."""
    if not isinstance(seen, dict):
        return seen
    return {file: [mark[field] for field in fields] for file, mark in seen.items()}


def seen_of(path: Path) -> dict[str, list[int]] | str | None:
    """Marks of a folder's files. Of one file the SHA-256, because Snakemake touches it when its rule has ended; None where it is not."""
    return marks([path]) if path.is_dir() else sha256(path) if path.is_file() else None


def _note_of(path: Path | str) -> Path:
    return BUILT / base64.urlsafe_b64encode(Path(path).as_posix().encode()).decode()


def folder_digest(path: Path) -> str:
    """SHA-256 over the names and contents of a folder's files (Snakemake's and DVC's own markers left out)."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".snakemake")):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
    return digest.hexdigest()


def folder_size(path: Path) -> int:
    """Bytes of all files in a folder (markers left out)."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.name.startswith(".snakemake"))


def single_files() -> list[Path]:
    """The outputs that are files, not folders: figures, tables and scores."""
    return [path for folder in ("results", "build/report") for path in Path(folder).glob("*") if path.is_file()]


def break_readonly_hardlinks() -> None:
    """Replace single results that may not be written (read-only links into DVC's cache) by copies of their own; their times stay."""
    for path in single_files():
        if not path.is_symlink() and not path.stat().st_mode & 0o200:
            temporary = path.with_name(f".{path.name}.partial")
            shutil.copy2(path, temporary)
            temporary.chmod(0o644)
            os.replace(temporary, path)
