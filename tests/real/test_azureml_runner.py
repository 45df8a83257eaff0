"""The compiled pipeline, run as Azure ML would run it (aml_runner.py), in the container image where there is one."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from aml_runner import Runner, reference
from conftest import IMAGE
from project import change, new_project, run
from test_azureml_service import fill_in

from slmake.azureml.pipeline import port
from slmake.azureml.step import sums

VARYING = {"results/benchmark.json", "build/report/cost.html"}  # timings


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, base) -> Path:
    """A tiny project after `compile`."""
    project = new_project(tmp_path_factory.mktemp("compiled") / "project", base)
    fill_in(project)
    done = run(project, "python", "-m", "tools.azureml", "compile")
    assert done.returncode == 0, done.stdout
    return project


def test_the_pipeline_ends_in_the_bytes_of_a_local_build(compiled, built, tmp_path):
    image = str(IMAGE) if IMAGE.is_file() and shutil.which("apptainer") else None
    made = Runner(tmp_path, image).pipeline(compiled / "azureml" / "pipeline.yml")
    receipts = [made[name] for name in made if name.startswith("receipt_")]
    handed = {
        path: files for receipt in receipts for path, files in yaml.safe_load(receipt.read_text())["outputs"].items()
    }
    assert {path.rpartition("/")[2] for path in handed} >= {
        "base",
        "dataset",
        "adapter",
        "merged",
        "onnx-int4",
        "package",
    }
    for path, files in handed.items():
        assert sums(made[port(path)]) == files
        if path not in VARYING:
            assert files == sums(built / path), path


def test_a_finetune_that_loses_its_machine_resumes(compiled, built, tmp_path):
    """Killed after its first checkpoint, started again on another machine with the same mounts: it resumes, and ends in the same bytes."""
    project = Path(shutil.copytree(compiled, tmp_path / "project"))
    change(project, "finetune", num_train_epochs=6.0, save_steps=2)
    assert run(project, "python", "-m", "tools.azureml", "compile").returncode == 0
    step = yaml.safe_load((project / "azureml" / "pipeline.yml").read_text())["jobs"]["finetune"]
    runner = Runner(tmp_path / "machines", fresh=True)
    code = project / "build" / "azureml" / "code" / "finetune"
    places = {
        "data": project / "data" / "dataset.json",
        "base": built / "build" / "base",
        "dataset": built / "build" / "dataset",
    }
    inputs = {name: places[name] for name in step["inputs"]}

    def outputs() -> dict[str, Path]:
        return {
            reference(value) if isinstance(value, str) else name: runner.new_path("out")
            for name, value in step["outputs"].items()
        }

    whole = outputs()
    assert runner.step(code, step["command"], inputs, whole).returncode == 0
    broken = outputs()
    first = runner.step(
        code, step["command"], inputs, broken, start=lambda *a, **k: subprocess.Popen(*a, start_new_session=True, **k)
    )
    deadline = time.monotonic() + 600
    while not list(broken["checkpoints"].glob("*/step-*")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert not broken["adapter"].exists()
    kept = max(int(path.name.partition("-")[2]) for path in broken["checkpoints"].glob("*/step-*"))
    second = runner.step(code, step["command"], inputs, broken)
    assert second.returncode == 0, second.stdout
    assert re.search(rf"(step|from) {kept}\b", second.stdout), second.stdout
    for name in ("adapter", "results_train_loss_csv", "results_eval_loss_csv"):
        assert sums(broken[name]) == sums(whole[name])
    assert [path.name for path in broken["checkpoints"].iterdir()] == ["about.txt"]
