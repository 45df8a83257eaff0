"""Gates that could not be judged are found before training; those that can be are not."""

import json

import pytest
from tiny import make_rows, write_params

from scripts import prepare
from slmake import params
from slmake.errors import UserError
from slmake.rehearsal import trial
from slmake.scoring.questions import Questions
from slmake.scoring.run import empty_run

ALWAYS = ("load_s", "score_s", "prefill_tokens_per_s", "peak_memory_bytes")
LATENCY = ("latency_ms_p50", "latency_ms_p95", "latency_ms_p99")
MEASURED = {"base": ALWAYS, "merged": (*ALWAYS, *LATENCY), "int4": (*ALWAYS, *LATENCY, "generated_tokens_per_s")}


def prepared(folder, base, section):
    """A dataset's folder."""
    stages = {"stages": ["quantize"]} if section is None else {"stages": ["finetune"]}
    file = write_params(folder / "prepare.yaml", all=stages, prepare=section, gates={"min_accuracy": None})
    arguments = ["--params", file, "--base", base, "--output", folder / "dataset", "--report", folder / "report.json"]
    prepare.main([str(argument) for argument in arguments])
    return folder / "dataset"


@pytest.fixture(scope="module")
def many(tmp_path_factory, base):
    """A dataset with 80 test rows."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "rows.json").write_text(json.dumps(make_rows(160)), encoding="utf-8")
    return prepared(folder, base, {"source": str(folder / "rows.json"), "test_fraction": 0.5})


def judge(folder, dataset, checks, of_tasks=None, drawn=0, measured=MEASURED, **sections):
    """The trial of gates beside the short forms, which are left out."""
    gates = {"min_accuracy": None, "max_accuracy_drop": None, "checks": checks} | sections.pop("gates", {})
    everything = params.load(write_params(folder / "params.yaml", gates=gates, **sections))
    questions, runs = Questions(dataset, 4), {}
    for name, timings in measured.items():
        runs[name] = empty_run(questions)
        runs[name].timings = dict.fromkeys(timings, 2.0)
        runs[name].sampled = [["x"] * 4] * drawn
    trial.judge(everything, dataset, runs, of_tasks or {})


GOOD = [
    {"metric": "accuracy", "minimum": 0.9, "interval": "worst"},
    {"metric": "accuracy", "minimum": 0.9, "model": "base"},  # missed or not is not known yet
    {"metric": "macro_f1", "maximum_drop": 0.1, "against": "base", "interval": "best"},
    {"metric": "outside_labels", "maximum_ratio": 1.5},
    {"metric": "restricted_accuracy", "minimum": 0.9, "model": "merged"},
    {"metric": "per_class.joy.recall", "minimum": 0.5},
    {"metric": "answer_perplexity", "maximum_ratio": 1.1},
    {"metric": "kl_mean", "maximum": 0.1},
    {"metric": "size_bytes", "maximum_ratio": 0.5, "against": "base"},
    {"metric": "latency_ms_p95", "maximum_ratio": 0.9},
    {"metric": "load_s", "maximum": 3.0, "model": "base"},
]


def test_gates_that_can_be_judged_are_left_to_the_build(tmp_path, many):
    judge(tmp_path, many, GOOD)


def test_gates_on_metrics_constraints_samples_and_tasks(tmp_path, many):
    (tmp_path / "mine.py").write_text("def own(prompt, expected, answer): return 1 / 0\n", encoding="utf-8")
    figures = ("own", "contains", "constrained_own", "constrained_accuracy", "sampled_own", "sampled_accuracy")
    checks = [{"metric": name, "minimum": 0.5} for name in (*figures, "constrained_valid", "valid", "lm_eval.mine.acc")]
    checks += [{"metric": "own", "maximum_drop": 0.5, "against": "base", "interval": "worst"}]
    checks += [{"metric": "constrained_latency_ms_p50", "maximum": 5.0}]
    evaluate = {
        "metrics": [f"{tmp_path}/mine.py:own", "contains"],
        "constrain": "labels",
        "sampling": {"n": 2},
        "lm_eval": ["mine.yaml"],
    }
    judge(tmp_path, many, checks, {"lm_eval.mine.acc": 0.0}, drawn=2, evaluate=evaluate)


def test_an_adapter_from_elsewhere_and_what_is_merged_with_it_are_scored_later(tmp_path, many):
    """The twin has neither: it is smaller than the base that the adapter fits."""
    stages = {"stages": ["rehearse", "merge", "quantize", "evaluate", "gates"]}
    sections = {
        "all": stages,
        "adapter": {"source": "x/adapter"},
        "evaluate": {"models": ["base", "adapter", "merged", "onnx"]},
    }
    measured = {"base": (*ALWAYS, *LATENCY), "int4": MEASURED["int4"]}
    good = [{"metric": "accuracy", "maximum_drop": 0.1, "against": "merged"}, {"metric": "kl_mean", "maximum": 0.1}]
    good += [
        {"metric": "latency_ms_p50", "maximum_ratio": 1.0},
        {"metric": "accuracy", "minimum": 0.5, "model": "adapter"},
    ]
    judge(tmp_path, many, GOOD + good, measured=measured, **sections)
    with pytest.raises(UserError, match="base has no figure `latency_ms_p50`"):
        judge(
            tmp_path,
            many,
            [{"metric": "latency_ms_p50", "maximum": 9.0, "model": "base"}],
            measured=measured,
            **sections,
        )
    sections["evaluate"] = {"models": ["merged", "onnx"]}
    judge(tmp_path, many, good[:3], measured={"int4": MEASURED["int4"]}, **sections)


def test_figures_of_tasks_that_cannot_be_tried_are_left_to_the_build(tmp_path, many):
    judge(tmp_path, many, [{"metric": "lm_eval.mine.acc", "minimum": 0.5}], evaluate={"lm_eval": ["mine.yaml"]})


def test_a_rate_of_0_says_nothing(tmp_path, many):
    """A twin may end each answer at once."""
    gate = {"metric": "load_s", "maximum_ratio": 0.5, "against": "base"}
    everything = params.load(
        write_params(tmp_path / "params.yaml", gates={"max_accuracy_drop": None, "checks": [gate]})
    )
    runs = {name: empty_run(Questions(many, 4)) for name in ("base", "int4")}
    for run in runs.values():
        run.timings = {"load_s": 0.0}
    trial.judge(everything, many, runs, {})


def test_gates_against_what_was_published(tmp_path, many):
    published = {"test_rows": 80, "int4": {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "size_bytes": 5}}
    (tmp_path / "last.json").write_text(json.dumps(published), encoding="utf-8")
    given = {"published": str(tmp_path / "last.json")}
    judge(tmp_path, many, [{"metric": "accuracy", "maximum_drop": 0.1, "against": "published"}], gates=given)
    with pytest.raises(UserError, match="published has no figure `macro_f1`"):
        judge(tmp_path, many, [{"metric": "macro_f1", "maximum_drop": 0.1, "against": "published"}], gates=given)


@pytest.mark.parametrize(
    ("gate", "sections", "reason"),
    [
        (
            {"metric": "latency_ms_p50", "maximum_ratio": 0.5, "against": "base"},
            {},
            r"base has no figure `latency_ms_p50` on this task\. It has: ",
        ),
        ({"metric": "kl_mean", "maximum": 0.1, "model": "base"}, {}, "base was compared with no model"),
        (
            {"metric": "accuracy", "minimum": 0.5, "model": "adapter"},
            {"evaluate": {"models": ["base", "merged", "onnx"]}},
            "adapter was not scored",
        ),
        (
            {"metric": "accuracy", "minimum": 0.95},
            {"evaluate": {"max_samples": 10}},
            r"needs at least 20 test rows; there are 10\. Add rows, raise prepare\.test_fraction or evaluate\.max_samples",
        ),
        ({"metric": "per_class.anger.recall", "minimum": 0.5}, {}, r"no label `anger`\. Labels: fear, joy"),
    ],
)
def test_a_gate_that_cannot_be_judged_is_refused(tmp_path, many, gate, sections, reason):
    with pytest.raises(UserError, match=rf"gates\.checks\[0\]: .*{reason}"):
        judge(tmp_path, many, [gate], **sections)


def test_without_a_dataset_there_is_a_perplexity(tmp_path, base):
    texts = prepared(tmp_path, base, None)
    sections = {"prepare": None, "all": {"stages": ["rehearse", "quantize", "evaluate", "gates"]}}
    checks = [{"metric": "perplexity", "maximum_ratio": 1.1, "against": "base"}, {"metric": "kl_mean", "maximum": 0.1}]
    checks += [{"metric": "top1_agreement", "minimum": 0.99}]  # of many positions of each text
    judge(tmp_path, texts, checks, **sections)
