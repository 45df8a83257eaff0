"""bench: the arithmetic of its results, its count of a step's FLOP, what it reads and what it writes. Nothing here is timed."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import make_model, write_params

from bench import document, finetune, flops, inference, job, measure, models, prepare, quantize, results


def test_ratios_are_taken_round_by_round():
    assert results.ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="zip"):
        results.ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no round"):
        results.ratios([], [])


def test_a_bar_of_numpys_numbers_goes_into_json():
    line = results.bar("speed", list(np.array([2.0, 3.0])), at_least=2.5)
    assert json.loads(json.dumps(line))["met"] is True


def test_bar_is_met_by_the_median_alone():
    line = results.bar("x", [2.4, 9.0, 2.6], at_least=2.5)
    assert (line["median"], line["min"], line["max"], line["runs"], line["met"]) == (2.6, 2.4, 9.0, 3, True)
    assert results.bar("x", [2.4, 2.4, 9.0], at_least=2.5)["met"] is False
    assert results.bar("x", [1.2], at_most=1.1)["met"] is False
    assert results.bar("x", [1.1], at_most=1.1)["met"] is True
    assert results.bar("x", [1.0])["met"] is None


def test_exponent_of_known_powers():
    sizes = [10, 100, 1000]
    assert results.exponent(sizes, [3 * size for size in sizes]) == pytest.approx(1)
    assert results.exponent(sizes, [0.1 * size**2 for size in sizes]) == pytest.approx(2)
    assert results.exponent(sizes, [5, 5, 5]) == pytest.approx(0)


def test_results_are_kept_and_only_those_that_are_there_are_read(tmp_path):
    results.save(tmp_path / "deep" / "merge.json", {"bars": []})
    assert results.load(tmp_path / "deep", ["finetune", "merge"]) == {"merge": {"bars": []}}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["merge.json"]


def test_fused_projections_take_the_flops_of_separate_ones_but_for_lora():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 3, "vocab_size": 500}
    separate, fused = (
        flops.step_flops(sizes | {"model_type": kind}, 4, 30, np.full(3, 10), 6) for kind in ("llama", "phi3")
    )
    # Two matrices A fewer for q, k and v, one for gate and up; the first layer's q, k and v take no gradient of their input.
    saved = 30 * 4 * (6 * 3 * (2 * 64 + 64) - 2 * 2 * 64)
    assert fused == separate | {"lora": separate["lora"] - saved}


@pytest.mark.parametrize("kv", [2, 4])
def test_step_flops_are_those_that_torch_counts(tmp_path, kv):
    """torch's own counter, over forward and backward of the same model. It attends to all pairs and takes logits everywhere."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base", num_key_value_heads=kv, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows, time = 3, 17
    ids = torch.randint(2, 500, (rows, time))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids).logits
        logits.float().square().mean().backward()
    config = json.loads((base / "config.json").read_text())
    counted = flops.step_flops(config, 4, rows * time, np.full(rows, time), rows * time)
    counted["attention"] = counted["attention"] * 2 * time // (time + 1)
    # The counter also sees the rotary embedding's product of positions and frequencies.
    rotary = 2 * time * config["hidden_size"] // config["num_attention_heads"] // 2
    assert counter.get_total_flops() - sum(counted.values()) in (0, rotary)


def test_step_flops_of_smollm2_by_hand():
    config = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    }
    counted = flops.step_flops(config, 64, 30, np.array([10, 20]), 6)
    assert counted["base"] == 30 * (4 * 30 * 3_538_944 - 2 * 576 * (576 + 192 + 192))
    assert counted["lora"] == 30 * 64 * (6 * 30 * 10_176 - 2 * 3 * 576)
    assert counted["attention"] == 3 * 4 * 576 * 30 * (55 + 210)
    assert counted["head"] == 4 * 6 * 576 * 49152


def test_random_models_load_strictly_and_merge(tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    monkeypatch.setitem(models.SIZES, "tiny", (64, 128, 2, 4, 2, 256))
    monkeypatch.setattr(models, "SHARD", 60_000)
    base = models.write_model(tmp_path / "base", "tiny")
    assert len(list(base.glob("*.safetensors"))) > 2
    model, info = AutoModelForCausalLM.from_pretrained(base, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(value.numel() for value in model.parameters()) == models.parameters("tiny")
    assert model.dtype == torch.bfloat16
    assert 0.01 < model.model.layers[1].mlp.up_proj.weight.float().std() < 0.02
    adapter = models.write_adapter(tmp_path / "adapter", "tiny", rank=2)
    peft = PeftModel.from_pretrained(model, adapter)
    assert sum("lora_" in name for name, _ in peft.named_parameters()) == 2 * 7 * 2
    params = measure.params(tmp_path / "params.yaml")
    took = measure.script(
        "merge", "--params", params, "--base", base, "--adapter", adapter, "--output", tmp_path / "out"
    )
    assert took.peak > 50e6
    assert took.wall > 0
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_a_failing_child_is_reported_with_its_output():
    with pytest.raises(measure.BenchError, match=r"code 3:(?s:.)*something broke"):
        measure.run([sys.executable, "-c", "import sys; print('something broke'); sys.exit(3)"])
    assert measure.last_json('noise\n{"a": 1}\nmore noise\n') == {"a": 1}
    with pytest.raises(measure.BenchError, match="reported nothing"):
        measure.last_json("noise\n")


def test_contenders_run_interleaved():
    seen = []
    contenders = {name: lambda number, name=name: seen.append((number, name)) or {"n": number} for name in "abc"}
    runs = measure.interleaved(2, **contenders)
    assert seen == [(0, "a"), (0, "b"), (0, "c"), (1, "c"), (1, "b"), (1, "a")]
    assert runs["b"] == [{"n": 0}, {"n": 1}]


def test_import_times_are_summed_by_rule(tmp_path):
    (tmp_path / "merge.log").write_text(
        "import time: self [us] | cumulative | imported package\n"
        "import time:   1500000 |    2000000 |   torch\nother text\nimport time:    500000 |     500000 | json\n"
    )
    assert job.import_seconds(tmp_path) == {"merge": 2.0}
    code = "import scripts.merge"
    with open(tmp_path / "real.log", "w") as log:
        command = [sys.executable, "-X", "importtime", "-c", code]
        subprocess.run(command, cwd=measure.ROOT, stderr=log, check=True)
    assert 0 < job.import_seconds(tmp_path)["real"] < 600


def test_the_bare_builder_is_asked_for_what_quantize_asks(tmp_path):
    model = make_model(tmp_path / "model")
    wanted = {"calibration": "none", "int8_nodes": ["*/down_proj/*"], "block_size": 16}
    params = write_params(tmp_path / "params.yaml", quantize=wanted)
    command = [str(word) for word in quantize.builder_command(params, model, tmp_path / "out", tmp_path / "cache")]
    assert "block_size=16" in command
    overrides = json.loads(command[command.index("--target_options") + 1])["quant_config"]["weights"]["overrides"]
    names = {word["match"]["name"] for word in overrides if "name" in word["match"]}
    assert names == {f"/model/layers.{layer}/mlp/down_proj/MatMul" for layer in range(2)}


def test_rows_to_prepare_are_distinct_and_the_same_every_time(tmp_path):
    prepare.make_rows(tmp_path / "a.jsonl", 500)
    prepare.make_rows(tmp_path / "b.jsonl", 500)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len({row["phrase"] for row in rows}) > 495


RESULT = {
    "machine": {
        "processor": "P",
        "vectors": "AVX2",
        "cores": 2,
        "memory_gib": 24,
        "gpu": None,
        "system": "Linux 6",
        "python": "3.11.7",
        "load": 0.1,
        "when": "2026-11-24 10:00 UTC",
    },
    "versions": {"ours": {"torch": "2.13.0"}},
    "bars": [
        results.bar("merge: time over a plain copy", [1.2, 1.4, 1.3], at_most=1.5),
        results.bar("merge: memory", [1.5], at_most=1.0, unit="GiB"),
        results.bar("merge: for comparison", [3.0]),
    ],
    "tables": [[["", "s"], ["ours", "1"]]],
    "notes": ["A note."],
    "curves": {"merge": {"unit": "parameters", "sizes": [1, 10], "seconds": [1, 10], "megabytes": [1, 1]}},
}


def test_document_is_written_between_its_marks(tmp_path):
    results.save(tmp_path / "kept" / "merge.json", RESULT)
    page = tmp_path / "benchmarks.md"
    page.write_text(f"# Title\n\n{document.BEGIN}\nstale words\n{document.END}\n\n## Kept\n")
    table = document.write(["finetune", "merge"], tmp_path / "kept", page)
    text = page.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("## Kept\n")
    assert "stale words" not in text
    assert "1 of 2 bars are met" in text
    assert "| merge: time over a plain copy | at most 1.5 | 1.30 x | 1.20 to 1.40 | 3 | met |" in table
    assert "| merge: memory | at most 1 | 1.50 GiB |  | 1 | **missed** |" in table
    assert "| merge: for comparison |  | 3.00 x |  | 1 |  |" in table
    assert "### 2 cores of P (AVX2), no GPU" in text
    for name in ("ratios-1.svg", "growth-1.svg"):
        assert f"](benchmarks/{name})" in text
        assert "<svg" in (tmp_path / "benchmarks" / name).read_text()
    again = {path.name: path.read_bytes() for path in (tmp_path / "benchmarks").iterdir()}
    document.write(["finetune", "merge"], tmp_path / "kept", page)
    assert page.read_text() == text
    assert again == {path.name: path.read_bytes() for path in (tmp_path / "benchmarks").iterdir()}
    page.write_text("no marks")
    with pytest.raises(ValueError, match="put both lines back"):
        document.write(["merge"], tmp_path / "kept", page)


def test_another_machine_adds_to_the_document_and_a_newer_run_replaces(tmp_path):
    """What another checkout measured is in results.json; raw figures, which may name paths, are not."""
    page = tmp_path / "benchmarks.md"
    page.write_text(f"{document.BEGIN}\n{document.END}\n")

    def measured(kept: str, when: str, ratio: float, **machine) -> None:
        bars = [results.bar("merge: time over a plain copy", [ratio], at_most=1.5)]
        report = {**RESULT, "machine": {**RESULT["machine"], **machine, "when": when}, "bars": bars, "runs": "/a/path"}
        results.save(tmp_path / kept / "merge.json", report)
        document.write(["merge"], tmp_path / kept, page)

    measured("here", "2026-11-24 10:00 UTC", 1.1)
    measured("there", "2026-11-24 11:00 UTC", 1.2, vectors="AMX")
    text = page.read_text()
    assert text.index("### 2 cores of P (AMX), no GPU") < text.index("### 2 cores of P (AVX2), no GPU")
    assert "1.20 x" in text
    assert "1.10 x" in text
    assert text.count("#### merge") == 3  # one for each machine, and what it measures
    measured("later", "2026-11-25 10:00 UTC", 1.3)
    measured("stale", "2026-11-23 10:00 UTC", 9.9)
    text = page.read_text()
    assert "1.30 x" in text
    assert "1.10 x" not in text
    assert "9.90 x" not in text
    assert "/a/path" not in (tmp_path / "benchmarks" / "results.json").read_text()


def test_every_benchmark_has_its_name_and_options():
    from bench.__main__ import NAMES

    for name in NAMES:
        assert (measure.ROOT / "bench" / f"{name}.py").exists()
    done = subprocess.run([sys.executable, "-m", "bench", "--help"], cwd=measure.ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for option in ("--merge-size", "--job-steps", "--candidates"):
        assert option in done.stdout


def test_peak_memory_is_the_childs():
    small = measure.run([sys.executable, "-c", "pass"])
    large = measure.run([sys.executable, "-c", "x = b'1' * 200_000_000"])
    assert 150e6 < large.peak - small.peak < 300e6
    assert not math.isnan(large.cpu)


def test_dropping_the_cache_keeps_the_files(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10_000)
    measure.drop_cache(tmp_path)
    assert measure.flush(tmp_path) >= 0
    assert (tmp_path / "a").read_bytes() == b"x" * 10_000
    shutil.rmtree(tmp_path / "a", ignore_errors=True)


def test_bars_of_time_to_an_accuracy():
    def runs(seconds: list[float], accuracy: float) -> list[dict]:
        return [{"int4_s": value, "accuracy": accuracy} for value in seconds]

    peers = {"olive": runs([30, 40], 0.3), "trl": runs([20, 30], 0.9)}
    olive, trl = job.accuracy_bars({"ours": runs([10, 10], 0.85), **peers}, 0.8)
    assert olive["met"] is None
    assert "does not reach it (30.0%), so there is no bar (3 x was wanted)" in olive["note"]
    assert (trl["median"], trl["min"], trl["met"]) == (2.5, 2.0, True)
    _, trl = job.accuracy_bars({"ours": runs([10, 10], 0.75), **peers}, 0.8)
    assert trl["met"] is False
    assert "ours does not reach it (75.0%)" in trl["note"]


def test_bars_of_training_speed():
    speed = {"ours": [300.0, 330.0], "trl": [100.0, 110.0]}
    limit = [{"square": 1000.0, "shapes": 600.0}, {"square": 1100.0, "shapes": 660.0}]
    over, square, shapes = finetune.speed_bars(speed, limit, per_token=2.0, dtype="float32")
    assert (over["median"], over["met"]) == (3.0, True)
    assert (square["median"], square["met"]) == (0.6, True)
    assert (shapes["median"], shapes["met"]) == (1.0, True)


def test_bars_of_latency():
    middle = {"int4": [50.0], "int4, 4 bits throughout": [40.0], "float32 ONNX": [100.0], "llama.cpp": [80.0]}
    sizes = dict.fromkeys(middle, 90.0)
    bars = inference.latency_bars(middle, sizes)
    assert [bar["median"] for bar in bars] == [0.625, 0.5, 2.0]
    without = {name: values for name, values in middle.items() if name != "llama.cpp"}
    assert [bar["median"] for bar in inference.latency_bars(without, sizes)] == [2.0]
