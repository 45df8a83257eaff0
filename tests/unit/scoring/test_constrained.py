"""Answers held to a constraint: valid by construction, scored beside the free ones, and refused where they cannot be."""

import csv
import json
from pathlib import Path

import pytest
from evaluate_script import export, make_dataset
from tiny import make_rows, write_params

from scripts import evaluate
from slmake import params
from slmake.constraints import constrained, guidance
from slmake.errors import UserError
from slmake.prompts import load_prompt
from slmake.rehearsal import checks
from slmake.scoring import onnx_runner

FORM = {"labels": ["joy", "a.b c"], "prompt": "x"}
QUANTIZE = {"precision": "fp32", "calibration": "none", "int8_nodes": [], "matmul_mixed_precision": None}


@pytest.fixture(scope="module")
def onnx(tmp_path_factory, base) -> Path:
    """The untrained base as ONNX: its free answers are no labels."""
    return export(base, tmp_path_factory.mktemp("constrained") / "onnx", "fp32")


def run(folder: Path, dataset: Path, onnx: Path, **section: object) -> tuple[dict, dict, list[dict]]:
    """The export's metrics and timings, and all predictions."""
    given = {"models": ["onnx"], "max_samples": 12, **section}
    gates = {"max_accuracy_drop": None}
    file = write_params(folder / "params.yaml", evaluate=given, quantize=QUANTIZE, gates=gates)
    arguments = ["--params", file, "--dataset", dataset, "--onnx", onnx]
    for name in ("metrics.json", "benchmark.json", "predictions.csv"):
        arguments += [f"--{name.partition('.')[0]}", folder / name]
    evaluate.main([str(argument) for argument in arguments])
    metrics, timings = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "benchmark"))
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as handle:
        return metrics["fp32"], timings["fp32"], list(csv.DictReader(handle))


def test_labels_make_every_answer_valid(tmp_path, dataset, onnx):
    metrics, timings, rows = run(tmp_path, dataset, onnx, constrain="labels")
    labels = json.loads((dataset / "prompt.json").read_text())["labels"]
    assert (metrics["valid"], metrics["outside_labels"], metrics["constrained_valid"]) == (0, 1, 1)
    answers = [row["fp32_constrained"] for row in rows]
    assert len(answers) == 12
    assert set(answers) <= set(labels)
    right = sum(row["fp32_constrained"] == row["expected"] for row in rows) / 12
    assert metrics["constrained_accuracy"] == pytest.approx(right, abs=1e-6)
    assert metrics["constrained_accuracy_low"] <= right <= metrics["constrained_accuracy_high"]
    assert "constrained_macro_f1" in metrics
    assert timings["constrained_latency_ms_p50"] > 0


def test_none_asks_once(tmp_path, dataset, onnx):
    metrics, timings, rows = run(tmp_path, dataset, onnx)
    assert not [key for key in (*metrics, *timings, *rows[0]) if "constrained" in key or key == "valid"]


def test_a_schema_makes_open_answers_valid(tmp_path, base, onnx):
    rows = [
        {"phrase": row["phrase"], "tone": json.dumps({"tone": row["tone"], "id": i})}
        for i, row in enumerate(make_rows(96))
    ]
    dataset = make_dataset(tmp_path / "data", base, rows)
    schema = {
        "type": "object",
        "properties": {"tone": {"enum": ["joy", "fear"]}},
        "required": ["tone"],
        "additionalProperties": False,
    }
    (tmp_path / "tone.json").write_text(json.dumps(schema), encoding="utf-8")
    constraint = {"json_schema": str(tmp_path / "tone.json")}
    metrics, _, answers = run(tmp_path, dataset, onnx, constrain=constraint, max_new_tokens=40)
    assert (metrics["valid"], metrics["constrained_valid"]) == (0, 1)
    assert {json.loads(row["fp32_constrained"])["tone"] for row in answers} <= {"joy", "fear"}
    assert "constrained_rouge_l" in metrics


def test_an_answer_that_is_cut_is_not_valid(tmp_path, dataset, onnx):
    metrics, _, _ = run(tmp_path, dataset, onnx, constrain={"regex": "[a-z]{200}"}, max_new_tokens=4)
    assert (metrics["valid"], metrics["constrained_valid"]) == (0, 0)


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        ({"regex": "(?=joy)joy"}, "evaluate.constrain: answers cannot be held to this regex: "),
        ({"regex": "你好"}, "evaluate.constrain: answers cannot be held to this: it has a character that"),
        ({"json_schema": "nowhere.json"}, "evaluate.constrain: nowhere.json: no such file. Correct the name"),
    ],
    ids=["look-ahead", "characters", "no file"],
)
def test_what_the_runtime_cannot_follow_is_refused(tmp_path, dataset, onnx, refused, constraint, reason):
    assert reason in refused(run, tmp_path, dataset, onnx, constrain=constraint, max_new_tokens=12)
    assert not (tmp_path / "metrics.json").exists()


UNFOLLOWED = [{"uniqueItems": True}, {"not": {}}, {"if": {}}, {"oneOf": [{"type": "object"}, {}]}]
UNFOLLOWED += [{"type": "string", "format": "uri"}]


@pytest.mark.parametrize("stage", ["evaluate", "package"])
def test_rehearse_refuses_what_the_runtime_cannot_follow(tmp_path, dataset, onnx, stage):
    def tried(constraint: str | dict, **sections: dict) -> None:
        given = {stage: {"constrain": constraint}} | sections
        file = write_params(tmp_path / "params.yaml", **given, quantize=QUANTIZE)
        checks.try_constraints(params.load(file), dataset, onnx_runner.load(onnx, load_prompt(dataset)))

    schema = {"json_schema": str(tmp_path / "schema.json")}
    for part in UNFOLLOWED:
        given = {"type": "object", "properties": {"a": part}}
        (tmp_path / "schema.json").write_text(json.dumps(given), encoding="utf-8")
        with pytest.raises(UserError, match=f"{stage}.constrain: answers cannot be held to this json_schema: .*or set"):
            tried(schema)
    with pytest.raises(UserError, match=f"{stage}.constrain: answers cannot be held to this regex: .*or set it to"):
        tried({"regex": "(?!x)[a-z]+"})
    tried({"regex": "(?!x)[a-z]+"}, all={"stages": ["rehearse", "finetune", "merge", "quantize"]})  # asks nobody
    (tmp_path / "schema.json").write_text('{"properties": {"a": {"multipleOf": 0.01}}}', encoding="utf-8")
    for constraint in ("none", "labels", {"regex": "[a-z]+"}, schema):
        tried(constraint)


@pytest.mark.parametrize(
    ("content", "reason"), [("{", "not JSON: "), ("[1]", "not a JSON Schema: an object is expected")]
)
def test_schemas_that_are_none_are_refused(tmp_path, content, reason):
    (tmp_path / "schema.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"package.constrain: .*schema.json: {reason}"):
        constrained(FORM, {"json_schema": str(tmp_path / "schema.json")})


def test_guidance_of_each_kind(tmp_path):
    assert guidance("none", FORM, "x") is None
    assert constrained(FORM, "none") is FORM
    assert guidance("labels", FORM, "x") == ("regex", r" ?(?:joy|a\.b\ c)")
    assert constrained({**FORM, "longest_answer_tokens": 3}, "labels")["longest_answer_tokens"] == len("a.b c") + 2
    assert guidance({"regex": "a+"}, FORM, "x") == ("regex", "a+")
    with pytest.raises(UserError, match="x: labels: the dataset has no labels"):
        guidance("labels", {**FORM, "labels": None}, "x")


@pytest.mark.parametrize(
    "value", ["label", {"regex": "("}, {"regex": ""}, {"pattern": "a"}, {"regex": "a", "json_schema": "b"}, {}, 3]
)
def test_other_constraints_are_refused(value):
    with pytest.raises(ValueError, match="constrain"):
        params.Package(constrain=value)
    for good in ("none", "labels", {"regex": "a"}, {"json_schema": "b.json"}):
        assert params.Package(constrain=good).constrain == good
