"""Bring what a source names here, check it against its pin, and tell what was read."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from slmake import cli, outputs
from slmake.errors import UserError
from slmake.sources import blob, download
from slmake.sources.syntax import KINDS, PICKLES, Source, pickle_advice

ENDINGS = (
    ".safetensors",
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".tiktoken",
    "MLmodel",
)  # what is read of a model folder


class Brought(NamedTuple):
    """A source's file or folder on this disk."""

    path: Path
    record: dict  # source, pin, etag or revision where there is one, sha256, size_bytes


@contextlib.contextmanager
def downloading(kept: Path | None, beside: Path) -> Iterator[Path]:
    """A folder for downloads: `kept`, removed when the block ends well and left to go on from when it fails; or a temporary one."""
    if kept is None:
        with tempfile.TemporaryDirectory(dir=beside, prefix=".fetch-") as scratch:
            yield Path(scratch)
        return
    kept.mkdir(parents=True, exist_ok=True)
    yield kept
    outputs.remove(kept)


def bring(source: Source, repo_type: str, folder: Path, job: cli.Job, sha256: str | None = None) -> Brought:
    """Bring one source here.

    Args:
        repo_type: what a hub source is: `model` or `dataset`.
        folder: where downloads are kept until the caller removes it; a broken one goes on there.
        sha256: a sum the content must have, besides the source's own pin. Of a folder: the SHA-256 over names and sums of the files.

    Raises:
        UserError: it is not there, cannot be reached, or does not match its pin (the message shows both).
    """
    record: dict = {"source": source.full}
    if source.kind == "local":
        path = Path(source.path)
        if not path.exists():
            raise UserError(f"{source.path}: no such file or folder. Correct the source in params.yaml: {KINDS}.")
    elif source.kind == "https":
        path, etag = _web(source, folder, job)
        _match(source, "etag", etag)
        record |= {"pin": _pin(source)} | ({"etag": etag} if etag else {})
    elif source.kind in ("az", "datastore"):
        path, etag = _blob(source, repo_type, folder, job)
        record |= {"pin": _pin(source), "etag": etag}
    elif source.kind == "hf":
        from slmake.sources.hub import from_hub

        path, commit = from_hub(source, [f"*{ending}" for ending in ENDINGS], repo_type)
        record |= {"pin": {"revision": source.revision} | _pin(source), "revision": commit}
    elif source.kind == "registry":
        from slmake.sources.azureml import from_registry

        path = from_registry(source, folder)
        record["pin"] = {"version": source.revision} | _pin(source)
    else:
        raise AssertionError(source.kind)
    if repo_type == "dataset" and path.is_dir():
        raise UserError(f"{source.full}: a folder, not a dataset file. Check prepare.source.")
    files = files_of(path)
    if path.is_dir() and not files:
        raise UserError(f"{source.full}: nothing that can be read is there.")
    summed = download.sums(files)
    record["sha256"] = download.digest_of(summed) if path.is_dir() else summed[path.name]
    if path.is_dir():
        record["files"] = summed
    record["size_bytes"] = sum(file.stat().st_size for file in files.values())
    for expected in filter(None, {source.sha256, sha256}):
        if record["sha256"] != expected:
            raise UserError(
                f"{source.full} is not what was asked for: sha256 {record['sha256']}, expected {expected}. Download it again; if the "
                "source changed on purpose, put the new sum into params.yaml."
            )
    return Brought(path, record)


def model_files(names: Iterable[str]) -> list[str]:
    """The names that are read of a model folder: those beside its config.json, and in an MLflow folder those below, too."""
    kept = sorted(name for name in names if name.endswith(ENDINGS))
    deep = any(name.count("/") <= 1 and name.rpartition("/")[2] == "MLmodel" for name in kept)
    return [name for name in kept if deep or "/" not in name]


def files_of(path: Path) -> dict[str, Path]:
    """The files that are read of a file or a model folder, by relative name."""
    if not path.is_dir():
        return {path.name: path}
    names = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return {name: names[name] for name in model_files(names)}


def _pin(source: Source) -> dict:
    return {source.pin[0]: source.pin[1]} if source.pin else {}


def _match(source: Source, kind: str, actual: str | None) -> None:
    if source.pin and source.pin[0] == kind and actual != source.pin[1]:
        raise UserError(
            f"{source.full} is not what was asked for: {kind} {actual or 'unknown'}, expected {source.pin[1]}. If it changed on purpose, "
            f"put the new pin into params.yaml: `python -m tools.pin '{source.full}'` prints it."
        )


def _web(source: Source, folder: Path, job: cli.Job) -> tuple[Path, str | None]:
    target = folder / Path(source.path).name
    with job.progress(None, "B") as bar:
        return target, download.from_web(source.text, target, bar)


def etag_of(found: list[blob.Blob]) -> str:
    """The ETag of one blob; of several, the SHA-256 over their names and ETags."""
    return found[0].etag if len(found) == 1 else download.digest_of({one.name: one.etag for one in found})


def blobs(source: Source, repo_type: str) -> tuple[object, str, list[blob.Blob]]:
    """File system, container and the blobs that are read of an `az` or `datastore` source.

    Raises:
        UserError: nothing there, pickled weights only, or no access.
    """
    if source.kind == "datastore":
        from slmake.sources.azureml import as_blob

        source = as_blob(source)
    fs = blob.filesystem(source.account)
    found = blob.listing(fs, source.name, source.path)
    if len(found) == 1 and found[0].path == source.path:
        return fs, source.name, found
    if repo_type == "dataset":
        raise UserError(f"{source.full}: a folder, not a dataset file. Check prepare.source.")
    names = set(model_files(one.name for one in found))
    chosen = [one for one in found if one.name in names]
    if not any(one.name.endswith(".safetensors") for one in chosen):
        pickled = [one.name for one in found if one.name.endswith(PICKLES)]
        if pickled:
            raise UserError(f"{source.full}: weights are in {pickle_advice(pickled[0])}")
        raise UserError(f"{source.full}: no model there: no safetensors file among {len(found)} files.")
    return fs, source.name, chosen


def _blob(source: Source, repo_type: str, folder: Path, job: cli.Job) -> tuple[Path, str]:
    fs, container, found = blobs(source, repo_type)
    etag = etag_of(found)
    _match(source, "etag", etag)
    single = found[0].path == source.path
    root = folder / etag[:40]  # a changed source begins anew
    with job.progress(sum(one.size for one in found), "B") as bar:
        for one in found:
            target = root / one.name
            if target.exists() and target.stat().st_size == one.size:
                bar.update(one.size)
            else:
                download.from_blob(fs, container, one, target, f"{source.text}{'' if single else '/' + one.name}", bar)
    return (root / found[0].name if single else root), etag
