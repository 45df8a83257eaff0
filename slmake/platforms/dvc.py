"""DVC as this project uses it: its command line, and the receipts in dvc.lock."""

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.plan import Plan

LOCK = Path("dvc.lock")
NOTE = Path(".dvc/tmp/slmake.json")  # what the last record saw: the receipts' sum, and when each rule had run
KEPT = Path(".dvc/tmp/slmake.lock")  # the receipts of the last record
RELEASED = "results/published.json"  # no output that DVC keeps: it would bring it back where nothing was published
BUILDING = Path(".dvc/tmp/slmake.building")  # held by the build that runs
PENDING = Path(".dvc/tmp/slmake.pending.lock")  # receipts that `dvc commit` wrote, until they are compared again


class StatusError(UserError):
    """`dvc status` fails."""


def dvc(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess:
    """Run DVC of this environment; its progress bars go to the terminal, its errors are kept. It ends when this process is killed."""
    command = [sys.executable, "-m", "slmake.platforms.atomic_dvc", *arguments]
    return subprocess.run(
        command,
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {cli.ENGINE: cli.engine()},
    )


def reason(shown: str | None) -> str:
    """DVC's own reason for a failure, one sentence, of what it shows; with the first name of a list that stands below it."""
    lines = [line.strip() for line in (shown or "").splitlines() if line.strip()] or ["no reason given"]
    errors = [number for number, line in enumerate(lines) if line.startswith("ERROR")]
    said, *below = lines[errors[-1] if errors else -1 :]
    if cli.FULL in said:
        return "the disk is full. Free some space and run the same command again; nothing is lost."
    if said.endswith(":"):
        said = " ".join([said, *below[:1]])
    return re.sub(r"^ERROR: |\x1b\[[0-9;]*m", "", said).rstrip(".:") + "."


def entries() -> dict[str, dict]:
    """The stages of dvc.yaml by name.

    Raises:
        UserError: it is not there, or damaged.
    """
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C: it is read at every start
        return dict(yaml.load(Path("dvc.yaml").read_text(encoding="utf-8"), loader)["stages"])
    except (OSError, KeyError):
        raise UserError("dvc.yaml is not there, or has no stages. `make docs` writes it anew.") from None
    except (ValueError, yaml.YAMLError, TypeError) as error:
        raise unreadable(error) from None


def unreadable(error: Exception) -> UserError:
    """What to do about a dvc.yaml that cannot be read: only its user knows what they added."""
    return UserError(
        f"dvc.yaml cannot be read: {' '.join(str(error).split())[:200]}. Correct it; `git diff dvc.yaml` shows what changed. Where "
        "none of its stages is yours, remove it: `make docs` writes it anew."
    )


def status(*names: str, receipts: Path = LOCK) -> dict[str, list[str | dict]]:
    """What `dvc status` finds changed, by stage; of all stages, if none is named. Digests of code are those of now.

    Args:
        receipts: what is compared with, in the place of dvc.lock.

    Raises:
        StatusError: it fails.
    """
    from slmake.platforms import dvc_yaml
    from slmake.platforms.atomic_dvc import Repo, receipts_in

    if Path(dvc_yaml.DIGESTS).is_dir():  # as DVC brings them from its cache, they may be of other code
        dvc_yaml.write_digests()
    try:
        with receipts_in(receipts), Repo() as repo:
            # An import is what its .dvc file says, until `dvc update`: its origin is not asked.
            return repo.status(targets=list(names) or None, check_updates=False)
    except Exception as error:  # as DVC's own command line: of whatever kind, it has one reason
        raise StatusError(f"dvc status: {reason(f'ERROR: {error}')}") from None


def changed(changes: list[str | dict], kind: str) -> dict[str, str]:
    """How the `outs` or the `deps` of a stage have changed, by path, of what `status` gives for the stage."""
    merged: dict[str, str] = {}
    for change in changes:
        if isinstance(change, dict):
            merged |= change.get(f"changed {kind}", {})
    return merged


def stages() -> list[str]:
    """The stages of dvc.yaml that params.yaml asks for."""
    rules = Plan(params.load("params.yaml")).rules
    return [name for name in entries() if name in rules]


def now() -> dict:
    """The sum of the receipts, and the time of every rule's last run: Snakemake writes its benchmark then."""
    ran = {path.stem: path.stat().st_mtime_ns for path in sorted(Path("benchmarks").glob("*.tsv"))}
    return {"lock": outputs.sha256(LOCK) if LOCK.exists() else None, "ran": ran}


def note() -> None:
    """Remember that what is here now is what the receipts say."""
    NOTE.parent.mkdir(parents=True, exist_ok=True)
    outputs.replace(NOTE, json.dumps(now()).encode())
    outputs.replace(KEPT, LOCK.read_bytes())


def repair_lock() -> str | None:
    """Bring back the receipts of the last record where dvc.lock was cut, as a killed `dvc repro` leaves it; says so, if it did.

    Raises:
        UserError: it was cut, and there are no others.
    """
    import yaml

    if not LOCK.exists():
        return None
    if b"\n<<<<<<< " in LOCK.read_bytes():
        raise UserError(
            f"{LOCK} has the marks of a conflict. Take one side, `git checkout --ours {LOCK}` or `--theirs`; then `make restore`, or `make`."
        )
    try:
        stages = yaml.safe_load(LOCK.read_text(encoding="utf-8"))["stages"]
        whole = all(stage["cmd"] for stage in stages.values())
    except (yaml.YAMLError, AttributeError, TypeError, KeyError):
        whole = False
    if not whole:
        if not KEPT.is_file():
            raise UserError(f"{LOCK} is damaged. Bring it back with `git checkout {LOCK}`, then `make`.")
        outputs.replace(LOCK, KEPT.read_bytes())
        return f"{LOCK} was damaged; it is again what was recorded last"
    return None


def outs(stage: dict) -> list[str]:
    """Paths of a stage's outputs, by its entry in dvc.yaml."""
    return [path for out in stage.get("outs", []) for path in ([out] if isinstance(out, str) else out)]


def made() -> list[str]:
    """The outputs of all stages; none where dvc.yaml cannot be read."""
    try:
        return [path for stage in entries().values() for path in outs(stage)]
    except UserError:
        return []


def receipts() -> list[dict]:
    """What dvc.lock says of every output: `path`, and `md5` (32 hex digits, `.dir` behind those of folders).

    Raises:
        UserError: it is damaged.
    """
    import yaml

    try:
        receipt = yaml.safe_load(LOCK.read_text(encoding="utf-8")) if LOCK.is_file() else None
    except (ValueError, yaml.YAMLError):
        raise UserError(f"{LOCK} is damaged. Bring it back with `git checkout {LOCK}`.") from None
    stages = (receipt or {}).get("stages", {}).values()
    # What an earlier version recorded of a release can be brought back by nothing.
    return [out for stage in stages for out in stage.get("outs", []) if "md5" in out and out["path"] != RELEASED]


def tracked() -> list[dict]:
    """Every output and file of data whose content DVC keeps, in whatever folder it is named; DVC's own list, without what Git keeps.

    Returns:
        Of each its `path`, `stage` (as in `status`: a stage or a `.dvc` file), the stage's `cmd`, and, as it was recorded, `md5` (as in
        `receipts`) and `size` in bytes; what is not known is None. `shared`: whether `dvc push` brings it to the default remote;
        `only_here`: whether it is in no remote, and DVC has no other origin of it.

    Raises:
        StatusError: DVC cannot read a stage or a `.dvc` file.
    """
    from slmake.platforms.atomic_dvc import Repo

    try:
        with Repo() as repo:
            remotes = (None, repo.config["core"].get("remote"))
            return [
                {
                    "path": str(out),
                    "stage": out.stage.addressing,
                    "cmd": out.stage.cmd,
                    "md5": out.hash_info.value if out.hash_info.name == "md5" else None,
                    "size": out.meta.size,
                    "shared": out.can_push and not out.stage.is_repo_import and out.remote in remotes,
                    "only_here": not out.can_push and not out.stage.is_import,
                }
                for out in repo.index.outs
                if out.use_cache
            ]
    except Exception as error:  # as in `status`
        raise StatusError(f"dvc: {reason(f'ERROR: {error}')}") from None


def objects(name: str, elsewhere: Callable[[str], bytes | None] = lambda name: None) -> list[str]:
    """MD5 names of an output's objects: the output itself and, for a folder, each of its files (repeated if it holds copies).

    Args:
        elsewhere: gives a folder's list of files that the cache lacks; None: its files are not known.

    Raises:
        UserError: a folder's list is damaged.
    """
    if not name.endswith(".dir"):
        return [name]
    content = cached(name).read_bytes() if cached(name).is_file() else elsewhere(name)
    try:
        return [name, *(entry["md5"] for entry in json.loads(content or b"[]"))]
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{cached(name)} is damaged: it is not what its name says. Remove it; `make` and `make pull` bring it again."
        ) from None


def recorded() -> list[str]:
    """Every object that the receipts name and DVC's cache here holds, by its MD5 as in `receipts`."""
    names = dict.fromkeys(name for out in receipts() for name in objects(out["md5"]))
    return [name for name in names if cached(name).is_file()]


def rotten(names: Iterable[str]) -> list[str]:
    """Objects of the cache whose content is not what their names say; DVC itself believes every object that may not be written."""
    return [name for name in names if cached(name).is_file() and md5(cached(name)) != name.removesuffix(".dir")]


def damaged(paths: Collection[str]) -> list[tuple[str, Path, str]]:
    """Files of outputs whose content is not what the receipts say: output, file, and the MD5 that it should have; every byte is read.

    Folders whose list of files the cache has lost are left out.
    """
    wrong = []
    for out in (out for out in receipts() if out["path"] in paths):
        name, path, lists = out["md5"], Path(out["path"]), cached(out["md5"])
        files = {path: name}
        if name.endswith(".dir"):
            members = json.loads(lists.read_bytes()) if lists.is_file() else []
            files = {path / member["relpath"]: member["md5"] for member in members}
        wrong += [(out["path"], file, sum_) for file, sum_ in files.items() if not file.is_file() or md5(file) != sum_]
    return wrong


def md5(path: Path) -> str:
    """MD5 of a file, 32 hex digits, as DVC's receipts have it."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "md5").hexdigest()


def lost() -> list[str]:
    """Outputs that were recorded and are not here any more, but in DVC's cache: Snakemake deletes a rule's former output first."""
    try:
        kept = receipts()
    except UserError:  # the next record says so
        return []
    return [out["path"] for out in kept if not Path(out["path"]).exists() and cached(out["md5"]).is_file()]


@functools.cache
def cache() -> Path:
    """The folder of DVC's cache that holds objects by their MD5."""
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:
        with Repo() as repo:
            return Path(repo.cache.local.path)
    except (NotDvcRepoError, SCMError):  # a copy of the project has no Git
        return Path(".dvc/cache/files/md5")


def cached(md5: str) -> Path:
    """Where the cache keeps an object, if it has it."""
    return cache() / md5[:2] / md5[2:]
