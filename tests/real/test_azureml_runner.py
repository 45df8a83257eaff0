"""The compiled pipeline, run as Azure ML would run it (aml_runner.py), in the container image where there is one."""

import json
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


def test_records_name_what_was_mounted(compiled, built, tmp_path):
    """A registry's model that params.yaml names, and an asset that the settings name in place of a local file."""
    project = Path(shutil.copytree(compiled, tmp_path / "project"))
    model, data = "azureml://registries/azureml/models/Phi-3-mini-4k-instruct/versions/15", "azureml:phrases:3"
    change(project, "fetch_model", source=model)
    (project / "data" / "dataset.json").write_text("[]", encoding="utf-8")  # the asset's rows are read
    fill_in(project, data=data)
    done = run(project, "python", "-m", "tools.azureml", "compile")
    assert done.returncode == 0, done.stdout
    held = {model: built / "data" / "base", data: built / "data" / "dataset.json"}
    made = Runner(tmp_path).pipeline(project / "azureml" / "pipeline.yml", held)
    for path in ("base", "dataset", "adapter", "merged", "onnx-int4"):
        assert sums(made[port(path)]) == sums(built / "build" / path), path

    package = Path(shutil.copytree(made["package"], project / "build" / "package"))
    assert f"Base model: `{model}`" in (package / "README.md").read_text(encoding="utf-8")
    base = json.loads(made["results_base_json"].read_text(encoding="utf-8"))
    rows = json.loads(made["results_dataset_json"].read_text(encoding="utf-8"))["source"]["train"]
    assert (base["source"], base["pin"]) == (model, {"version": "15"})
    assert (rows["source"], rows["in_place_of"]) == (data, "data/dataset.json")
    statement = json.loads((package / "provenance.intoto.json").read_text(encoding="utf-8"))
    read = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    sha256 = {dependency["name"]: dependency["digest"]["sha256"] for dependency in read}
    assert (sha256[model], sha256[data]) == (base["sha256"], rows["sha256"])
    bom = json.loads((package / "bom.cdx.json").read_text(encoding="utf-8"))
    assert {model, data} <= {component["name"] for component in bom["components"]}
    for file in ("README.md", "provenance.intoto.json", "bom.cdx.json"):
        assert "data/model" not in (package / file).read_text(encoding="utf-8")

    done = run(project, "python", "-m", "tools.verify")
    assert done.returncode == 0, done.stdout
    assert f"made of {data}, which Azure ML's settings named in place of data/dataset.json" in done.stdout
    fill_in(project, data="azureml:phrases:4")
    done = run(project, "python", "-m", "tools.verify")
    assert done.returncode != 0
    assert f"{data}: read on Azure ML in place of data/dataset.json" in done.stdout


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
