"""Whether a file has moved since the last record, by sizes, times and inodes: if none has, there is nothing to hash or to record."""

import json
import os
from pathlib import Path

from slmake import outputs, params
from slmake.code_inputs import snakefiles
from slmake.errors import UserError
from slmake.plan import Plan, when
from slmake.platforms import dvc, dvc_yaml, origins

SEEN = Path(".dvc/tmp/slmake.seen.json")
# The workflow's own profile is what Snakemake reads by itself, whichever of these is there.
PROFILES = tuple(f"profiles/default/config{version}.yaml" for version in ("", ".v8+", ".v9+"))
SETTINGS = ("params.yaml", "dvc.yaml", "dvc.lock", ".dvcignore", ".dvc/config", ".dvc/config.local", *PROFILES)


def unmoved() -> bool:
    """Whether all files are as `remember` saw them, DVC's cache still has what it had, and params.yaml names no other file.

    Of a folder or a pattern there may be more files than there were, and of what a user's file imports, too.
    """
    try:
        seen = json.loads(SEEN.read_text(encoding="utf-8"))
        if outputs.marks(seen["paths"]) != seen["marks"] or not all(map(os.path.exists, seen["objects"])):
            return False
        plan = Plan(params.load("params.yaml"))
    except (OSError, ValueError, UserError):
        return False
    named = {file for rule in plan.rules for file in plan.named(rule)}
    known = {*named, *(plan.materials() if "package" in plan.rules else [])} <= set(seen["paths"])
    return known and plan.account == seen.get("account", "")


def remember(wanted: list[str]) -> None:
    """Note the files of these stages, if DVC finds by content that they are what the receipts say, and none moves meanwhile."""
    names, plan = [dvc_yaml.CODE, *wanted], Plan(params.load("params.yaml"))
    named = dvc.entries()
    entries = [entry for name in names for entry in (*named[name]["deps"], *named[name]["outs"])]
    paths = [
        *SETTINGS,
        *map(str, snakefiles()),
        *sorted({path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)}),
        *when(dvc_yaml.PUBLISH in plan.rules, dvc.RELEASED),
    ]
    seen = outputs.marks(paths)
    try:
        changed = dvc.status(*names)
    except dvc.StatusError:  # another DVC is at work: the next record compares again
        return
    if not changed and outputs.marks(paths) == seen:
        outputs.note_built(origins.of_now([out for name in wanted for out in dvc.outs(named[name])]))
        objects = [str(dvc.cached(md5)) for md5 in dvc.recorded()]
        noted = {"paths": paths, "marks": seen, "objects": objects, "account": plan.account}
        outputs.replace(SEEN, json.dumps(noted).encode())
