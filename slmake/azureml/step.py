"""One step of the pipeline, on a machine of Azure ML: put what is mounted where the rule looks for it, run the rule, hand over what it made.

The rule sees the same paths as everywhere else, so it is the Snakefile's own command that runs. Sources of params.yaml stay as they are
written: an environment variable says what is mounted in their place (slmake/sources/mounted.py). The receipt has the SHA-256 of every
file that was handed over; `download` checks them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from slmake import outputs
from slmake.errors import UserError
from slmake.platforms import container, dvc_yaml
from slmake.sources.mounted import ORIGINS

MARKERS = (".snakemake_timestamp",)
ORIGINS_FILE = Path("azureml/origins.json")  # in a step's code: what it reads in place of sources of params.yaml


def check_environment() -> None:
    """Raise UserError unless this image's packages are those of the lock that was sent along."""
    try:
        different = container.differences(Path("envs"))
    except ModuleNotFoundError as error:
        different = [f"{error.name}: missing in the image"]
    if different:
        rest = [f"… and {len(different) - 10} more"] * (len(different) > 10)
        raise UserError(
            "the image that `environment` in azureml/settings.yaml names does not hold the locked environment. Build it again (`make "
            "image`), push it, and put its new digest there.\n  " + "\n  ".join([*different[:10], *rest])
        )


def link_inputs(inputs: dict[str, Path]) -> None:
    """Link every mounted input to the path at which the rule reads it.

    Raises:
        UserError: an input is not there.
    """
    for path, mounted in inputs.items():
        if not mounted.exists():
            raise UserError(f"{path}: the input {mounted} is not there. Did the step that makes it fail?")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(mounted.resolve())


def run(rule: str, targets: list[str]) -> None:
    """Let Snakemake build the rule's outputs, by that rule alone.

    Raises:
        UserError: the rule failed; its own message is above.
    """
    allowed = [rule, *(member for member, stage in dvc_yaml.MEMBERS.items() if stage == rule)]
    command = [sys.executable, "-m", "snakemake", "--cores", "all", "--quiet", "host", "progress"]
    origins = {ORIGINS: ORIGINS_FILE.read_text(encoding="utf-8")} if ORIGINS_FILE.exists() else {}
    done = subprocess.run([*command, "--allowed-rules", *allowed, "--", *targets], env=os.environ | origins)
    if done.returncode:
        raise UserError(
            f"{rule} failed (exit code {done.returncode}). The reason is above, details are in logs/{rule}.log."
        )


def hand_over(path: str, target: Path) -> dict[str, str]:
    """Copy one output to where Azure ML takes it from; SHA-256 of its files by relative name (a file's own name is `.`)."""
    output = Path(path)
    if output.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(output, target)
        return {".": outputs.sha256(output)}
    shutil.copytree(
        output, target, dirs_exist_ok=True, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns(*MARKERS)
    )
    return sums(output)


def sums(path: Path) -> dict[str, str]:
    """SHA-256 of a folder's files by relative name; of a file, under the name `.`."""
    if path.is_file():
        return {".": outputs.sha256(path)}
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in MARKERS]
    return {file.relative_to(path).as_posix(): outputs.sha256(file) for file in files}


def keep_checkpoints(folder: Path) -> None:
    """Let checkpoints go to a folder that outlives this machine.

    The text file keeps the folder from being empty, which storage would take for absent, and finetune from removing the link.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.txt").write_text("Checkpoints of a run that has not ended. It resumes from the last one.\n")
    Path("build").mkdir(exist_ok=True)
    Path("build/checkpoints").symlink_to(folder.resolve())


def main(rule: str, inputs: dict[str, Path], results: dict[str, Path], receipt: Path, checkpoints: Path | None) -> None:
    """Run one step. See the module."""
    check_environment()
    link_inputs(inputs)
    if checkpoints:
        keep_checkpoints(checkpoints)
    run(rule, list(results))
    handed = {path: hand_over(path, target) for path, target in results.items()}
    receipt.parent.mkdir(parents=True, exist_ok=True)
    outputs.write_json(receipt, {"rule": rule, "outputs": handed})
