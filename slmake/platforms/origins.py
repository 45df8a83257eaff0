"""What outputs were built from, by Snakemake's records and DVC's receipts: nothing is built on others, and nothing is recorded of them."""

import base64
import contextlib
import hashlib
import json
import math
import os
import shlex
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from slmake import outputs, params
from slmake.errors import UserError
from slmake.plan import Plan
from slmake.platforms.dvc import (
    LOCK,
    NOTE,
    StatusError,
    changed,
    entries,
    now,
    outs,
    receipts,
    stages,
    status,
)
from slmake.platforms.dvc_yaml import DIGESTS, MEMBERS

PULLED = "SLMAKE_PULL"  # environment variable: what the outputs were compared with before they are noted as built, as `built_from` gives it
CANDIDATES = "build/search/"  # made one after the other, as many as are asked for
CLOCKS = 1.0  # seconds by which those of two machines may differ
SHOWS_ALL = {"package", "report", "publish"}
OTHER = "{} was built from other parameters, code or data than those that are here now; nothing was {}. Run `make`: it builds what changed."

ELSEWHERE = (
    "{0} was not built in {1}, where this run's rules run, and the package would name one environment for all; nothing was built. Run "
    "`make` or snakemake with the same profile (SNAKEMAKE_PROFILE): it builds everything again there."
)


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


def inputs_of(rules: Iterable[tuple[str, Iterable[str]]]) -> dict[str, set[str]]:
    """What each rule makes its outputs of that other rules have made, of pairs of its name and all of its inputs.

    Rules with wildcards count as the rule that gathers what they make, with which they have all inputs in common.
    """
    made_of: dict[str, set[str]] = {}
    for rule, paths in rules:
        made_of.setdefault(MEMBERS.get(rule, rule), set()).update(
            path
            for path in map(str, paths)
            if path.startswith(("build/", "results/")) and not path.startswith((DIGESTS, CANDIDATES))
        )
    return made_of


def inputs_by_dvc(named: dict[str, dict]) -> dict[str, set[str]]:
    """The same of the stages of dvc.yaml."""
    return inputs_of((name, stage.get("deps", [])) for name, stage in named.items())


def refuse_replaced(plan: Plan, made_of: dict[str, set[str]], rebuilt: Collection[str]) -> None:
    """Refuse to build on outputs that Snakemake has no record of, or of others, as `dvc repro`, `dvc checkout` or a copy leave them.

    Snakemake would take them for built from what is here now, and build a package that claims so.

    Args:
        made_of: other rules' outputs that a rule reads, by rule, as `inputs_of` gives them: of the rules that what is asked for needs.
        rebuilt: outputs that this run builds again.

    Raises:
        UserError: there is one, and its receipt does not say that it is of what is here now.
    """
    if not LOCK.exists():
        return
    named = entries()
    unknown: dict[str, str] = {}  # the first such output, by stage
    for stage in (name for name in plan.rules if name in named and name in made_of):
        for output in (output for output in outs(named[stage]) if output not in rebuilt and Path(output).exists()):
            record = metadata(output)
            if not record or (not outputs.as_built(output) and _is_of_now(plan, made_of, record, output)):
                unknown.setdefault(stage, output)
    if unknown:
        _refuse_changed(unknown, "nothing was built")
        # By content they are what their receipts say: DVC may have linked them anew.
        _note_proved(named, unknown)


def refuse_other_upstream(
    plan: Plan, made_of: dict[str, set[str]], running: Collection[str], rebuilt: Collection[str], image: str | None
) -> None:
    """Refuse to write what names all parameters, code and data (SHOWS_ALL) of outputs that were built from others.

    A package names the image that rules run in, too, so what it is made from must have been built in it.

    Snakemake builds those again, unless its options keep it from it; and DVC runs a rule alone, with `dvc repro -s`. Only what such a
    rule is made from counts: where a gate is missed, `make report` says why beside a package of the former build.

    Args:
        made_of: other rules' outputs that a rule reads, by rule, as `inputs_of` gives them.
        running: rules that this run executes.
        rebuilt: outputs that they write.
        image: the file of the image that they run in; None for the local environment.

    Raises:
        UserError: there is one.
    """
    showing = SHOWS_ALL & set(running)
    if not (showing and Path("dvc.yaml").exists()):  # a step of Azure ML has no dvc.yaml
        return
    named, moved, known, unknown = entries(), [], [], {}
    upstream = _upstream(named, made_of, showing)
    for stage in (name for name in plan.rules if name in upstream):
        for output in (output for output in outs(named[stage]) if output not in rebuilt):
            record, unmoved = metadata(output), outputs.as_built(output)
            if record and unmoved and not _is_of_now(plan, made_of, record, output):
                raise UserError(OTHER.format(output, "built"))
            if record and unmoved and "package" in showing and _was_elsewhere(record, image):
                raise UserError(ELSEWHERE.format(output, image or "the local environment"))
            (known if unmoved else moved).append(output)
            if not record and Path(output).exists():
                unknown.setdefault(stage, output)
    _refuse_older(named, known, "nothing was built")
    if unknown and not LOCK.exists():
        raise _unknown([*unknown.values()], "nothing was built")
    if unknown:  # as `dvc pull` brings them: DVC compares parameters, code and data
        _refuse_changed(unknown, "nothing was built")
    # Under DVC they may be the same, linked anew; else `refuse_replaced` has compared them.
    if "DVC_STAGE" in os.environ and (others := list(_other_than_recorded(moved))):
        raise UserError(OTHER.format(others[0][0], "built"))


def _upstream(named: dict[str, dict], made_of: dict[str, set[str]], rules: Collection[str]) -> set[str]:
    """The stages of dvc.yaml whose outputs some rules read, directly and through others; `publish` is a rule, but no stage."""
    made_by = {output: name for name, stage in named.items() for output in outs(stage)}
    upstream: set[str] = set()
    waiting = list(rules)
    while waiting:
        name = waiting.pop()
        deps = {*made_of.get(name, ()), *named.get(name, {}).get("deps", [])}
        new = {made_by[path] for path in deps if path in made_by} - upstream
        upstream |= new
        waiting += new
    return upstream


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
    known: list[str] = []
    unknown: dict[str, str] = {}  # the first output without record, by stage
    for stage in wanted:
        for output in outs(named[stage]):
            if metadata(output) and outputs.as_built(output):
                known.append(output)
            else:
                unknown.setdefault(stage, output)
    refuse_other_origin(known)
    _refuse_older(named, known, "nothing was recorded")
    recorded = {out["path"] for out in receipts()}
    # Of a copied project's files only sizes and times are known.
    copied = [path for path in known if path in recorded and outputs.is_copied(path)]
    if rotten := list(_other_than_recorded(copied)):
        raise _unknown([rotten[0][0]], "nothing was recorded")
    if unknown:
        _refuse_changed(unknown, "nothing was recorded")
    return known


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
        damaged = list(compared(damaged))
    if damaged:
        path, how, stage = damaged[0]
        raise UserError(
            f"{path} was {how} since {stage} built it; nothing was recorded. `make restore` brings back what was built, or remove {path} "
            "and run make: it is built again."
        )


def refuse_other_origin(known: list[str]) -> None:
    """Raise UserError if Snakemake's record of one of these outputs has other parameters, code or data than those that are here now."""
    current = of_now(known)
    for output in (output for output in known if output not in current):
        raise UserError(OTHER.format(output, "recorded"))


def _refuse_older(named: dict[str, dict], known: list[str], undone: str) -> None:
    """Raise UserError if, by Snakemake's records, an output was built before one that it is made from."""
    records = {output: metadata(output) for output in known}
    for stage in named.values():
        for output in (output for output in outs(stage) if records.get(output)):
            began = records[output]["starttime"] or math.inf
            for dep in (dep for dep in stage.get("deps", []) if records.get(dep)):
                if (records[dep]["endtime"] or 0) > began + CLOCKS:
                    raise UserError(
                        f"{output} was built before {dep}, which it is made from; {undone}. Run `make`: it builds what is older."
                    )


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
    kept -= {stage for _, _, stage in compared(lost)}
    doubtful = [unknown[stage] for stage in found if stage not in kept]
    if doubtful:
        raise _unknown(doubtful, undone)


def _unknown(paths: list[str], undone: str) -> UserError:
    """The error for outputs that neither a record nor a receipt explains."""
    return UserError(
        f"nothing says what {', '.join(paths)} {'was' if len(paths) == 1 else 'were'} built from; {undone}. `make restore` brings back what "
        f"was recorded, and `.venv/bin/snakemake --cores all --force {' '.join(paths)}` builds it again; then `make`."
    )


def compared(damaged: list[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """The damaged ones of some outputs: those that are "not in cache" (DVC did not look at them) are compared with their receipts.

    `dvc commit` puts an output that is what it was into the cache again.
    """
    yield from (entry for entry in damaged if entry[1] != "not in cache")
    unseen = {path: stage for path, how, stage in damaged if how == "not in cache"}
    yield from ((path, how, unseen[path]) for path, how in _other_than_recorded(unseen))


def _other_than_recorded(paths: Collection[str]) -> Iterator[tuple[str, str]]:
    """Those of some outputs whose content is not what their receipts say, and how it has changed.

    Outside of a repository there are no receipts to compare with, and `dvc commit` says what is wrong.
    """
    from dvc.exceptions import NotDvcRepoError

    from slmake.platforms.atomic_dvc import Repo

    with contextlib.suppress(NotDvcRepoError), Repo() if paths else contextlib.nullcontext() as repo:
        for path in paths:
            for out in repo.find_outs_by_path(path):
                try:
                    found = out.workspace_status()
                except FileNotFoundError:  # a link into a cache that is gone
                    found = {path: "deleted"}
                yield from ((path, how) for how in found.values())


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


def date_results() -> None:
    """Give single files the time again at which their rule wrote them, and no output one of the future: Snakemake goes by times.

    DVC puts a file of its cache in the place of one with the same content, and with it the time of an earlier build. Where the clock was
    put back, what is built on an output is older than it: Snakemake deletes that at the end of its rule.
    """
    now = time.time()
    for path in outputs.single_files():
        record = metadata(path.as_posix())
        began = record and (record["starttime"] or 0)
        if record and path.stat().st_mtime < began < now and outputs.as_built(path):
            os.utime(path, (record["endtime"], record["endtime"]))
    for path in [*outputs.single_files(), *Path("build").glob("*/.snakemake_timestamp")]:
        if path.stat().st_mtime > now:
            os.utime(path, (now, now))


def refuse_future(names: Iterable[str]) -> None:
    """Raise UserError for an input that is dated in the future: Snakemake would delete what is built of it at the end of its rule."""
    for name in names:
        stamp = os.path.join(name, ".snakemake_timestamp")  # noqa: PTH118 (hundreds of them)
        with contextlib.suppress(OSError):  # not made yet
            dated = os.stat(stamp if os.path.exists(stamp) else name).st_mtime  # noqa: PTH110, PTH116
            if dated > time.time() + CLOCKS:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(dated))
                raise UserError(
                    f"{name} is dated in the future ({when}), and Snakemake goes by times. `touch {shlex.quote(name)}` gives it today's; its "
                    "content stays, so nothing is built again for that."
                )


def of_now(paths: list[str]) -> list[str]:
    """Those of some outputs whose parameters, code, data and inputs, by Snakemake's record of them, are those that are here now."""
    plan, made_of = Plan(params.load("params.yaml")), inputs_by_dvc(entries())
    return [path for path in paths if (record := metadata(path)) and _is_of_now(plan, made_of, record, path)]


def _is_of_now(plan: Plan, made_of: dict[str, set[str]], record: dict, output: str) -> bool:
    """Whether Snakemake's record of an output has the parameters, code and data that are here now, and the inputs that its rule has now."""
    rule = record["rule"]
    [(stage, inputs)] = inputs_of([(rule, record["input"])]).items()
    gathered = stage in MEMBERS.values()  # each of its jobs reads a part of what the stage reads
    if stage in made_of and not (inputs <= made_of[stage] if gathered else inputs == made_of[stage]):
        return False
    return {repr(text) for text in plan.built_from(rule, output)} <= set(record["params"])


def _was_elsewhere(record: dict, image: str | None) -> bool:
    """Whether, by Snakemake's record of an output, it was built in another image, or in none where there is one now."""
    stack = record.get("software_stack_hash")  # MD5 of the image's name, of nothing in the local environment
    return stack is not None and stack != hashlib.md5((image or "").encode(), usedforsecurity=False).hexdigest()


def metadata(output: str) -> dict | None:
    """What Snakemake recorded of an output when it was built: `rule`, `params` and more; None if it has no record."""
    name = base64.b64encode(output.encode()).decode()
    try:
        record = json.loads((Path(".snakemake/metadata") / name).read_text(encoding="utf-8"))
        return record if record["rule"] and record["params"] is not None and record["input"] is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
