"""docs/experiments.md: every command as it stands there, typed in a tiny project whose environment is not active yet."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import yaml
from project import change, run, type_block
from tiny import ROOT

BLOCKS = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def project(copy_of_built) -> Path:
    """The built project as a clone with DVC, without the stages that an experiment on training does not need."""
    (copy_of_built / ".venv").symlink_to(sys.prefix)
    shutil.copy2(ROOT / "Makefile", copy_of_built)
    for lock in (copy_of_built / "envs").glob("*.lock"):
        os.utime(lock, (0, 0))  # `make setup` has been run
    for command in (
        ["git", "init", "-q"],
        ["git", "config", "user.email", "test@example.org"],
        ["git", "config", "user.name", "test"],
        ["dvc", "init", "-q"],
        ["dvc", "config", "core.analytics", "false"],
    ):
        done = run(copy_of_built, *command)
        assert done.returncode == 0, done.stdout
    change(copy_of_built, "all", stages=["finetune", "merge", "evaluate"])
    done = run(copy_of_built, "python", "-m", "tools.build")
    assert done.returncode == 0, done.stdout
    return copy_of_built


def type_in(project: Path, block: str) -> str:
    """Type a block in a terminal where the first block was typed before; returns what it shows."""
    environment = os.environ | {"PYTHONPATH": "", "PATH": os.defpath}
    return type_block(project, BLOCKS[0] + block, environment, "-eo")


def rate(project: Path) -> float:
    return yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))["finetune"]["learning_rate"]


def highest(project: Path) -> float:
    """The highest learning rate that the last training used."""
    curve = (project / "results" / "train_loss.csv").read_text().splitlines()
    return max(float(line.split(",")[3]) for line in curve[1:])


def test_the_page_on_experiments_as_it_stands(project):
    assert BLOCKS[0] == "source .venv/bin/activate\n"
    start, single, queue, status, compare, apply = BLOCKS[1:]
    type_in(project, start)
    shown = type_in(project, single)
    assert "Running stage 'finetune'" in shown
    assert "Running stage 'prepare'" not in shown
    assert rate(project) == 0.0001
    assert highest(project) == pytest.approx(0.0001, rel=0.2)
    type_in(project, queue)
    assert rate(project) == 0.01  # undone, and nothing is built here
    end = time.monotonic() + 1000
    while re.search("Queued|Running", shown := type_in(project, status)):
        assert time.monotonic() < end, shown
        time.sleep(2)
    assert shown.count("Success") == 2, shown + type_in(project, "dvc queue logs rate-1")
    shown = type_in(project, compare)
    for value in ("0.0001", "0.0002", "0.0004", "slow", "rate-1", "rate-2", "merged.accuracy"):
        assert value in shown
    type_in(project, apply)
    assert rate(project) in (0.0002, 0.0004)
    assert highest(project) == pytest.approx(rate(project), rel=0.2)
    assert "Nothing to be done" in run(project, "snakemake", "--dry-run", "--cores", "all").stdout
    assert json.loads((project / "results" / "metrics.json").read_text())["merged"]["accuracy"] >= 0
