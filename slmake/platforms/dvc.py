"""DVC as this project uses it: its command line, the receipts in dvc.lock, and what they say of the files here."""

import base64
import functools
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.plan import WITHOUT_PACKAGE, Plan

LOCK = Path("dvc.lock")
NOTE = Path(".dvc/tmp/slmake.json")  # what the last record saw: the receipts' sum, and when each rule had run
KEPT = Path(".dvc/tmp/slmake.lock")  # the receipts of the last record
PULLED = "SLMAKE_PULL"  # environment variable: what the outputs were compared with before they are noted as built, as `built_from` gives it
CLOCKS = 1.0  # seconds by which those of two machines may differ
PENDING = Path(".dvc/tmp/slmake.pending.lock")  # receipts that `dvc commit` wrote, until they are compared again
OTHER = "{} was built from other parameters, code or data than those that are here now; nothing was {}. Run `make`: it builds what changed."


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


def reason(done: subprocess.CompletedProcess) -> str:
    """DVC's own reason for a failure, one sentence; with the first name of a list that stands below it."""
    lines = [line.strip() for line in (done.stderr or "").splitlines() if line.strip()] or ["no reason given"]
    errors = [number for number, line in enumerate(lines) if line.startswith("ERROR")]
    said = lines[errors[-1]] if errors else lines[-1]
    if cli.FULL in said:
        return "the disk is full. Free some space and run the same command again; nothing is lost."
    if said.endswith(":"):
        said = " ".join([said, *lines[errors[-1] + 1 :][:1]])
    return re.sub(r"^ERROR: |\x1b\[[0-9;]*m", "", said).rstrip(".:") + "."


def entries() -> dict[str, dict]:
    """The stages of dvc.yaml by name.

    Raises:
        UserError: it is not there, or damaged.
    """
    import yaml

    try:
        return dict(yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"])
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        raise UserError("dvc.yaml cannot be read. `make docs` writes it anew.") from None


def status(*names: str) -> dict[str, list[str | dict]]:
    """What `dvc status` finds changed, by stage; of all stages, if none is named.

    Raises:
        StatusError: it fails.
    """
    done = dvc("status", "--json", *names, capture=True)
    if done.returncode:
        raise StatusError(f"dvc status: {reason(done)}")
    return json.loads(done.stdout or "{}")


def changed(changes: list[str | dict], kind: str) -> dict[str, str]:
    """How the `outs` or the `deps` of a stage have changed, by path, of what `status` gives for the stage."""
    merged: dict[str, str] = {}
    for change in changes:
        if isinstance(change, dict):
            merged |= change.get(f"changed {kind}", {})
    return merged


def stages() -> list[str]:
    """The stages of dvc.yaml that params.yaml asks for."""
    named = entries()
    return [name for name in named if name in Plan(params.load("params.yaml")).rules]


def refuse_other_sources(plan: Plan) -> None:
    """Raise UserError if DVC runs this rule by a dvc.yaml that does not watch the files that params.yaml names."""
    if "DVC_STAGE" not in os.environ:
        return
    stages = entries()
    watched = {path for stage in stages.values() for path in stage.get("deps", [])}
    for file in (file for rule in plan.rules for file in plan.named(rule)):
        if file not in watched:
            raise UserError(
                f"dvc.yaml does not watch {file}, which params.yaml names. `make docs` writes dvc.yaml anew (`make` does it by itself)."
            )


def built_from(plan: Plan) -> str:
    """Digest of all parameters, code and data of a plan, 64 hex digits."""
    rules = [rule for rule in plan.rules if rule != "candidate"]  # what it depends on, search does, too
    parts = [text for rule in rules for text in (rule, plan.section(rule), plan.digest(rule))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def refuse_other_than_pulled(plan: Plan) -> None:
    """Raise UserError if outputs are to be noted as built from what is here now, and were compared with something else."""
    if PULLED in os.environ and os.environ[PULLED] != built_from(plan):
        raise UserError(
            "parameters, code or data changed while the outputs were compared; nothing was marked as up to date."
        )


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
    return [path for out in stage["outs"] for path in ([out] if isinstance(out, str) else out)]


def refuse_replaced(plan: Plan, rebuilt: Collection[str]) -> None:
    """Refuse to build on outputs that Snakemake has no record of, or of others, as `dvc repro`, `dvc checkout` or a copy leave them.

    Snakemake would take them for built from what is here now, and build a package that claims so.

    Args:
        rebuilt: outputs that this run builds again.

    Raises:
        UserError: there is one, and its receipt does not say that it is of what is here now.
    """
    if not LOCK.exists():
        return
    named = entries()
    unknown: dict[str, str] = {}  # the first such output, by stage
    for stage in (name for name in plan.rules if name in named):
        for output in (output for output in outs(named[stage]) if output not in rebuilt and Path(output).exists()):
            record = metadata(output)
            if not record or (not outputs.as_built(output) and _is_of_now(plan, record, output)):
                unknown.setdefault(stage, output)
    if unknown:
        _refuse_changed(unknown, "nothing was built")
        # By content they are what their receipts say: DVC may have linked them anew.
        _note_proved(named, unknown)


def refuse_other_upstream(plan: Plan, running: Collection[str], rebuilt: Collection[str]) -> None:
    """Refuse to write a package or a report, which name all parameters, code and data, beside outputs that were built from others.

    Snakemake builds those again, unless its options keep it from it; and DVC runs a rule alone, with `dvc repro -s`.

    Args:
        running: rules that this run executes.
        rebuilt: outputs that they write.

    Raises:
        UserError: there is one.
    """
    named, doubtful = entries(), []
    if not {"package", "report"} & set(running):
        return
    for stage in (name for name in plan.rules if name in named and name not in WITHOUT_PACKAGE):
        for output in (output for output in outs(named[stage]) if output not in rebuilt):
            record = metadata(output)
            if record and outputs.as_built(output) and not _is_of_now(plan, record, output):
                raise UserError(OTHER.format(output, "built"))
            if "DVC_STAGE" in os.environ and not outputs.as_built(
                output
            ):  # DVC may have linked it anew; or it is another
                doubtful.append((output, "not in cache", stage))
    for path, _, _ in _compared(doubtful):
        raise UserError(OTHER.format(path, "built"))


def _is_of_now(plan: Plan, record: dict, output: str) -> bool:
    """Whether Snakemake's record of an output has the parameters, code and data that are here now."""
    return {repr(text) for text in plan.built_from(record["rule"], output)} <= set(record["params"])


def refuse_unbuilt(wanted: list[str]) -> list[str]:
    """Compare every output's parameters, code and data, as Snakemake recorded them when it was built, with those of now.

    An output that Snakemake has no record of, or that is another file since, counts as built from what its receipt says; then its stage
    must be up to date for DVC.

    Returns:
        The outputs that Snakemake has a record of.

    Raises:
        UserError: an output is not of what is here now, so a receipt would claim what is not so.
    """
    named = entries()
    recorded = {out["path"] for out in receipts()}
    known: list[str] = []
    unknown: dict[str, str] = {}  # the first output without record, by stage
    for stage in wanted:
        for output in outs(named[stage]):
            # Of a copied project's files only sizes and times are known.
            if metadata(output) and outputs.as_built(output) and not (outputs.is_copied(output) and output in recorded):
                known.append(output)
            else:
                unknown.setdefault(stage, output)
    refuse_other_origin(known)
    _refuse_older(named, known)
    if unknown:
        _refuse_changed(unknown, "nothing was recorded")
    return known


def refuse_other_origin(known: list[str]) -> None:
    """Raise UserError if Snakemake's record of one of these outputs has other parameters, code or data than those that are here now."""
    current = of_now(known)
    for output in (output for output in known if output not in current):
        raise UserError(OTHER.format(output, "recorded"))


def _refuse_older(named: dict[str, dict], known: list[str]) -> None:
    """Raise UserError if, by Snakemake's records, an output was built before one that it is made from."""
    records = {output: metadata(output) for output in known}
    for stage in named.values():
        for output in (output for output in outs(stage) if records.get(output)):
            began = records[output]["starttime"] or math.inf
            for dep in (dep for dep in stage.get("deps", []) if records.get(dep)):
                if (records[dep]["endtime"] or 0) > began + CLOCKS:
                    raise UserError(
                        f"{output} was built before {dep}, which it is made from; nothing was recorded. Run `make`: it builds what is older."
                    )


def note_outputs() -> None:
    """Note every output as what Snakemake has a record of: it was proved to be what its receipt says."""
    _note_proved(entries(), stages())


def _note_proved(named: dict[str, dict], proved: Iterable[str]) -> None:
    """Note the outputs of some stages as built; where they are not those of the rule's last run here, its benchmark is not theirs."""
    for stage in proved:
        paths = [path for path in outs(named[stage]) if Path(path).exists()]
        if not all(map(outputs.as_built, paths)):
            Path(f"benchmarks/{stage}.tsv").unlink(missing_ok=True)
        outputs.note_built(paths)


def of_now(paths: list[str]) -> list[str]:
    """Those of some outputs whose parameters, code and data, by Snakemake's record of them, are those that are here now."""
    plan = Plan(params.load("params.yaml"))
    return [path for path in paths if (record := metadata(path)) and _is_of_now(plan, record, path)]


def _refuse_changed(unknown: dict[str, str], undone: str) -> None:
    """Raise UserError if DVC finds one of some stages changed; `unknown` has an output of each by name.

    What its cache has lost is compared with its receipt.
    """
    try:
        found = status(*unknown)
    except StatusError as error:
        raise UserError(f"{error} {undone[0].upper()}{undone[1:]}.") from None
    lost = [(path, how, stage) for stage in found for path, how in changed(found[stage], "outs").items()]
    kept = {
        stage
        for stage in found
        if all(isinstance(change, dict) and "changed outs" in change for change in found[stage])
    }
    kept -= {stage for _, _, stage in _compared(lost)}
    doubtful = [unknown[stage] for stage in found if stage not in kept]
    if doubtful:
        raise UserError(
            f"nothing says what {', '.join(doubtful)} {'was' if len(doubtful) == 1 else 'were'} built from; {undone}. `make restore` brings "
            f"back what was recorded, and `.venv/bin/snakemake --cores all --force {' '.join(doubtful)}` builds it again; then `make`."
        )


def metadata(output: str) -> dict | None:
    """What Snakemake recorded of an output when it was built: `rule`, `params` and more; None if it has no record."""
    name = base64.b64encode(output.encode()).decode()
    try:
        record = json.loads((Path(".snakemake/metadata") / name).read_text(encoding="utf-8"))
        return record if record["rule"] and record["params"] is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def date_results() -> None:
    """Give single files the time again at which their rule wrote them: Snakemake goes by times.

    DVC puts a file of its cache in the place of one with the same content, and with it the time of an earlier build.
    """
    for path in outputs.single_files():
        record = metadata(path.as_posix())
        if record and path.stat().st_mtime < (record["starttime"] or 0) and outputs.as_built(path):
            os.utime(path, (record["endtime"], record["endtime"]))


def refuse_damaged(wanted: list[str]) -> None:
    """Compare what was not built since the last record with its receipt.

    Raises:
        UserError: it is not what it was.
    """
    try:
        before, present = json.loads(NOTE.read_text(encoding="utf-8")), now()
    except (OSError, ValueError):
        return
    if before["lock"] != present["lock"]:
        return  # the receipts are of another build, or DVC ran the rules itself
    kept = [name for name in wanted if before["ran"].get(name) == present["ran"].get(name)]
    try:
        found = status(*kept) if kept else {}
    except StatusError:  # `dvc commit` says what is wrong
        return
    damaged = [(path, how, stage) for stage in found for path, how in changed(found[stage], "outs").items()]
    if any(how == "not in cache" for _, how, _ in damaged):
        damaged = list(_compared(damaged))
    if damaged:
        path, how, stage = damaged[0]
        raise UserError(
            f"{path} was {how} since {stage} built it; nothing was recorded. `make restore` brings back what was built, or remove {path} "
            "and run make: it is built again."
        )


def _compared(damaged: list[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """The damaged ones of some outputs: those that are "not in cache" (DVC did not look at them) are compared with their receipts.

    `dvc commit` puts an output that is what it was into the cache again.
    """
    from slmake.platforms.atomic_dvc import Repo

    with Repo() as repo:
        for path, how, stage in damaged:
            if how != "not in cache":
                yield path, how, stage
                continue
            for out in repo.find_outs_by_path(path):
                for changed in out.workspace_status().values():
                    yield path, changed, stage


def receipts() -> list[dict]:
    """What the receipts say of every output that DVC keeps: `path` and `md5` (32 hex digits, `.dir` behind those of folders).

    Raises:
        UserError: a file of receipts is damaged.
    """
    import yaml

    outs = []
    for path in filter(Path.is_file, [Path("dvc.lock"), *Path().glob("*.dvc"), *Path("data").rglob("*.dvc")]):
        try:
            receipt = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (ValueError, yaml.YAMLError):
            raise UserError(f"{path} is damaged. Bring it back with `git checkout {path}`.") from None
        for stage in [receipt, *receipt.get("stages", {}).values()]:  # paths are relative to the file that names them
            outs += [
                out | {"path": (path.parent / out["path"]).as_posix()} for out in stage.get("outs", []) if "md5" in out
            ]
    return outs


def recorded() -> dict[str, int]:
    """Bytes of every object that the receipts name and DVC's cache here holds, by its MD5 as in `stored`."""
    found: dict[str, int] = {}
    for name in (out["md5"] for out in receipts()):
        members = json.loads(cached(name).read_bytes()) if name.endswith(".dir") and cached(name).is_file() else []
        for md5 in [name, *(entry["md5"] for entry in members)]:
            if cached(md5).is_file():
                found[md5] = cached(md5).stat().st_size
    return found


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

    try:
        with Repo() as repo:
            return Path(repo.cache.local.path)
    except NotDvcRepoError:
        return Path(".dvc/cache/files/md5")


def cached(md5: str) -> Path:
    """Where the cache keeps an object, if it has it."""
    return cache() / md5[:2] / md5[2:]
