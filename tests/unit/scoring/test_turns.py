"""evaluate on conversations: every trained turn is a question behind the true turns before it."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from tiny import write_params

from scripts import evaluate, prepare
from slmake import params
from slmake.export import builder
from slmake.scoring import metrics
from slmake.scoring.questions import Questions


@pytest.fixture(scope="module")
def chats(tmp_path_factory, base) -> Path:
    """A prepared dataset of conversations with three answers each, a tenth of them for test."""
    folder = tmp_path_factory.mktemp("chats")
    rows = []
    for i in range(30):
        turns = [("user", f"Hello {i}"), ("assistant", f"Hi {i}"), ("user", f"Sing of {i * 7}"), ("assistant", "La la")]
        turns += [("user", f"And {i * 3}?"), ("assistant", f"No {i}")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    section = {"source": str(folder / "rows.json"), "text_template": None, "answer": None, "max_seq_len": 256}
    section |= {"test_fraction": 0.1, "eval_fraction": 0.1, "near_duplicate_threshold": 1.0}
    file = write_params(folder / "params.yaml", all={"stages": ["finetune"]}, prepare=section)
    paths = ["--params", file, "--base", base, "--output", folder / "dataset", "--report", folder / "report.json"]
    prepare.main([str(part) for part in paths])
    return folder / "dataset"


def test_every_turn_has_a_line(chats, base, tmp_path):
    """Base and export answer each turn; both read the tokens of training, and the report's table has row and turn."""
    section = params.Quantize(precision="int4", algo_config="rtn", matmul_mixed_precision=None)
    (tmp_path / "onnx").mkdir()
    builder.export(section, base, tmp_path / "onnx", tmp_path / "cache")
    evaluated = {"max_samples": None, "latency_rows": 0, "bootstrap_samples": 200}
    quantize = {"precision": "int4", "calibration": "none", "matmul_mixed_precision": None, "int8_nodes": []}
    file = write_params(tmp_path / "params.yaml", evaluate=evaluated, quantize=quantize)
    paths = {"params": file, "dataset": chats, "base": base, "onnx": tmp_path / "onnx"}
    paths |= {name: tmp_path / f"{name}.out" for name in ("metrics", "benchmark", "predictions")}
    evaluate.main([str(part) for name, path in paths.items() for part in (f"--{name}", path)])
    with open(tmp_path / "predictions.out", newline="", encoding="utf-8") as handle:
        lines = list(csv.DictReader(handle))
    test = pyarrow.parquet.read_table(chats / "test.parquet").to_pylist()
    assert list(lines[0]) == ["row", "turn", "expected", "base", "int4", "prompt"]
    assert len(lines) == len(test) == 9
    for line, example in zip(lines, test, strict=True):
        assert (line["row"], [int(line["turn"])]) == (str(example["row"]), example["turns"])
        i = example["row"] - 1
        assert line["expected"] == {2: f"Hi {i}", 4: "La la", 6: f"No {i}"}[int(line["turn"])]
        assert line["prompt"].count("<|start|>user") == int(line["turn"]) / 2
        assert line["prompt"].endswith("<|end|>\n<|start|>assistant\n")
    result = json.loads((tmp_path / "metrics.out").read_text(encoding="utf-8"))
    assert (result["test_rows"], result["parity"]["tokenizer"]["encode_differ"]) == (9, 0)


def test_prompts_of_training_sequences_are_whole(chats):
    """A sequence with three answers gives one question for parity: its last answer behind all that stands before it."""
    questions = Questions(chats)
    questions.extend_for_parity(20)
    train = {tuple(row["input_ids"]): row for row in pyarrow.parquet.read_table(chats / "train.parquet").to_pylist()}
    for i in range(questions.scored, len(questions.rows)):
        assert questions.texts[i].count("<|start|>user") == 3
        assert questions.turns[i] == 6
        ids = (*questions.prompts[i].tolist(), *questions.answers[i])
        assert ids in train or questions.rows[i] not in {row["row"] for row in train.values()}


def test_answers_of_a_conversation_are_drawn_together(chats):
    """Bootstrap by conversation: with three answers that are right or wrong together, the interval is that of a third of the rows."""
    questions = Questions(chats)
    assert questions.groups().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    groups = np.repeat(np.arange(100), 3)
    weights = metrics.resamples(300, 4000, 7, groups)
    assert (weights[:, 0::3] == weights[:, 1::3]).all()
    right = np.repeat(np.arange(100) < 80, 3)
    low, high = metrics.interval(weights @ right / weights.sum(axis=1))
    alone_low, alone_high = metrics.interval(metrics.resamples(100, 4000, 7) @ right[::3] / 100)
    assert (low, high) == (alone_low, alone_high) != metrics.interval(metrics.resamples(300, 4000, 7) @ right / 300)
    plain = metrics.resamples(50, 20, 3)
    assert (metrics.resamples(50, 20, 3, np.arange(50)) == plain).all()
