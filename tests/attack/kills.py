"""Kills and edits while a tiny project is built and recorded, and what must hold after each of them."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import preloaded
import yaml
from project import change, digests, environment, planned, run

TIMEOUT = 600  # seconds for one command; more is a hang
ATTEMPTS = 10  # of one rule or recording; all but the last may be killed
OUTPUTS = {
    "fetch_model": ["build/base", "results/base.json"],
    "prepare": ["build/dataset", "results/dataset.json"],
    "rehearse": ["results/rehearsal.json", "results/estimate.json"],
    "finetune": ["build/adapter", "results/train_loss.csv", "results/eval_loss.csv"],
    "merge": ["build/merged"],
    "quantize": ["build/onnx-int4"],
    "evaluate": ["results/metrics.json", "results/benchmark.json", "results/predictions.csv"],
    "gates": ["results/gates.json"],
    "package": ["build/package"],
    "report": ["build/report"],
}


class Failed(Exception):
    """Something that must hold does not."""


def expect(holds: object, what: str) -> None:
    """Raise Failed unless `holds`."""
    if not holds:
        raise Failed(what)


def copy(source: Path, target: Path) -> Path:
    """A project with its times and records, so that Snakemake and DVC take it for the same."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


def killed_at(
    project: Path, seconds: float, command: list[str], main_only: bool = False, after: str = ""
) -> tuple[int | None, float]:
    """Run a command and kill it (and, unless `main_only`, all that it started) after some seconds.

    Args:
        after: what the command prints when the seconds begin; by default they begin at once.

    Returns:
        The exit code if it ended before, otherwise None; and how many seconds it ran.
    """
    variables = environment()
    program = preloaded.program(command[0], variables)  # spares every attempt the imports
    with (project / "attack.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [program, *command[1:]],
            cwd=project, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        begun = time.monotonic()
        while after not in (project / "attack.log").read_text(encoding="utf-8"):
            expect(time.monotonic() < begun + TIMEOUT, f"{command} hangs:\n{log_of(project)}")
            if process.poll() is not None:
                return process.returncode, 0.0
            time.sleep(0.02)
        begun = time.monotonic()
        try:
            return process.wait(seconds), time.monotonic() - begun
        except subprocess.TimeoutExpired:
            if not (main_only and kill_alone(command[0], project)):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None, time.monotonic() - begun


def kill_alone(program: str, project: Path) -> bool:
    """Kill a preloaded program that works in a project, and nothing that it started; whether there is one."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            name, cwd = (folder / "comm").read_text().strip(), (folder / "cwd").readlink()
            if (name, cwd) == (preloaded.NAME + program, project):
                os.kill(int(folder.name), signal.SIGKILL)
                return True
    return False


def log_of(project: Path) -> str:
    return "\n".join((project / "attack.log").read_text(encoding="utf-8", errors="replace").splitlines()[-15:])


def build(rule: str) -> list[str]:
    """The command that builds one rule, as DVC and Azure ML call it."""
    target = "build/report/overview.html" if rule == "report" else OUTPUTS[rule][0]
    triggers = ["--rerun-triggers", "mtime", "params", "input", "code"]
    return ["snakemake", "--cores", "all", "--nocolor", *triggers, "--allowed-rules", rule, "--", target]


WORK = ("build/checkpoints/", "build/downloads-")  # no outputs: what a killed rule resumes from


def seen(project: Path) -> dict[str, str]:
    """Digests of the outputs that a user or another rule can see."""
    return {name: digest for name, digest in digests(project).items() if "/." not in name and not name.startswith(WORK)}


def no_wrong_bytes(project: Path, reference: dict[str, str], lost: list[str]) -> None:
    """Every file that can be seen is what an undisturbed build makes; only files of `lost` outputs may be absent."""
    now = seen(project)
    wrong = [name for name, digest in now.items() if reference.get(name) != digest]
    expect(not wrong, f"wrong bytes: {wrong}")
    gone = [name for name in reference if name not in now and not name.startswith(tuple(lost))]
    expect(not gone, f"lost: {gone}")


def remove(project: Path, outputs: list[str]) -> None:
    """Remove a rule's outputs, so that it runs again."""
    for name in outputs:
        path = project / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def kill_rule(
    rule: str, whole: Path, reference: dict[str, str], work: Path, rng: random.Random, seconds: dict[str, float]
) -> int:
    """Kill one rule at random moments; the rerun after the kills must work. Returns the number of kills.

    Args:
        seconds: how long each rule took so far, corrected on the way.
    """
    project = copy(whole, work)
    remove(project, OUTPUTS[rule])
    kills = 0
    for attempt in range(ATTEMPTS):
        limit = TIMEOUT if attempt == ATTEMPTS - 1 else rng.uniform(0, 1.05) * seconds.get(rule, 3.0)
        after = f"rule {rule}:" if rng.random() < 0.85 else ""  # in the rule, or while it is planned
        code, spent = killed_at(project, limit, build(rule), main_only=rng.random() < 0.25, after=after)
        if code is None:
            expect(attempt < ATTEMPTS - 1, f"{rule} hangs:\n{log_of(project)}")
            kills += 1
            no_wrong_bytes(project, reference, OUTPUTS[rule])
            if rng.random() < 0.2:
                unlocked = run(project, "snakemake", "--unlock", timeout=TIMEOUT)
                expect(unlocked.returncode == 0, f"--unlock: {unlocked.stdout}")
            else:  # what it does, without the seconds of a start
                shutil.rmtree(project / ".snakemake" / "locks", ignore_errors=True)
        else:
            expect(code == 0, f"{rule}: the rerun after {kills} kills failed:\n{log_of(project)}")
            no_wrong_bytes(project, reference, [])
            if after:
                seconds[rule] = max(0.2, spent)
            if attempt < ATTEMPTS - 1:
                remove(project, OUTPUTS[rule])
    nothing_left(project)
    return kills


def nothing_left(project: Path) -> None:
    """No temporary file or folder of a killed run stands beside an output."""
    left = [
        path.name for folder in ("build", "build/report", "results") for path in (project / folder).glob(".*.partial")
    ]
    expect(not left, f"left behind: {left}")


def receipts(project: Path) -> dict:
    """What dvc.lock says; it must never be cut."""
    path = project / "dvc.lock"
    try:
        return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("stages", {}) if path.exists() else {}
    except yaml.YAMLError as error:
        raise Failed(f"dvc.lock is cut: {error}") from None


def kill_record(whole: Path, work: Path, rng: random.Random, seconds: dict[str, float]) -> int:
    """Kill the recording of receipts at random moments; returns the number of kills."""
    project = copy(whole, work)
    right, before = receipts(project), seen(project)
    command = ["python", "-m", "tools.record"]
    (project / "dvc.lock").unlink()
    kills = 0
    for attempt in range(ATTEMPTS):
        limit = TIMEOUT if attempt == ATTEMPTS - 1 else rng.uniform(0.1, 1.0) * seconds.get("record", 5.0)
        code, spent = killed_at(project, limit, command, main_only=rng.random() < 0.25)
        if code is None:
            kills += 1
            wrong = [name for name, receipt in receipts(project).items() if receipt != right[name]]
            expect(not wrong, f"wrong receipts: {wrong}")
            no_wrong_bytes(project, before, [])
        else:
            expect(code == 0, f"record: the rerun after {kills} kills failed:\n{log_of(project)}")
            seconds["record"] = spent
            break
    expect(receipts(project) == right, "the receipts are not those of an undisturbed recording")
    status = run(project, "dvc", "status", timeout=TIMEOUT)
    expect("up to date" in status.stdout, f"dvc status: {status.stdout}")
    no_wrong_bytes(project, before, [])
    nothing_left(project)
    return kills


def append(name: str, text: str) -> Callable[[Path], None]:
    """An edit that keeps the file's time."""

    def edit(project: Path) -> None:
        path = project / name
        status = path.stat()
        path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    return edit


EDITS: dict[str, Callable[[Path], None]] = {
    "the learning rate": lambda project: change(project, "finetune", learning_rate=0.02),
    "the seed of prepare": lambda project: change(project, "prepare", seed=3),
    "a gate": lambda project: change(project, "gates", min_accuracy=0.01),
    "the limitations in the card": lambda project: change(project, "package", limitations="None known."),
    "the dataset": append("data/dataset.json", "\n"),
    "the base model": append("data/base/tokenizer_config.json", "\n"),
    "a script": append("scripts/merge.py", "\nVALUE = 1\n"),
    "a module": append("slmake/scoring/gates.py", "\nVALUE = 1\n"),
    "a licence": append("LICENSE", "\n"),
}


def edit_build(whole: Path, work: Path, rng: random.Random) -> str:
    """Edit something while a build runs; the recording then refuses, or what it records is so. Returns what was edited."""
    project = copy(whole, work)
    before = receipts(project)
    rule = rng.choice(["gates", "report", "package"])
    remove(project, OUTPUTS[rule])
    what = rng.choice(list(EDITS))
    variables = environment()
    program = preloaded.program("snakemake", variables)
    with (project / "attack.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [program, "--cores", "all", "--nocolor"], cwd=project, env=variables, stdout=log, stderr=log
        )
        end = time.monotonic() + TIMEOUT
        while f"rule {rule}:" not in (project / "attack.log").read_text(encoding="utf-8") and time.monotonic() < end:
            time.sleep(0.05)  # until all is planned
        time.sleep(rng.uniform(0, 5))
        EDITS[what](project)
        process.wait(TIMEOUT)
    expect("Traceback" not in (project / "attack.log").read_text(encoding="utf-8"), log_of(project))
    done = run(project, "python", "-m", "tools.record", timeout=TIMEOUT)
    if done.returncode:
        expect(receipts(project) == before, f"{what}: refused, but the receipts changed")
    else:
        expect(planned(project) == set(), f"{what}: recorded, although rules have to run")
    return what
