"""Record what was built with DVC, and keep the times by which Snakemake knows it.

    python -m tools.record

Only the stages that params.yaml asks for are recorded. What changed although its rule did not run since the last record is damaged:
it is named, and no receipt is touched. Where no file has moved since the last record, nothing is hashed.

`dvc commit` puts a file of its cache in the place of one that was built. Where the same content was built before, that is the
old file with its old time, and Snakemake would take it for older than what it was made from, and build again at every call.
"""

import argparse
import os
from pathlib import Path

from slmake import cli, outputs
from slmake.code_inputs import remember
from slmake.errors import UserError
from slmake.outputs import break_readonly_hardlinks
from slmake.platforms import dvc_yaml, unmoved
from slmake.platforms.dvc import (
    LOCK,
    PENDING,
    dvc,
    entries,
    note,
    outs,
    reason,
    repair_lock,
    stages,
    status,
)
from slmake.platforms.origins import metadata, refuse_damaged, refuse_other_origin, refuse_unbuilt
from slmake.sources.fetching import files_of

RECORDING = Path(".dvc/tmp/slmake.recording")
# What this project's .dvcignore has.
IGNORED = {".snakemake", ".snakemake_timestamp", ".venv", "build/checkpoints", "*.partial", "__pycache__"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    with cli.job("record") as job, outputs.alone(RECORDING, wait=True):
        if unmoved.unmoved():
            return
        if repaired := repair_lock():
            job.say(repaired)
        dvc_yaml.update()
        wanted = stages()
        dvc_yaml.write_digests()
        refuse_ignored()
        refuse_damaged(wanted)
        known = refuse_unbuilt(wanted)
        records = [metadata(output) for output in known]
        files = [path for folder in ("results", "build") for path in Path(folder).rglob("*") if path.is_file()]
        times = {path: path.stat().st_mtime_ns for path in files}
        done = dvc("commit", "--force", dvc_yaml.CODE, *wanted, capture=True)
        for path, time in times.items():
            if path.exists() and path.stat().st_mtime_ns != time:
                os.utime(path, ns=(time, time))
        if done.returncode:
            raise UserError(
                f"everything was built, but DVC could not record it: {reason(done.stderr)} Then `.venv/bin/python -m tools.record`."
            )
        refuse_other_origin(known)  # what was hashed is of what was compared before
        if [metadata(output) for output in known] != records:
            raise UserError(
                "another build wrote outputs while they were recorded; nothing was recorded. Run `make` again."
            )
        edited = status(dvc_yaml.CODE, *wanted, receipts=PENDING)  # an input that was another while it was hashed
        if edited:
            what = next(name for name in [*edited, None] if name != dvc_yaml.CODE)
            raise UserError(
                f"an input of {what or 'the stages'} was edited while they were recorded; nothing was recorded. Run `make` again."
            )
        os.replace(PENDING, LOCK)
        note()
        break_readonly_hardlinks()  # as the Snakefile does: so that the next build finds all of them where they are now
        remember()
        unmoved.remember(wanted)


def refuse_ignored() -> None:
    """Raise UserError for what a stage reads or writes and a `.dvcignore` keeps from DVC: receipts, cache and remote would lack it.

    Hidden files do not count: rules neither read nor write any, and DVC itself leaves some of them out.
    """
    named = entries()
    stages_now = [named[name] for name in stages()]
    made = [Path(path) for stage in stages_now for path in outs(stage)]
    read = [Path(path) for stage in stages_now for path in stage.get("deps", [])]
    notes = {folder / ".dvcignore" for path in (*made, *read) for folder in path.parents}
    lines = {line for note in notes if note.is_file() for line in note.read_text("utf-8", "replace").splitlines()}
    if not lines - IGNORED:
        return
    from slmake.platforms.atomic_dvc import Repo  # a second, which few builds need

    # Of a folder that is read, such as a base model, a rule does not read every file.
    inner = [file for path in read if path.is_dir() for file in files_of(path).values()]
    files = [*read, *inner, *made, *(file for path in made for file in path.rglob("*"))]
    with Repo() as repo:
        for file in (file for file in files if not any(part.startswith(".") for part in file.parts)):
            found = repo.dvcignore.check_ignore(str(file))
            if found.match and found.pattern_infos[-1].patterns not in IGNORED:
                raise UserError(
                    f"{found.pattern_infos[-1].file_info} keeps {file} from DVC, so what is recorded and shared would lack it. Remove that "
                    "line, or name less in it."
                )


if __name__ == "__main__":
    main()
