"""Record what was built with DVC, and keep the times by which Snakemake knows it.

    python scripts/commit.py

Only the stages that params.yaml asks for are recorded. What changed although its rule did not run since the last record is damaged:
it is named, and no receipt is touched.

`dvc commit` puts a file of its cache in the place of one that was built. Where the same content was built before, that is the
old file with its old time, and Snakemake would take it for older than what it was made from, and build again at every call.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from common import cli, outputs, params
from common.errors import UserError

LOCK = Path("dvc.lock")
NOTE = Path(".dvc/tmp/slmake.json")  # what the last record saw: the receipts' sum, and when each rule had run


def dvc(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess:
    """Run DVC of this environment; its progress bars go to the terminal, its errors are kept."""
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE if capture else None, stderr=subprocess.PIPE, text=True)


def reason(done: subprocess.CompletedProcess) -> str:
    """DVC's own reason for a failure, one sentence."""
    lines = [line.strip() for line in (done.stderr or "").splitlines() if line.strip()]
    said = next(
        (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no reason given"
    )
    return re.sub(r"^ERROR: |\x1b\[[0-9;]*m", "", said).rstrip(".") + "."


def stages() -> list[str]:
    """The stages of dvc.yaml that params.yaml asks for."""
    import yaml

    named = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return [name for name in named if name in ("fetch_model", "prepare", *params.load("params.yaml").all.stages)]


def now() -> dict:
    """The sum of the receipts, and the time of every rule's last run: Snakemake writes its benchmark then."""
    ran = {path.stem: path.stat().st_mtime_ns for path in sorted(Path("benchmarks").glob("*.tsv"))}
    return {"lock": outputs.sha256(LOCK) if LOCK.exists() else None, "ran": ran}


def note() -> None:
    """Remember that what is here now is what the receipts say."""
    NOTE.parent.mkdir(parents=True, exist_ok=True)
    NOTE.write_text(json.dumps(now()), encoding="utf-8")


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
    status = dvc("status", "--json", *kept, capture=True) if kept else None
    if status is None or status.returncode:
        return  # `dvc commit` says what is wrong
    found = json.loads(status.stdout or "{}")
    changes = [(stage, change) for stage in found for change in found[stage] if isinstance(change, dict)]
    damaged = [(path, how, stage) for stage, change in changes for path, how in change.get("changed outs", {}).items()]
    if damaged:
        path, how, stage = damaged[0]
        raise UserError(
            f"{path} was {how} since {stage} built it; nothing was recorded. `make restore` brings back what was built, or remove {path} "
            "and run make: it is built again."
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    with cli.job("record"):
        wanted = stages()
        refuse_damaged(wanted)
        files = [path for folder in ("results", "build") for path in Path(folder).rglob("*") if path.is_file()]
        times = {path: path.stat().st_mtime_ns for path in files}
        done = dvc("commit", "--force", *wanted, capture=True)
        for path, before in times.items():
            if path.exists() and path.stat().st_mtime_ns != before:
                os.utime(path, ns=(before, before))
        if done.returncode:
            raise UserError(
                f"everything was built, but DVC could not record it: {reason(done)} Then `.venv/bin/python scripts/commit.py`."
            )
        note()


if __name__ == "__main__":
    main()
