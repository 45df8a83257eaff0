"""Exports for devices that are not here: built, checked on the CPU, and said so."""

import json

import numpy as np
import pytest
from test_families import make_twin
from tiny import write_params

from scripts import evaluate, quantize
from slmake import params
from slmake.generation import Exported

PLAIN = {"calibration": "none", "algo_config": "rtn", "int8_nodes": [], "matmul_mixed_precision": None}
TARGETS = [
    ("dml", "int4"),
    ("dml", "fp16"),
    ("cuda", "int4"),
    ("cuda", "int8"),
    ("cuda", "fp16"),
    ("webgpu", "int4"),
    ("webgpu", "int8"),
]


def export(folder, model, provider: str, precision: str):
    """Run the script in this process; returns the export's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**PLAIN, "execution_provider": provider, "precision": precision}
    file = write_params(folder / "params.yaml", quantize=settings)
    quantize.main(["--params", str(file), "--model", str(model), "--output", str(folder / "onnx")])
    return folder / "onnx"


def log_probabilities(folder) -> np.ndarray:
    """Of the next token after a fixed prompt, float64 [vocabulary]."""
    logits = []
    Exported(folder).generate(list(range(2, 22)), 1, lambda generator: logits.append(np.array(generator.get_logits())))
    values = logits[0].reshape(-1).astype(np.float64)
    return values - np.log(np.exp(values - values.max()).sum()) - values.max()


@pytest.fixture(scope="module")
def reference(tmp_path_factory, base) -> np.ndarray:
    return log_probabilities(export(tmp_path_factory.mktemp("cpu"), base, "cpu", "fp32"))


@pytest.mark.parametrize(("provider", "precision"), TARGETS)
def test_export_for_another_device_is_checked_on_the_cpu(tmp_path, capsys, base, reference, provider, precision):
    folder = export(tmp_path, base, provider, precision)
    message = capsys.readouterr().err
    assert f"quantize: {folder} loads and generates ({precision}: " in message
    assert f"quantize: {provider} is not available here: the export was checked on cpu, not on its target" in message
    options = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert [list(entry) for entry in options["provider_options"]] == [[provider]]  # for the target, as asked for
    model = Exported(folder)
    assert (model.provider, model.runs_on) == (provider, "cpu")
    found = log_probabilities(folder)
    assert (np.exp(reference) * (reference - found)).sum() < (0.02 if precision == "int4" else 1e-3)


@pytest.mark.parametrize("provider", ["cuda", "webgpu"])
def test_norms_of_queries_and_keys_stay_nodes_that_the_cpu_can_run(tmp_path, provider):
    make_twin("qwen3", tmp_path / "model")
    folder = export(tmp_path / provider, tmp_path / "model", provider, "int4")
    plain = export(tmp_path / "cpu", tmp_path / "model", "cpu", "fp32")
    expected = log_probabilities(plain)
    assert (np.exp(expected) * (expected - log_probabilities(folder))).sum() < 0.02


def test_scores_name_the_provider_that_they_were_taken_on(tmp_path, capsys, base, dataset):
    folder = export(tmp_path / "dml", base, "dml", "int4")
    file = tmp_path / "dml" / "params.yaml"
    results = [f"--{name}={tmp_path / name}" for name in ("metrics", "benchmark", "predictions")]
    evaluate.main(["--params", str(file), "--dataset", str(dataset), "--onnx", str(folder), *results])
    message = capsys.readouterr().err
    assert "dml is not available here: int4 was scored on cpu, and its latency on dml was not measured" in message
    metrics = json.loads((tmp_path / "metrics").read_text())
    assert metrics["providers"] == {"int4": {"exported_for": "dml", "scored_on": "cpu"}}


def test_cuda_in_float32_is_refused():
    """The builder's graph for it has outputs that no node computes."""
    with pytest.raises(ValueError, match="the builder has no fp32 for cuda: choose int4, int8, fp16"):
        params.Quantize(**PLAIN, precision="fp32", execution_provider="cuda")
