"""A rule ends with the Snakemake that started it, however far between them, and lives as long."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import ROOT

from slmake import cli

RULE = """
import os, sys, time
from pathlib import Path
from slmake import cli
if sys.argv[3:] == ["old kernel"]:
    def refuse(pid):
        raise OSError(38, "Function not implemented")
    os.pidfd_open = refuse
with cli.job("merge"):
    Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(float(sys.argv[2]))
    Path(sys.argv[1]).write_text("done")
"""
SNAKEMAKE = """
import os, subprocess, sys
from slmake import cli
os.environ[cli.ENGINE] = cli.engine()
sys.exit(subprocess.run(sys.argv[1:]).returncode)
"""


def tree(between: list[str], note: Path, seconds: float, *more: str) -> subprocess.Popen:
    """A process that starts a rule as Snakemake does, with other processes between them."""
    rule = [sys.executable, "-c", RULE, note, str(seconds), *more]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "APPTAINERENV_PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", SNAKEMAKE, *between, *rule], env=variables)


def content(note: Path) -> str:
    """What the rule wrote, as soon as it has."""
    end = time.monotonic() + 60
    while not (note.exists() and note.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return note.read_text()


def ended(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def contained(folder: Path) -> list[str]:
    """The command that runs a program in Apptainer, in an image that is this machine's own folders."""
    for name in ("etc", "dev", "proc", "sys", "tmp", "var/tmp", "root", "home"):
        (folder / name).mkdir(parents=True)
    python = Path(sys.executable).resolve().parents[1]
    seen = {"/usr", str(ROOT), str(Path(sys.prefix).resolve()), sys.prefix, str(python), str(folder.parent)}
    for name in ("bin", "lib", "lib64"):
        if Path("/", name).is_symlink():
            (folder / name).symlink_to(Path("/", name).readlink())
        else:
            seen.add(f"/{name}")
    for path in seen:
        (folder / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
    return ["apptainer", "exec", "--bind", ",".join(sorted(seen)), str(folder)]


SHELLS = [
    "bash",
    "-c",
    '"$@"; exit $?',
    "bash",
]  # two processes more: without the last command bash would replace itself


@pytest.mark.parametrize("kind", ["child", "shells", "container", "old kernel"])
def test_a_killed_snakemake_ends_its_rule(kind, tmp_path):
    between = [] if kind == "child" else SHELLS * 2
    if kind == "container":
        if not shutil.which("apptainer"):
            pytest.skip("no apptainer: tests/real/install.sh installs it (Debian, Ubuntu)")
        between = [*SHELLS, *contained(tmp_path / "image"), *SHELLS]
    snakemake = tree(between, tmp_path / "note", 300, *[kind] * (kind == "old kernel"))
    rule = int(content(tmp_path / "note"))
    assert Path(f"/proc/{rule}").exists()
    snakemake.kill()
    snakemake.wait()
    assert ended(rule)


def test_a_rule_lives_as_long_as_its_snakemake(tmp_path):
    assert tree(SHELLS, tmp_path / "note", 0.5).wait(60) == 0
    assert content(tmp_path / "note") == "done"


def test_a_rule_whose_snakemake_has_ended_already_does_not_begin(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    variables = os.environ | {"PYTHONPATH": str(ROOT), cli.ENGINE: cli.engine(gone.pid)}
    done = subprocess.run([sys.executable, "-c", RULE, tmp_path / "note", "60"], env=variables, timeout=60)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("engine", ["", "another-boot pid:[4026531836] 1", "nothing"])
def test_a_snakemake_that_cannot_be_seen_is_not_watched(engine, tmp_path):
    """Another node of a Slurm job, a container with processes of its own, a script that a person runs."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), cli.ENGINE: engine}
    done = subprocess.run([sys.executable, "-c", RULE, tmp_path / "note", "0.2"], env=variables, timeout=60)
    assert done.returncode == 0
    assert content(tmp_path / "note") == "done"
