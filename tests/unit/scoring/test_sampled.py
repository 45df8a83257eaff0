"""`evaluate.sampling`: several sampled answers to every row, of the export and of the models on transformers."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from evaluate_script import export, make_dataset
from tiny import make_rows, write_params

from scripts import evaluate, gates
from slmake import params
from slmake.errors import UserError
from slmake.generation import Exported, Sampling
from slmake.scoring.metrics import rouge_l

QUANTIZE = {"precision": "fp32", "calibration": "none", "int8_nodes": [], "matmul_mixed_precision": None}
SAMPLING = {"n": 3, "temperature": 1.5, "seed": 7}
MODELS = ("base", "fp32")


@pytest.fixture(scope="module")
def onnx(tmp_path_factory, base) -> Path:
    """The untrained base as ONNX: what it samples is nearly uniform."""
    return export(base, tmp_path_factory.mktemp("sampled") / "onnx", "fp32")


@pytest.fixture(scope="module")
def open_text(tmp_path_factory, base) -> Path:
    """A dataset of open answers."""
    rows = [{"phrase": row["phrase"], "tone": f"{row['tone']} {i}"} for i, row in enumerate(make_rows(96))]
    return make_dataset(tmp_path_factory.mktemp("open") / "data", base, rows)


def run(folder: Path, dataset: Path, base: Path, onnx: Path, checks=(), **section: object) -> tuple[dict, list[dict]]:
    """metrics.json and all predictions of base and export."""
    given = {"models": ["base", "onnx"], "max_samples": 8, "max_new_tokens": 6, "sampling": SAMPLING, **section}
    asked = {"max_accuracy_drop": None, "checks": list(checks)}
    file = write_params(folder / "params.yaml", evaluate=given, quantize=QUANTIZE, gates=asked)
    arguments = ["--params", file, "--dataset", dataset, "--base", base, "--onnx", onnx]
    for name in ("metrics.json", "benchmark.json", "predictions.csv"):
        arguments += [f"--{name.partition('.')[0]}", folder / name]
    evaluate.main([str(argument) for argument in arguments])
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as handle:
        return json.loads((folder / "metrics.json").read_text()), list(csv.DictReader(handle))


def sampled(rows: list[dict], name: str) -> list[list[str]]:
    return [[row[f"{name}_sample_{number}"] for row in rows] for number in (1, 2, 3)]


def test_the_same_seed_gives_the_same_answers(tmp_path, open_text, base, onnx):
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder in folders:
        folder.mkdir()
    metrics, rows = run(folders[0], open_text, base, onnx)
    again, same = run(folders[1], open_text, base, onnx)
    assert (metrics, rows) == (again, same)
    for name in MODELS:
        answers = [answer for column in sampled(rows, name) for answer in column]
        assert len(set(answers)) > 12  # of 24, some of them half characters: each answer is drawn for itself
    _, others = run(folders[2], open_text, base, onnx, sampling={**SAMPLING, "seed": 8000})
    for name in MODELS:
        assert sampled(others, name) != sampled(rows, name)
        assert [row[name] for row in others] == [row[name] for row in rows]  # the greedy ones are as before


@pytest.mark.parametrize("sampling", [{"top_p": 1e-6}, {"temperature": 0.001}], ids=str)
def test_certain_choices_are_the_greedy_answers(tmp_path, open_text, base, onnx, sampling):
    metrics, rows = run(tmp_path, open_text, base, onnx, sampling={**SAMPLING, **sampling})
    for name in MODELS:
        assert sampled(rows, name) == [[row[name] for row in rows]] * 3
        assert metrics[name]["sampled_accuracy"] == metrics[name]["accuracy"]
        assert metrics[name]["sampled_rouge_l"] == pytest.approx(metrics[name]["rouge_l"], abs=1e-6)
    assert metrics["drop"]["fp32_vs_base"]["sampled_accuracy"] == metrics["drop"]["fp32_vs_base"]["accuracy"]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.5), (0.7, 0.9), (2.0, 0.3)])
def test_no_token_beyond_the_nucleus_is_drawn(tmp_path, base, temperature, top_p):
    """As of transformers; with 0 for top_k, onnxruntime-genai drew one in three of them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # tied: some tokens are much more likely than others
    model.save_pretrained(tmp_path / "sharp")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy2(base / name, tmp_path / "sharp")
    exported, prompt = Exported(export(tmp_path / "sharp", tmp_path / "onnx", "fp32")), [5, 9, 60, 70]
    warpers = [transformers.TemperatureLogitsWarper(temperature), transformers.TopPLogitsWarper(top_p)]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[:, -1]
    nucleus = set(transformers.LogitsProcessorList(warpers)(None, logits)[0].isfinite().nonzero().flatten().tolist())
    drawn = {tuple(exported.generate(prompt, 1, sampling=Sampling(temperature, top_p, seed))) for seed in range(200)}
    assert 2 < len(nucleus) < 400
    assert {token for answer in drawn for token in answer} <= nucleus
    assert len(drawn) > min(len(nucleus), 20) // 2


def test_figures_are_means_over_the_answers(tmp_path, open_text, base, onnx):
    (tmp_path / "own.py").write_text("def letter(prompt, expected, answer):\n    return ord(expected[0])\n")
    metrics, rows = run(tmp_path, open_text, base, onnx, metrics=[f"{tmp_path}/own.py:letter", "contains"])
    expected = [row["expected"] for row in rows]
    for name in MODELS:
        columns, scores = sampled(rows, name), metrics[name]
        right = sum(given == e for column in columns for given, e in zip(column, expected, strict=True)) / 24
        assert scores["sampled_accuracy"] == pytest.approx(right, abs=1e-6)
        assert scores["sampled_accuracy_low"] <= right <= scores["sampled_accuracy_high"]
        rouge = sum(rouge_l(expected, column) for column in columns) / 3
        assert scores["sampled_rouge_l"] == pytest.approx(rouge, abs=1e-6)
        mean = sum(ord(e[0]) for e in expected) / 8
        assert scores["sampled_letter"] == pytest.approx(mean, abs=1e-5)
        assert 0 <= scores["sampled_contains_low"] <= scores["sampled_contains"]


def test_labels_are_read_as_greedy_ones_are(tmp_path, dataset, base, onnx):
    metrics, rows = run(tmp_path, dataset, base, onnx, sampling={"n": 3, "top_p": 1e-6})
    assert sampled(rows, "fp32") == [[row["fp32"] for row in rows]] * 3
    assert "sampled_rouge_l" not in metrics["fp32"]


def test_a_gate_bounds_them(tmp_path, open_text, base, onnx, refused):
    checks = [{"metric": "sampled_rouge_l", "minimum": 0.5}]
    checks += [{"metric": "sampled_accuracy", "maximum_drop": 0.9, "against": "base", "interval": "worst"}]
    run(tmp_path, open_text, base, onnx, checks)
    arguments = {"params": "params.yaml", "metrics": "metrics.json", "benchmark": "benchmark.json", "output": "g.json"}
    message = refused(
        gates.main, [part for key, name in arguments.items() for part in (f"--{key}", f"{tmp_path}/{name}")]
    )
    assert "MISSED  checks[0] minimum of sampled_rouge_l" in message
    assert "passed  checks[1] maximum_drop of sampled_accuracy" in message


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"gates": {"checks": [{"metric": "sampled_accuracy", "minimum": 0.5}]}}, "measured where evaluate.sampling is set"),
        ({"evaluate": {"sampling": {"temperature": 0}}}, "evaluate.sampling.temperature"),
        ({"evaluate": {"sampling": {"top_p": 0}}}, "evaluate.sampling.top_p"),
        ({"evaluate": {"sampling": {"n": 0}}}, "evaluate.sampling.n"),
        ({"evaluate": {"sampling": {"samples": 3}}}, "evaluate.sampling.samples"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, sections, reason):
    with pytest.raises(UserError, match=reason):
        params.load(write_params(tmp_path / "params.yaml", **sections))


def test_there_is_nothing_to_sample_without_rows(tmp_path):
    stages = ["quantize", "evaluate"]
    file = write_params(tmp_path / "p.yaml", all={"stages": stages}, prepare=None, evaluate={"sampling": SAMPLING})
    with pytest.raises(UserError, match="it asks for answers to a dataset's rows"):
        params.load(file)
