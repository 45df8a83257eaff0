"""DVC's command line; its own files (dvc.lock, the list of its processes' locks) are written beside their place and renamed.

    python -m slmake.platforms.atomic_dvc commit --force

DVC writes them in place: a process that is killed meanwhile would leave a part of a file, which DVC then cannot read.

The receipts of `commit` are written once, to PENDING: who calls it compares again what was hashed, and then puts them into dvc.lock's place.
"""

import atexit
import contextlib
import copy
import functools
import io
import json
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import colorama.initialise
from dvc import cachemgr, rwlock
from dvc.cli import main
from dvc.dvcfile import FileMixin, Lockfile
from dvc.exceptions import DvcException
from dvc.fs import localfs
from dvc.repo import Repo  # noqa: F401 (as patched here, for those who call DVC in their own process)
from dvc.stage.cache import StageCache
from dvc.utils.serialize import _common, _yaml
from dvc_data.hashfile import checkout, state

from slmake import cli, outputs
from slmake.platforms.dvc import BUILDING, LOCK, PENDING, receipts
from slmake.platforms.origins import metadata


def dump(path, data, dumper, fs=None, **options) -> None:
    """Stands in for DVC's own function of the same arguments; DVC's version is pinned, and a test compares."""
    text = io.StringIO()
    dumper(data, text, **options)
    outputs.replace(Path(path), text.getvalue().encode())


class Pending:
    """The receipts, edited in memory: DVC itself reads and writes dvc.lock once per stage, half a second each."""

    def __init__(self):
        self.receipts: dict = {}

    @contextlib.contextmanager
    def edit(self, path, parser, dumper, fs=None) -> Iterator[dict]:
        """Stands in for DVC's own function of the same arguments, which edits a YAML file."""
        if Path(path).name != LOCK.name:
            with _common._modify_data(path, parser, dumper, fs) as data:
                yield data
            return
        if not self.receipts and LOCK.exists():
            self.receipts = _yaml.load_yaml(LOCK)
        yield self.receipts

    def write(self) -> None:
        dump(PENDING, self.receipts, _yaml._dump)


@contextlib.contextmanager
def edit_rwlock(lock_dir: str, fs, hardlink: bool) -> Iterator[dict]:
    """Stands in for DVC's own function of the same arguments. A file that a killed DVC left cut names no process that still runs."""
    path, guard = Path(lock_dir, rwlock.RWLOCK_FILE), os.path.join(lock_dir, rwlock.RWLOCK_LOCK)  # noqa: PTH118
    with rwlock.make_lock(guard, tmp_dir=lock_dir, hardlink_lock=hardlink):
        lock: dict = {}
        with contextlib.suppress(FileNotFoundError, ValueError, rwlock.Invalid):
            lock = rwlock.SCHEMA(json.loads(path.read_text(encoding="utf-8")))
        lock = {"read": defaultdict(list, lock.get("read", {})), "write": defaultdict(dict, lock.get("write", {}))}
        with outputs.alone(Path(lock_dir, BUILDING.name), wait=False) as nobody_builds:
            if nobody_builds:
                drop_killed_builds(lock)
        yield lock
        outputs.replace(path, json.dumps(lock).encode())


def checksum(info: dict) -> str:
    """Stands in for DVC's own: its cache of hashes also goes by the inode's time, which cannot be put back as that of the content can."""
    return str(int(state.tokenize([info["ino"], info["mtime"], info["size"], info.get("created")]), 16))


def refuse_replaced(cache: StageCache, stage) -> None:
    """Stands in for DVC's own, which puts a stage that was hashed into its cache of runs: what is committed was not run by DVC.

    Raises:
        DvcException: an output is neither what its rule has built nor what the receipts say.
    """
    for out in (out for out in stage.outs if metadata(out.def_path)):  # the stage `code` is no rule of Snakemake's
        if outputs.as_built(out.def_path):
            outputs.note_built([out.def_path], to_be_linked=True)
        elif out.hash_info.value not in [kept["md5"] for kept in receipts() if kept["path"] == out.def_path]:
            raise DvcException(f"{out.def_path} was replaced while it was recorded")


def relink(link, cache, cache_info: str, fs, path: str, in_cache: bool, force: bool, prompt=None) -> None:
    """Stands in for DVC's own function of the same arguments, which removes a file before it links the cache's: a kill between would lose it.

    A folder's files are brought in by `make restore` and `make pull` alone, which bring them again.
    """
    place = Path(path)
    if not (in_cache or force) or place not in map(Path.absolute, outputs.single_files()):
        RELINK(link, cache, cache_info, fs, path, in_cache, force, prompt)
        return
    beside = place.with_name(f".{place.name}.partial")
    beside.unlink(missing_ok=True)
    try:
        link(cache, cache_info, fs, str(beside))
        os.replace(beside, place)
    except checkout.CheckoutError:  # the cache has lost it
        raise checkout.CheckoutError([path]) from None
    finally:
        beside.unlink(missing_ok=True)  # where both are one file already, a rename does nothing
    cache.protect(cache_info)


@contextlib.contextmanager
def reading(folder: str, paths: list[str]) -> Iterator[None]:
    """Be a reader of these files in DVC's list, as a build (see `building`).

    Raises:
        LockError: another DVC writes one of them.
    """
    logging.getLogger("dvc").setLevel(logging.ERROR)  # it says of each process that was killed that it was
    with edit_rwlock(folder, localfs, False) as lock:
        drop_killed_builds(lock)
    with rwlock.rwlock(folder, localfs, BUILD, paths, [], False):
        yield


def drop_killed_builds(lock: dict) -> None:
    """Drop what builds have left in DVC's list that were killed: another process may have their number now, as in a new container."""
    for path, readers in list(lock["read"].items()):
        if left := [reader for reader in readers if reader["cmd"] != BUILD]:
            lock["read"][path] = left
        else:
            del lock["read"][path]


def load_once(load: Callable) -> Callable:
    """Of DVC's function that reads and checks a YAML file: once as long as the file is the same. DVC does it for each stage that is named."""
    kept: dict[tuple, tuple] = {}

    @functools.wraps(load)
    def loaded(self, **options: object) -> tuple:
        if options or self.repo.fs.protocol != "local":
            return load(self, **options)
        status = os.stat(self.path)  # noqa: PTH116
        mark = (self.path, status.st_ino, status.st_size, status.st_mtime_ns)
        if mark not in kept:
            kept[mark] = load(self)
        return copy.deepcopy(kept[mark])  # DVC changes what it has read

    return loaded


def without_symlinks(get_odb: Callable) -> Callable:
    """Of DVC's function that opens a cache: it links files by other means, whatever `cache.type` says.

    ONNX Runtime reads no weights behind a symbolic link, and a package has files alone.
    """

    @functools.wraps(get_odb)
    def opened(*place: object, **options: object):
        if "symlink" in (kinds := options.get("type") or []):
            options["type"] = list(dict.fromkeys([*(kind for kind in kinds if kind != "symlink"), "hardlink", "copy"]))
        return get_odb(*place, **options)

    return opened


@contextlib.contextmanager
def receipts_in(file: Path) -> Iterator[None]:
    """Let DVC, in this process, read its receipts from this file in the place of dvc.lock."""
    load = Lockfile._load

    def loaded(self, **options: object) -> tuple:
        other = copy.copy(self)
        other.path = str(file.absolute())
        return other._load_yaml(**options)

    if file.name != LOCK.name:
        Lockfile._load = loaded
    try:
        yield
    finally:
        Lockfile._load = load


def retry_sooner() -> None:
    """Let clients of Azure Blob wait about 4, 7 and 13 seconds between their tries, not 15, 18 and 24.

    A file that does not get through is tried eight times. With files that wait for each other a broken connection is reported after
    minutes; this halves them (docs/log.md).
    """
    from azure.storage.blob.aio import ExponentialRetry

    ExponentialRetry.__init__ = functools.partialmethod(ExponentialRetry.__init__, initial_backoff=4)


BUILD = "make; if it was killed, `make` again clears this"  # how DVC calls a build to others
atexit.unregister(colorama.initialise.reset_all)  # DVC's: it would end a terminal's last line with a code
RELINK = checkout._relink
checkout._relink = relink
_common._dump_data = dump
state._checksum = checksum
rwlock._edit_rwlock = edit_rwlock
FileMixin._load_yaml = load_once(FileMixin._load_yaml)
cachemgr.get_odb = without_symlinks(cachemgr.get_odb)

if __name__ == "__main__":
    cli.end_with(os.environ.get(cli.ENGINE, ""))
    if sys.argv[1:2] == ["commit"]:
        StageCache.save = refuse_replaced
        pending = Pending()
        _yaml._modify_data = pending.edit
        code = main(sys.argv[1:])
        pending.write()
        sys.exit(code)
    if sys.argv[1:2] in (["push"], ["pull"], ["fetch"]):
        retry_sooner()
    sys.exit(main(sys.argv[1:]))
