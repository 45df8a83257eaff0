"""bench.cuda on the CPU: every check passes, every figure is there, and what cannot be measured is listed."""

import json
import sys

import pytest
import torch

from bench import cuda, document, gpu_checks, gpu_models, gpu_speed
from slmake import cli
from slmake.training import lora_linear


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("cuda")
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    arguments = ["--device", "cpu", "--tiny", "--output", folder / "cuda.json", "--work", folder / "work"]
    assert cuda.main([str(argument) for argument in arguments]) == 0
    torch.use_deterministic_algorithms(deterministic)
    assert torch.get_num_threads() == threads
    return json.loads((folder / "cuda.json").read_text())


def test_every_check_passes(result):
    assert [check["name"] for check in result["checks"] if not check["met"]] == []
    names = [check["name"] for check in result["checks"]]
    for kind in gpu_models.ARCHITECTURES:
        assert f"{kind}, lora, float32: gradient against float64" in names
    for part in (
        "qlora",
        "bfloat16",
        "two runs",
        "resumed run",
        "merge on the CPU",
        "GPTQ: moments",
        "share of weights",
    ):
        assert any(part in name for name in names), part


def test_every_contender_is_measured_on_every_workload(result):
    loads = {"rows of 8 tokens", "rows of 16 tokens"}
    loads |= {f"{name} behind 12 shared" for name in loads}
    assert set(result["training"]) == {"lora", "qlora"}
    for runs in result["training"].values():
        assert set(runs) == {"ours", "Trainer, sdpa", "trace"}
        assert runs["trace"] == {}  # of a GPU
        for contender in (runs["ours"], runs["Trainer, sdpa"]):
            assert set(contender) == loads
            assert all(run["tokens_per_s"] > 0 and run["peak_bytes"] is None for run in contender.values())
        assert all(run["flop_per_s"] > 0 for run in runs["ours"].values())
        computed = {name: run["computed"] for name, run in runs["ours"].items()}
        assert computed["rows of 8 tokens behind 12 shared"] < 0.6 < computed["rows of 8 tokens"] <= 1
    assert result["product_flop_per_s"] > 0
    assert result["scoring"]["rows_per_s"] > 0
    assert result["gptq"]["seconds_per_layer"] > 0


def test_what_cannot_be_measured_is_listed(result):
    assert "the trace and GPU memory (no GPU)" in result["left_out"]
    assert not any(reason.startswith("QLoRA") for reason in result["left_out"])


def test_the_result_goes_into_the_document(result):
    bars = document.bars_table({"cuda": result})
    assert "lora, rows of 16 tokens: tokens/s over transformers' Trainer, sdpa" in bars
    assert {line["met"] for line in result["bars"]} == {None}  # nothing is asked of a tiny model
    assert "34 of 34 checks passed." in result["notes"]
    assert "| llama, lora, float32: loss against float64 |" in document.markdown("one GPU", {"cuda": result}, [])


def test_a_wrong_gradient_fails(tmp_path, monkeypatch):
    """The reference is transformers' and PEFT's own, so an error of the fused layers' backward is found."""
    backward = lora_linear.LoraLinear.backward

    def wrong(ctx, *grads):
        grad_x, *others = backward(ctx, *grads)
        return grad_x, *(None if grad is None else 1.001 * grad for grad in others)

    monkeypatch.setattr(lora_linear.LoraLinear, "backward", staticmethod(wrong))
    setup = gpu_checks.Setup(tmp_path, cli.Job("cuda", sys.stderr, None))
    checks = {
        name.rpartition(": ")[2]: figure <= bound for name, figure, bound in gpu_checks.step(setup, "llama", "float32")
    }
    assert checks["loss against float64"]
    assert not checks["gradient against float64"]
    assert not checks["gradient without shared prefixes against float64"]


def test_a_check_that_ends_in_an_error_has_failed(monkeypatch):
    def broken(*_):
        raise RuntimeError("an illegal memory access")
        yield

    monkeypatch.setattr(gpu_models, "ARCHITECTURES", {})
    for name in ("step", "repeated", "calibrated"):
        monkeypatch.setattr(gpu_checks, name, lambda *_: [("right", 0.0, 0.0)])
    monkeypatch.setattr(gpu_checks, "merged", broken)
    checks = gpu_checks.run(None, None)
    assert [check["met"] for check in checks] == [True, True, True, False, True, True]
    assert checks[3]["note"] == "RuntimeError: an illegal memory access"
    assert "**failed** RuntimeError: an illegal memory access" in str(cuda.tables(checks, {}))


def test_a_workload_that_does_not_fit_is_reported_and_has_no_ratio():
    load = gpu_models.Workload(64, 0, 4)

    def too_large():
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    failed = gpu_speed.measured(torch.device("cpu"), too_large)
    assert failed == {"error": "OutOfMemoryError: tried to allocate 2 GiB"}
    ours = {"tokens_per_s": 6.0, "flop_per_s": 5.0}
    runs = {"ours": {load.name: ours}, "Trainer, sdpa": {load.name: failed}}
    lines = cuda.training_bars("lora", runs, 10.0, [load], {})
    assert [(line["name"], line["median"]) for line in lines] == [
        ("lora, rows of 64 tokens: share of a large product's rate", 0.5)
    ]
    runs["Trainer, sdpa"] = {load.name: {"tokens_per_s": 2.0}}
    ratio = cuda.training_bars("lora", runs, 10.0, [load], cuda.WANTED)[0]
    assert (ratio["median"], ratio["at_least"], ratio["met"]) == (3.0, 2.0, True)
    assert "OutOfMemoryError" in str(cuda.tables([], {"lora": {"Trainer, sdpa": {load.name: failed}}}))


def test_a_contender_that_cannot_be_loaded_does_not_end_the_others():
    def broken():
        raise ValueError("no such model\nand more")

    load = gpu_models.Workload(64, 0, 4)
    runs = gpu_speed.contender_runs(broken, {load: []}, 1, torch.device("cpu"))
    assert runs == ({load.name: {"error": "ValueError: no such model"}}, {})


def test_steps_of_a_workload_have_about_as_many_tokens_as_asked():
    loads = gpu_models.workloads([64, 4096], 500, 6144)
    assert [(load.length, load.instruction, load.batch) for load in loads] == [
        (64, 0, 96),
        (4096, 0, 1),
        (64, 500, 10),
        (4096, 500, 2),
    ]


@pytest.mark.parametrize(("arguments", "message"), [(["--device", "cpu"], "Add --tiny"), ([], "torch sees no GPU")])
def test_what_cannot_run_here_is_refused(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        cuda.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
