"""gates: every gate is judged with its figures, a miss fails the build, and the metrics stay."""

import json
import unicodedata
from pathlib import Path

import pytest
from tiny import write_params

from scripts.gates import main
from slmake import params
from slmake.errors import UserError
from slmake.scoring import gates

METRICS = {
    "test_rows": 240,
    "base": {
        "accuracy": 0.25,
        "accuracy_low": 0.2,
        "accuracy_high": 0.3,
        "macro_f1": 0.2,
        "outside_labels": 0.1,
        "size_bytes": 5380,
    },
    "adapter": {"accuracy": 0.82, "accuracy_low": 0.77, "accuracy_high": 0.87, "macro_f1": 0.8, "size_bytes": 20},
    "merged": {
        "accuracy": 0.82,
        "accuracy_low": 0.77,
        "accuracy_high": 0.87,
        "macro_f1": 0.8,
        "outside_labels": 0.0,
        "size_bytes": 5380,
    },
    "int4": {
        "accuracy": 0.8,
        "accuracy_low": 0.75,
        "accuracy_high": 0.85,
        "macro_f1": 0.78,
        "outside_labels": 0.0,
        "size_bytes": 1000,
        "per_class": {"joy": {"precision": 0.9, "recall": 0.7, "f1": 0.79, "rows": 60}},
    },
    "parity": {
        "int4_vs_merged": {
            "prompts": 240,
            "kl_mean": 0.02,
            "kl_max": 0.3,
            "top1_agreement": 0.95,
            "logit_diff_max": 2.5,
        }
    },
    "drop": {"int4_vs_merged": {"accuracy": 0.02, "accuracy_low": -0.01, "accuracy_high": 0.045}},
}
TIMES = {"int4": {"latency_ms_p95": 120.0}}


def run(folder: Path, metrics: dict = METRICS, **section: object) -> Path:
    """Run the script in this process; returns the judgement's file."""
    settings = {"min_accuracy": None, "max_accuracy_drop": None, "checks": [], **section}
    file = write_params(folder / "params.yaml", gates=settings)
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (folder / "benchmark.json").write_text(json.dumps(TIMES), encoding="utf-8")
    arguments = ["--params", file, "--metrics", folder / "metrics.json", "--benchmark", folder / "benchmark.json"]
    main([str(argument) for argument in [*arguments, "--output", folder / "gates.json"]])
    return folder / "gates.json"


def missed(folder: Path, capsys, metrics: dict = METRICS, **section: object) -> str:
    """The script's error: exit code 1, no judgement written, and the metrics as they were."""
    with pytest.raises(SystemExit) as caught:
        run(folder, metrics, **section)
    assert caught.value.code == 1
    assert not (folder / "gates.json").exists()
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8")) == metrics
    message = capsys.readouterr().err
    return message[message.index("gates: error: ") :]


def verdict(published: dict | None = None, **gate: object) -> dict:
    """One gate judged on the metrics above."""
    section = params.Gates(checks=[params.Gate(**gate)], published="last.json" if published else None)
    (found,) = gates.judge(section, METRICS, TIMES, published)
    return found


def test_both_short_gates_pass_and_are_written(tmp_path, capsys):
    file = run(tmp_path, min_accuracy=0.75, max_accuracy_drop=0.05)
    first, second = json.loads(file.read_text(encoding="utf-8"))["gates"]
    assert first == {
        "gate": "min_accuracy",
        "metric": "accuracy",
        "kind": "minimum",
        "model": "int4",
        "bound": 0.75,
        "value": 0.8,
        "low": 0.75,
        "high": 0.85,
        "interval": "ignore",
        "passed": True,
    }
    assert second == {
        "gate": "max_accuracy_drop",
        "metric": "accuracy",
        "kind": "maximum_drop",
        "model": "int4",
        "against": "merged",
        "bound": 0.05,
        "value": 0.02,
        "low": -0.01,
        "high": 0.045,
        "interval": "ignore",
        "passed": True,
    }
    message = capsys.readouterr().err
    assert "gates: all 2 gates passed" in message
    assert "  passed  min_accuracy       int4                 0.8000  [0.7500, 0.8500]   ≥ 0.7500" in message
    assert "  passed  max_accuracy_drop  int4 against merged  0.0200  [-0.0100, 0.0450]  ≤ 0.0500" in message


def test_bounds_themselves_pass(tmp_path):
    """0.82 - 0.8 is a little more than 0.02 in floating point; it is not a miss."""
    found = json.loads(run(tmp_path, min_accuracy=0.8, max_accuracy_drop=0.02).read_text(encoding="utf-8"))
    assert [one["passed"] for one in found["gates"]] == [True, True]


def test_missed_gates_show_figures_and_advice_all_at_once(tmp_path, capsys):
    message = missed(
        tmp_path, capsys, min_accuracy=0.85, max_accuracy_drop=0.01, checks=[{"metric": "macro_f1", "minimum": 0.7}]
    )
    assert "gates: error: 2 of 3 gates missed.\n  MISSED  min_accuracy " in message
    assert "  passed  checks[0] minimum of macro_f1 " in message
    assert "  min_accuracy is missed by 0.0500: train longer (finetune.num_train_epochs)" in message
    assert "  max_accuracy_drop is missed by 0.0100: choose a milder quantization" in message
    assert f"{tmp_path}/metrics.json stays as it is." in message


def test_missed_gate_can_be_lowered_and_judged_again(tmp_path, capsys):
    missed(tmp_path, capsys, min_accuracy=0.81)
    found = json.loads(run(tmp_path, min_accuracy=0.79).read_text(encoding="utf-8"))
    assert found["gates"][0]["passed"] is True


def test_no_gate_is_set(tmp_path, capsys):
    assert json.loads(run(tmp_path).read_text(encoding="utf-8")) == {"gates": []}
    assert capsys.readouterr().err == "gates: no gate is set\n"


@pytest.mark.parametrize(
    ("gate", "value", "passed"),
    [
        ({"metric": "macro_f1", "minimum": 0.78}, 0.78, True),
        ({"metric": "outside_labels", "maximum": 0.05, "model": "base"}, 0.1, False),
        ({"metric": "per_class.joy.recall", "minimum": 0.75}, 0.7, False),
        ({"metric": "latency_ms_p95", "maximum": 150, "model": "onnx"}, 120.0, True),
        ({"metric": "top1_agreement", "minimum": 0.96}, 0.95, False),
        ({"metric": "kl_mean", "maximum": 0.05}, 0.02, True),
        ({"metric": "macro_f1", "maximum_drop": 0.01}, 0.02, False),
        ({"metric": "accuracy", "maximum_drop": 0.01, "against": "base"}, -0.55, True),
        ({"metric": "accuracy", "minimum_ratio": 0.99, "against": "merged"}, 0.97561, False),
        ({"metric": "size_bytes", "maximum_ratio": 0.25, "against": "merged"}, 0.185874, True),
    ],
)
def test_any_figure_can_be_gated(gate, value, passed):
    found = verdict(**gate)
    assert (found["value"], found["passed"]) == (value, passed)


@pytest.mark.parametrize(
    ("gate", "ignore", "worst", "best"),
    [
        ({"metric": "accuracy", "minimum": 0.78}, True, False, True),  # 0.8, 0.75 to 0.85
        ({"metric": "accuracy", "minimum": 0.74}, True, True, True),
        ({"metric": "accuracy", "minimum": 0.84}, False, False, True),
        ({"metric": "accuracy", "minimum": 0.86}, False, False, False),
        ({"metric": "accuracy", "maximum_drop": 0.03}, True, False, True),  # 0.02, -0.01 to 0.045
        ({"metric": "accuracy", "maximum_drop": 0.05}, True, True, True),
    ],
)
def test_the_interval_counts_when_asked(gate, ignore, worst, best):
    found = {kind: verdict(**gate, interval=kind)["passed"] for kind in ("ignore", "worst", "best")}
    assert found == {"ignore": ignore, "worst": worst, "best": best}


def test_drop_against_the_published_model():
    """Two test sets are independent: the half-widths 0.05 and 0.03 add up to the root of the sum of their squares."""
    published = {"test_rows": 500, "int4": {"accuracy": 0.83, "accuracy_low": 0.8, "accuracy_high": 0.86}}
    found = verdict(published, metric="accuracy", maximum_drop=0.02, against="published")
    assert (found["against"], found["value"], found["passed"]) == ("published", 0.03, False)
    assert found["high"] == pytest.approx(0.03 + (0.05**2 + 0.03**2) ** 0.5, abs=1e-6)
    assert verdict(published, metric="accuracy", maximum_drop=0.02, against="published", interval="best")["passed"]


def test_published_metrics_are_read_as_they_come(tmp_path):
    metrics = {"int4": {"accuracy": 0.9}}
    section = params.Gates(published=str(tmp_path / "last.json"))
    with pytest.raises(UserError, match=r"gates.published: .*last.json: no such file"):
        gates.read_published(section)
    for content in (metrics, {"digest": "x", "metrics": metrics}):
        (tmp_path / "last.json").write_text(json.dumps(content), encoding="utf-8")
        assert gates.read_published(section) == metrics
    for content in ("[]", "{", '{"metrics": {}}', '{"metrics": 5}', '{"int4": 5}', '{"int4": {"accuracy": "high"}}'):
        (tmp_path / "last.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"gates.published: .*last.json: .* It should be .* metrics.json"):
            gates.read_published(section)
    (tmp_path / "last.json").unlink()
    (tmp_path / "last.json").mkdir()
    with pytest.raises(UserError, match=r"gates.published: .*last.json: a folder. It should be .* metrics.json"):
        gates.read_published(section)


@pytest.mark.parametrize(
    ("gate", "rows"),
    [
        ({"metric": "accuracy", "minimum": 0.75}, 4),
        ({"metric": "accuracy", "minimum": 0.99}, 100),
        ({"metric": "accuracy", "minimum": 0.95, "interval": "worst"}, 73),  # 1.96² · 0.95 / 0.05
        ({"metric": "accuracy", "maximum_drop": 0.01}, 100),
        ({"metric": "accuracy", "maximum_drop": 0.01, "interval": "worst"}, 381),
        ({"metric": "accuracy", "minimum": 1.0}, 1),
        ({"metric": "accuracy", "maximum_drop": 0.0}, 1),
        ({"metric": "latency_ms_p50", "maximum": 0.5}, 1),
    ],
)
def test_rows_that_a_gate_needs(gate, rows):
    assert params.Gate(**gate).rows_needed() == rows


def test_test_split_too_small_for_the_gate(tmp_path, capsys):
    message = missed(
        tmp_path, capsys, METRICS | {"test_rows": 240}, checks=[{"metric": "accuracy", "maximum_drop": 0.001}]
    )
    assert "gates.checks[0]: maximum_drop 0.001 of accuracy needs at least 1000 test rows; there are 240." in message
    assert "raise prepare.test_fraction" in message


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ({"metric": "acuracy", "minimum": 0.5}, "unknown metric `acuracy`; did you mean `accuracy`"),
        ({"metric": "accuracy"}, "give exactly one of minimum, maximum"),
        ({"metric": "accuracy", "minimum": 0.5, "maximum": 0.9}, "give exactly one of minimum, maximum"),
        ({"metric": "latency_ms_p50", "maximum_drop": 0.5}, "more is not better"),
        ({"metric": "outside_labels", "maximum": 0.5, "interval": "worst"}, "intervals for minimum, maximum"),
        ({"metric": "kl_mean", "maximum_drop": 0.5, "against": "base"}, "more is not better"),
        (
            {"metric": "accuracy", "maximum_drop": 0.1, "against": "published"},
            "name the last published model's metrics.json",
        ),
    ],
)
def test_impossible_gates_are_refused_with_params_yaml(tmp_path, capsys, gate, told):
    assert told in missed(tmp_path, capsys, checks=[gate])


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ({"metric": "rouge_l", "minimum": 0.5}, "int4 has no figure `rouge_l` on this task. It has: accuracy, "),
        ({"metric": "per_class.joie.f1", "minimum": 0.5}, "no label `joie`. Labels: joy."),
        ({"metric": "load_s", "maximum": 5.0}, "int4 has no figure `load_s`"),
        ({"metric": "macro_f1", "minimum": 0.5, "interval": "worst"}, "there is no interval for macro_f1 here"),
        ({"metric": "kl_mean", "maximum": 0.5, "model": "base"}, "base was compared with no model"),
    ],
)
def test_figures_that_are_not_there(tmp_path, capsys, gate, told):
    assert told in missed(tmp_path, capsys, checks=[gate])


def test_last_model_is_judged_against_the_one_before():
    """Without the exported model: merged against base, and never against adapter; without finetune: the export against base."""
    section = params.Gates(min_accuracy=0.5, max_accuracy_drop=0.1)
    first, second = gates.judge(section, {name: METRICS[name] for name in ("test_rows", "base", "adapter", "merged")})
    assert (first["model"], first["value"], first["passed"]) == ("merged", 0.82, True)
    assert (second["against"], second["value"], second["passed"]) == ("base", -0.57, True)
    first, second = gates.judge(section, {"test_rows": 90, "base": {"accuracy": 0.7}, "fp32": {"accuracy": 0.55}})
    assert (first["model"], first["passed"]) == ("fp32", True)
    assert (second["against"], second["value"], second["passed"]) == ("base", 0.15, False)


def test_drop_without_a_model_to_compare_with_does_not_pass_in_silence(tmp_path, capsys):
    """A gate that is set and cannot be judged is not a passed gate."""
    message = missed(tmp_path, capsys, {"test_rows": 90, "int4": METRICS["int4"]}, max_accuracy_drop=0.02)
    assert "gates.max_accuracy_drop: no model before int4 was scored to compare with" in message


def test_missing_metrics_are_named(tmp_path, capsys):
    file = write_params(tmp_path / "params.yaml", gates={"min_accuracy": 0.5})
    with pytest.raises(SystemExit) as caught:
        main(["--params", str(file), "--metrics", str(tmp_path / "no.json"), "--output", str(tmp_path / "g.json")])
    assert caught.value.code == 1
    assert f"{tmp_path}/no.json" in capsys.readouterr().err
    assert not (tmp_path / "g.json").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"base": {}}, "`base` has no `accuracy`"),
        ({"int4": 5}, "`int4` is not an object of figures but 5"),
        ({"int4": METRICS["int4"] | {"accuracy": "high"}}, '`int4.accuracy` is not a number but "high"'),
        ({"int4": METRICS["int4"] | {"accuracy": None}}, "`int4.accuracy` is not a number but null"),
        ({"int4": METRICS["int4"] | {"macro_f1_low": 0.7}}, "`int4` has no `macro_f1_high`"),
        ({"int4": METRICS["int4"] | {"per_class": {"joy": {}}}}, "`int4.per_class.joy` has no `precision`"),
        ({"int4": METRICS["int4"] | {"confusion": [[1, 2], [3]]}}, "`int4.confusion` is not 1 rows of 2 counts"),
        ({"test_rows": "24"}, '`metrics.test_rows` is not a number but "24"'),
        ({"parity": {"int4_vs_merged": {}}}, "`parity.int4_vs_merged` has no `prompts`"),
        ({"drop": 5}, "`drop` is not an object of figures but 5"),
    ],
)
def test_damaged_metrics_are_named(tmp_path, capsys, change, told):
    message = missed(tmp_path, capsys, METRICS | change, min_accuracy=0.5)
    file = tmp_path / "metrics.json"
    assert message == (
        f"gates: error: {file} is damaged: {told}. Remove {file} and run snakemake: it is built again.\n"
    )


def test_damaged_timings_are_named(tmp_path):
    (tmp_path / "benchmark.json").write_text('{"int4": {"latency_ms_p95": "fast"}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"benchmark.json is damaged: `benchmark.int4.latency_ms_p95` is not a number"):
        gates.read_timings(tmp_path / "benchmark.json")


def test_existing_judgement_is_refused(tmp_path, capsys):
    before = run(tmp_path, min_accuracy=0.5).read_bytes()
    with pytest.raises(SystemExit):
        run(tmp_path, min_accuracy=0.6)
    assert f"{tmp_path}/gates.json already exists" in capsys.readouterr().err
    assert (tmp_path / "gates.json").read_bytes() == before


# -- the runtime's tokenizer -------------------------------------------------------------------------------------------

AGREES = {"rows": 240, "encode_differ": 0, "decode_differ": 0, "hard_texts": 20, "hard_encode_differ": 4}
DIFFERS = {**AGREES, "encode_differ": 3, "first": {"row": 12, "training": ["<s>", "a"], "runtime": ["a"]}}


def with_tokenizer(agreement: dict) -> dict:
    return {**METRICS, "parity": {**METRICS["parity"], "tokenizer": agreement}}


def test_tokenizer_that_agrees_passes_whatever_hard_texts_do(tmp_path):
    (entry,) = json.loads(run(tmp_path, with_tokenizer(AGREES)).read_text(encoding="utf-8"))["gates"]
    assert entry == {
        "gate": "max_tokenizer_differences",
        "metric": "tokenizer_differences",
        "kind": "maximum",
        "model": "int4",
        "bound": 0,
        "value": 0,
        "passed": True,
    }


def test_tokenizer_that_differs_is_refused_with_the_first_row(tmp_path, capsys):
    message = missed(tmp_path, capsys, with_tokenizer(DIFFERS))
    assert "1 of 1 gates missed.\n  MISSED  max_tokenizer_differences  int4  3.0000  " in message
    assert (
        "max_tokenizer_differences is missed by 3.0000: row 12 has ['<s>', 'a'] in training and ['a'] in the runtime"
        in message
    )
    assert "or allow so many differences with gates.max_tokenizer_differences." in message


@pytest.mark.parametrize(("bound", "count"), [(3, 1), (None, 0)])
def test_tokenizer_gate_can_be_set_or_left_out(tmp_path, bound, count):
    file = run(tmp_path, with_tokenizer(DIFFERS), max_tokenizer_differences=bound)
    assert len(json.loads(file.read_text(encoding="utf-8"))["gates"]) == count


def test_decoding_counts_too(tmp_path, capsys):
    agreement = {**AGREES, "decode_differ": 1, "first": {"row": 3, "training": "a  b", "runtime": "a▁▁b"}}
    assert "row 3 has 'a  b' in training and 'a▁▁b' in the runtime" in missed(
        tmp_path, capsys, with_tokenizer(agreement)
    )


@pytest.mark.parametrize(
    ("agreement", "reason"),
    [
        ({"rows": 3}, "`parity.tokenizer` has no `encode_differ`"),
        ([], "`parity.tokenizer` is not an object of figures"),
    ],
)
def test_damaged_tokenizer_figures_are_named(tmp_path, capsys, agreement, reason):
    assert reason in missed(tmp_path, capsys, with_tokenizer(agreement))


def test_latency_of_another_device_cannot_be_gated(tmp_path, capsys):
    metrics = {**METRICS, "providers": {"int4": {"exported_for": "dml", "scored_on": "cpu"}}}
    gate = {"metric": "latency_ms_p95", "maximum": 1000.0}
    message = missed(tmp_path, capsys, metrics, checks=[gate])
    assert (
        "gates.checks[0]: int4 was exported for dml, but latency_ms_p95 was measured on cpu. Run evaluate on the"
        in message
    )
    run(tmp_path, metrics, checks=[{"metric": "accuracy", "minimum": 0.5}])


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_label_is_found_in_another_unicode_form(form):
    section = params.Gates(checks=[params.Gate(metric="per_class.f\u00eate.f1", minimum=0.5)])
    gates.check_figures(section, [unicodedata.normalize(form, "f\u00eate"), "fear"])
    with pytest.raises(UserError, match="no label"):
        gates.check_figures(section, ["fete"])


@pytest.mark.parametrize(("labels", "refused"), [(["joy", "fear"], False), (["fear"], True), (None, True)])
def test_a_gate_on_a_label_that_no_row_has_is_found_before_training(labels, refused):
    section = params.Gates(checks=[params.Gate(metric="per_class.joy.f1", minimum=0.5)])
    if refused:
        with pytest.raises(UserError, match=r"gates\.checks\[0\]: no label `joy`"):
            gates.check_figures(section, labels)
    else:
        gates.check_figures(section, labels)


@pytest.mark.parametrize("of", ["labels", "text"])
def test_a_gate_on_a_figure_of_other_answers_is_found_before_training(of):
    of_labels = ["macro_f1", "outside_labels", "restricted_accuracy", "constrained_macro_f1"]
    figures = {"labels": of_labels, "text": ["rouge_l", "constrained_rouge_l", "sampled_rouge_l"]}
    here, other = (["joy"], None) if of == "labels" else (None, ["joy"])
    for metric in figures[of]:
        section = params.Gates(min_accuracy=0.5, checks=[params.Gate(metric=metric, minimum=0.5)])
        gates.check_figures(section, here)
        with pytest.raises(UserError, match=rf"gates\.checks\[0\]: {metric} is a figure of .* Bound accuracy or"):
            gates.check_figures(section, other)
