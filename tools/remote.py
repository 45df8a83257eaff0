"""Share data and everything that was built through Azure Blob, with DVC.

    python -m tools.remote add azure://container/path     make that the place to push to and pull from (a missing container is created)
    python -m tools.remote push                           upload what is recorded and not there yet
    python -m tools.remote pull                           download what is recorded, prove it, and tell Snakemake
    python -m tools.remote restore                        the same from DVC's cache on this disk, without a remote

`dvc push` and `dvc pull` do the same transfers. `push` and `pull` here say what is wrong with the account before anything moves, go on
after a broken connection a bounded number of times, and check: `push`, that every file lies there in its full size (DVC does not look); `pull`,
by `dvc status`, that every hash matches, and only then it records the outputs in Snakemake's own books, so that
`snakemake --cores all` has nothing to do and still notices every later change. Credentials come from the environment (docs/azure.md).
"""

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import PUBLIC_HALF, UserError
from slmake.plan import Plan
from slmake.platforms import dvc_yaml
from slmake.platforms.dvc import (
    cached,
    changed,
    damaged,
    dvc,
    entries,
    md5,
    note,
    objects,
    outs,
    reason,
    receipts,
    repair_lock,
    rotten,
    stages,
    status,
    tracked,
)
from slmake.platforms.dvc_remote import account_name, ensure_container, is_address, listed, place, stored, upload
from slmake.platforms.origins import PULLED, built_from, note_outputs
from slmake.platforms.screen import without_location
from slmake.platforms.user_data import edited, in_cache, kept_again, kept_by, recording, refuse_unshared, unkept
from tools import page

NAME = "storage"  # what the remote is called in .dvc/config
ATTEMPTS = 2  # runs of dvc; within each the Azure SDK tries every request four times, waiting longer each time
# Measured with bench/transfer.py (docs/azure.md): more files at a time than the default of 4 x cores help nothing.
SETTINGS = {"verify": "true", "jobs": "8"}


def add(url: str) -> None:
    """Make `url` the default remote, in .dvc/config, which holds no credential and belongs into Git.

    Raises:
        UserError: not of the form azure://container/path, or with a credential in it.
    """
    if not is_address(url):
        raise UserError(
            "the remote is not of the form azure://container/path (lower-case letters, digits and `-` in the container's name; no "
            "account, query or SAS). Example: make remote URL=azure://models/tones"
        )
    settings = dict(SETTINGS)
    if account := account_name():
        settings["account_name"] = account
    steps = [["remote", "add", "--force", "--default", NAME, url]]
    steps += [["remote", "modify", NAME, key, value] for key, value in settings.items()]
    for step in steps:
        done = dvc(*step)
        if done.returncode:
            raise UserError(f"dvc {' '.join(step)}: {reason(done.stderr)}")


def transfer(verb: str, job: cli.Job, *names: str) -> None:
    """`dvc push` or `dvc pull` of what some names stand for, or of everything; again after a failure that may pass.

    Raises:
        UserError: it failed ATTEMPTS times, or for a reason that stays.
    """
    from slmake.sources import blob

    for attempt in range(1, ATTEMPTS + 1):
        done = dvc(verb, *names)
        if done.returncode == 0:
            return
        text = blob.scrub(done.stderr)
        print(text, file=sys.stderr)
        if "No space left" in text or "Errno 28" in text:
            raise UserError(
                f"dvc {verb}: the disk is full. Free some space and run the same command again: what is here already is not moved again."
            )
        stored()  # says what is wrong with the account, the container or the network, if that is it
        if attempt < ATTEMPTS:
            job.say(f"dvc {verb} failed (attempt {attempt} of {ATTEMPTS}); going on with what is missing")
            time.sleep(2**attempt)
    raise UserError(
        f"dvc {verb} failed {ATTEMPTS} times: {reason(text)} Nothing was lost: run the same command again, it moves only what is missing."
    )


def push(job: cli.Job) -> None:
    """Upload, and check that everything that the receipts name lies there in its full size; what does not is uploaded again.

    `dvc push` takes the object of a folder for a proof that its files are there. It is not, where a blob was deleted or cut
    later, or where a file that two folders share failed: only the first folder counts as failed then. It passes over what is not here.

    Raises:
        UserError: see `transfer`; something recorded is whole neither here nor there; a user's data is not what was recorded; an
            object of the cache is damaged; or a blob is still not what it should be.
    """
    there = stored()  # says what is wrong with the account or the network before anything moves
    names = set(kept_by().values())
    if data := edited(status(*names)) if names else []:
        path, name = data[0]
        raise UserError(
            f"{path} is not what {name} recorded, so nothing was uploaded. `{recording(path, name)}` records it as it is, then `make`; or "
            "remove it, and `make restore` brings back what was recorded."
        )
    here = held(there)
    transfer("push", job)
    there = stored()
    if bad := [name for name, size in here.items() if there.get(name) != size]:
        upload(bad)
        job.say(f"of what DVC did not check, {len(bad)} blobs were missing or cut; they were uploaded again")
        there = stored()
        if bad := [name for name in bad if there.get(name) != here[name]]:
            raise UserError(f"{len(bad)} blobs there are not what was uploaded. Run the same command again.")
    _, container, path = place()
    job.say(
        f"azure://{container}/{path} holds {len(there)} files, {sum(there.values()) / 1e6:.0f} MB ({job.seconds():.0f} s)"
    )


def held(there: dict[str, int]) -> dict[str, int]:
    """Sizes in bytes of those objects in the local DVC cache that belong into the remote, by MD5. `there` has the remote's, from `stored`.

    Raises:
        UserError: one is damaged; or the cache and the remote together lack one, or have it cut.
    """
    kept = [out for out in tracked() if out["md5"] and out["shared"]]
    named = [(out, known(out, there)) for out in kept]
    here = {name: cached(name).stat().st_size for _, names in named for name in names if cached(name).is_file()}
    if bad := rotten(name for name, size in here.items() if there.get(name) != size):
        raise UserError(
            f"{cached(bad[0])} is damaged: it is not what its name says, so nothing was uploaded. Remove it, then `make restore` says which "
            "output has to be built again."
        )
    sizes = there | here
    for out, names in named:
        missing = {name for name in names if name not in sizes}
        size = sum(sizes.get(name, 0) for name in names if not name.endswith(".dir"))
        if missing or out["size"] not in (size, None):
            how = f"objects in neither: {len(missing)}" if missing else "the remote has it cut"
            raise UserError(
                f"{out['path']} is whole neither in DVC's cache here nor in the remote ({how}), so nothing was uploaded. "
                f"{kept_again(out)}; then the same command again."
            )
    return here


def known(out: dict, there: dict[str, int]) -> list[str]:
    """MD5 names of an output's objects (see `objects`), by a folder's list in the cache, or else in the remote, which has those `there`."""
    return objects(out["md5"], lambda name: listed(name) if name in there else None)


def pull(job: cli.Job) -> None:
    """Download, prove by content that everything is what was recorded, then record it as built in Snakemake's books.

    Raises:
        UserError: see `transfer`; or the receipts, the parameters and the files here do not agree.
    """
    there = stored()
    if not there:
        raise UserError("nothing is in the remote. Where it was built: `make push`.")
    refuse_before_overwriting(lambda names: transfer("pull", job, *names))
    refuse_deleting(there)
    transfer("pull", job)
    prove(job)


def restore(job: cli.Job) -> None:
    """Put back what DVC's cache, or Git, has of the recorded outputs, over what is here, then as `pull`.

    Raises:
        UserError: the cache lacks something; or the receipts, the parameters and the files here do not agree.
    """
    refuse_before_overwriting(put_back)
    put_back()
    take_from_git()
    prove(job)


def refuse_deleting(there: dict[str, int]) -> None:
    """Raise UserError for what is here and neither DVC's cache nor the remote has whole: DVC would delete such a folder, and then fail.

    Args:
        there: sizes in bytes of the remote's objects, by MD5, from `stored`.
    """
    for out in tracked():
        if not out["md5"] or not Path(out["path"]).exists():
            continue
        if any(name not in there and not cached(name).is_file() for name in known(out, there)):
            raise UserError(
                f"{out['path']}: neither DVC's cache on this disk nor the remote has all of it, so nothing was brought over what is here. "
                f"{kept_again(out)}."
            )


def refuse_without_key() -> None:
    """Raise UserError if the key that signs the package is not here: nothing could be proved, after all of it was downloaded."""
    plan = Plan(params.load("params.yaml"))
    for key in plan.signing_key if "package" in plan.stages else ():
        if not Path(key).is_file():
            raise UserError(
                f"package.signing_key: {key}: no such file, and nothing was brought or changed. {PUBLIC_HALF}"
            )


def put_back(names: Collection[str] = ()) -> None:
    """Let DVC put back what its cache has; it would first delete a folder of which the cache has lost something.

    Args:
        names: stages and `.dvc` files, as in `status`; all, if none is named.

    Raises:
        UserError: the cache lacks something.
    """
    kept = [out for out in tracked() if out["md5"] or out["stage"].endswith(".dvc")]
    kept = [out for out in kept if not names or out["stage"] in names]
    lost = [out for out in kept if out["md5"] and not in_cache(out) and Path(out["path"]).exists()]
    if targets := [out["path"] for out in kept if out not in lost]:
        done = dvc("checkout", "--force", *(targets if names or lost else ()), capture=True)
        if done.returncode:
            raise UserError(
                f"dvc checkout: {reason(done.stderr)} What the cache on this disk does not have, `make pull` brings from a remote, and `make` "
                "builds again."
            )
    if lost:
        first = min(lost, key=lambda out: dvc_yaml.is_ours(out["stage"], out))  # data before what can be built
        raise UserError(
            f"{first['path']} was left as it is, because DVC's cache on this disk does not have all of it; what the cache has was put back. "
            f"{kept_again(first)}. `make pull` brings it from a remote."
        )


def refuse_before_overwriting(bring: Callable[[Collection[str]], None]) -> None:
    """Bring dvc.yaml up to date; refuse where a build runs, or where what is edited, or of other parameters, code or data, would be lost.

    Args:
        bring: brings a user's data as it was recorded, by the names of what keeps it: dvc.yaml names the files that are in a folder.

    Raises:
        UserError: what takes the outputs' place would be refused.
    """
    if any(Path(".snakemake/locks").glob("*")):
        raise UserError("a build is running here. If it was killed: `.venv/bin/snakemake --unlock`, then again.")
    kept = kept_by()
    names = set(kept.values())
    found = status(*(() if any(":" in name for name in names) else names)) if names else {}  # DVC reads FILE:STAGE
    if data := unkept(found):
        path, name = data[0]
        raise UserError(
            f"{path} is not what {name} recorded, and DVC's cache does not have it as it is, so nothing was overwritten. "
            f"`{recording(path, name)}` keeps it. To drop it, remove it: then the same command brings back what was recorded."
        )
    refuse_unshared()
    if others := {name for path, name in edited(found) if Path(path).is_dir()}:
        refuse_other_inputs(kept, dvc_yaml.DIGESTS)
        bring(sorted(others))
    with contextlib.suppress(UserError):  # of what `make pull` has yet to bring; what is wrong else is said afterwards
        dvc_yaml.update()
    refuse_other_inputs(kept)


def refuse_other_inputs(kept: dict[str, str], *coming: str) -> None:
    """Raise UserError if outputs would be overwritten that may be of what is here now, and of other inputs than were recorded.

    Args:
        kept: users' data, as `kept_by` gives it.
        coming: paths of inputs that will be others when the data is as it was recorded.
    """
    found = status()
    made = {out["path"] for out in receipts()} | {path for stage in entries().values() for path in outs(stage)}
    # Data that is gone is brought back; else outputs may be of what it is now.
    made = (
        (made - kept.keys() - {dvc_yaml.DIGESTS}) | {path for path, name in kept.items() if name in found} | {*coming}
    )
    lost = [path for changes in found.values() for path, how in changed(changes, "outs").items() if how == "modified"]
    for stage, changes in found.items():
        deps = [dep for dep in changed(changes, "deps") if not made & {dep, *map(str, Path(dep).parents)}]
        if lost and deps:
            raise UserError(
                f"{stage} was recorded with other {', '.join(deps)} than are here, and {lost[0]} is not what was recorded, so no output was "
                "overwritten. Bring back what was there then, or run `make`: it builds of what is here."
            )


def take_from_git() -> None:
    """Put back the results that Git keeps, and not DVC's cache, where the last commit has what was recorded."""
    for out in (out for out in receipts() if out["path"] in dvc_yaml.METRICS):
        path = Path(out["path"])
        if path.is_file() and md5(path) == out["md5"]:
            continue
        committed = subprocess.run(["git", "show", f"HEAD:./{path}"], capture_output=True).stdout
        if hashlib.md5(committed).hexdigest() != out["md5"]:
            raise UserError(
                f"{path} is not what was recorded. Git keeps it, not DVC's cache, and the last commit has another. "
                f"`.venv/bin/snakemake --cores all --force {path}` evaluates again; then `make`."
            )
        outputs.replace(path, committed)


def prove(job: cli.Job) -> None:
    """Prove by content that everything is what was recorded, then record it as built in Snakemake's books.

    Raises:
        UserError: the receipts, the parameters and the files here do not agree, or something changed meanwhile.
    """
    dvc_yaml.update()
    compared, seen = built_from(Plan(params.load("params.yaml"))), files_here()
    # What a user's own stage makes of them, or of what they are made of, is no output that is recorded here.
    own = {dvc_yaml.CODE, *stages()}
    if found := [name for name in status() if name in own or name.endswith(".dvc")]:
        rules = [name for name in found if name != dvc_yaml.CODE] or found
        raise UserError(
            f"what was recorded is here, but {', '.join(rules)} would be built again: parameters, scripts or data here are not those it was "
            "built from. `dvc status` lists them; `dvc repro` or `make` rebuilds exactly these. Nothing was marked as up to date."
        )
    refuse_rotten()
    record(job, compared, seen)


def refuse_rotten() -> None:
    """Read every byte of the recorded outputs: DVC believes what it has linked from its cache, and an edit in place changes both.

    Damaged objects are removed from the cache, so that nobody gets them.

    Raises:
        UserError: a file is not what its receipt says.
    """
    wrong = damaged(made_here())
    if not wrong:
        return
    lost = rotten({right for _, _, right in wrong})
    for name in lost:
        cached(name).unlink()
    output, file, _ = wrong[0]
    known = f"{file} is not what its receipt says{', and DVC had no whole copy of it' if lost else ''}; nothing was marked as up to date."
    then = "`make pull`, or `make`: it is built again" if lost else "`make restore`"
    raise UserError(f"{known} `rm -r {output}`, then {then}.")


def made_here() -> list[str]:
    """The outputs of the stages that params.yaml asks for: all but what was published."""
    named = entries()
    return [path for stage in stages() for path in outs(named[stage])]


def files_here() -> dict[str, list[int]]:
    """Size and number of the inode of every output's files: `snakemake --touch` sets their times."""
    seen = outputs.marks(made_here())
    return {path: [mark[0], mark[3]] for path, mark in seen.items()}


def record(job: cli.Job, compared: str, seen: dict[str, list[int]]) -> None:
    """Let Snakemake note every output as made from the inputs and parameters of now. Only after the hashes were checked.

    Args:
        compared: what the receipts were compared with, as `built_from` gives it.
        seen: the outputs that were compared, as `files_here` gives them.
    """
    quiet = ["--quiet", "host", "progress", "rules"]  # all of it would hide errors, too
    command = [sys.executable, "-m", "snakemake", "--touch", "--forceall", "--cores", "1", *quiet, "--", *made_here()]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {PULLED: compared})
    if done.returncode:
        said = done.stdout + done.stderr
        lines = [line for line in said.splitlines() if not line.startswith("Using workflow specific profile")]
        raise UserError("\n".join(["snakemake --touch:", without_location("\n".join(lines))]))
    if files_here() != seen:
        raise UserError("an output was replaced while it was compared with its receipt: `make restore` compares again.")
    note_outputs()
    note()
    page.remove_stale(job.say)
    left = "nothing to do"
    if dvc_yaml.PUBLISH in Plan(params.load("params.yaml")).rules:
        left = "to publish it: no receipt says what is the latest model there"
    job.say(f"everything matches its receipt; `snakemake --cores all` has {left} ({job.seconds():.0f} s)")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="add|push|pull|restore")
    verbs.add_parser("add", help="set up the remote").add_argument("url", help="azure://container/path")
    verbs.add_parser("push", help="upload")
    verbs.add_parser("pull", help="download, prove, and tell Snakemake")
    verbs.add_parser("restore", help="the same from the cache on this disk")
    args = parser.parse_args(argv)
    with cli.job("remote") as job:
        if args.verb == "add":
            add(args.url)
            job.say(
                f"{args.url} is the remote now, in .dvc/config (commit that file); {ensure_container(args.url)}. "
                "Then `make push`; elsewhere `make pull`."
            )
        else:
            if repaired := repair_lock():
                job.say(repaired)
            if args.verb != "push":
                refuse_without_key()
            {"push": push, "pull": pull, "restore": restore}[args.verb](job)


if __name__ == "__main__":
    main()
