"""params.yaml without a section prepare: what it may ask for, and what is refused by name."""

import pytest
from tiny import write_params

from slmake import params
from slmake.errors import UserError
from slmake.plan import Plan

KL = {"metric": "kl_mean", "maximum": 0.5}


def write(folder, **changes):
    """The shipped params.yaml without its section prepare and without gates on accuracy, changed as `write_params` does."""
    gates = {"min_accuracy": None, "max_accuracy_drop": None} | changes.pop("gates", {})
    return write_params(folder / "params.yaml", **{"prepare": None, "gates": gates} | changes)


@pytest.mark.parametrize(
    ("stages", "built"),
    [
        (["quantize"], ["quantize", "evaluate"]),  # without a dataset nothing else shows what quantization changed
        (["quantize", "evaluate"], ["quantize", "evaluate"]),
        (["rehearse", "quantize", "evaluate", "gates", "package", "report"],) * 2,
    ],
)
def test_a_model_is_exported_without_a_dataset(tmp_path, stages, built):
    plan = Plan(params.load(write(tmp_path, all={"stages": stages}, gates={"checks": [KL]})))
    assert plan.params.prepare is None
    assert plan.data == []
    assert plan.tuned == "build/base"
    assert plan.rules == ["fetch_model", "prepare", *built]
    assert "-m scripts[.]prepare " not in plan.online
    assert plan.section("prepare") == "null"


def test_an_adapter_from_elsewhere_is_merged_without_a_dataset(tmp_path):
    path = write(tmp_path, all={"stages": ["merge", "quantize"]}, adapter={"source": "data/adapter"})
    plan = Plan(params.load(path))
    assert plan.tuned == "build/merged"
    assert plan.stages == ["merge", "quantize", "evaluate"]
    assert Plan(params.load(write(tmp_path, prepare={}, all={"stages": ["quantize"]}))).stages == ["quantize"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"all": {"stages": ["finetune"]}}, "prepare: missing, and finetune in all.stages needs a dataset"),
        ({"quantize": {"search": {"block_size": [16, 32]}}}, "quantize.search: candidates are compared on a dataset's"),
        ({"evaluate": {"metrics": ["contains"]}}, "evaluate.metrics: they judge answers to a dataset's rows"),
        ({"gates": {"min_accuracy": 0.8}}, "gates.min_accuracy: accuracy is of rows with expected answers"),
        ({"gates": {"max_accuracy_drop": 0.1}}, "gates.max_accuracy_drop: accuracy is of rows"),
        (
            {"gates": {"checks": [KL, {"metric": "answer_perplexity", "maximum": 9.0}]}},
            "gates.checks[1]: answer_perplexity is of rows",
        ),
        (
            {"gates": {"checks": [{"metric": "per_class.joy.f1", "minimum": 0.5}]}},
            "gates.checks[0]: per_class.joy.f1 is",
        ),
    ],
)
def test_what_needs_rows_is_refused_by_name(tmp_path, sections, message):
    stages = {"all": {"stages": ["quantize", "evaluate", "gates"]}}
    with pytest.raises(UserError) as refused:
        params.load(write(tmp_path, **(stages | sections)))
    assert message in str(refused.value)
    assert "1 error; nothing was run" in str(refused.value)


@pytest.mark.parametrize(
    "metric", ["kl_mean", "top1_agreement", "logit_diff_max", "perplexity", "size_bytes", "load_s"]
)
def test_gates_that_need_no_rows_are_taken(tmp_path, metric):
    path = write(
        tmp_path,
        all={"stages": ["quantize", "evaluate", "gates"]},
        gates={"checks": [{"metric": metric, "maximum": 1.0}]},
    )
    assert params.load(path).gates.checks[0].metric == metric


def test_perplexity_of_the_texts_is_no_figure_of_a_dataset(tmp_path):
    path = write(tmp_path, prepare={}, gates={"checks": [{"metric": "perplexity", "maximum": 9.0}]})
    with pytest.raises(UserError, match=r"gates\.checks\[0\]: perplexity is of the fixed texts"):
        params.load(path)


def test_null_says_the_same_as_no_section(tmp_path):
    path = write(tmp_path, all={"stages": ["quantize"]})
    absent = params.load(path)
    path.write_text(path.read_text(encoding="utf-8") + "prepare: null\n", encoding="utf-8")
    assert params.sums(params.load(path)) == params.sums(absent)


def test_a_section_without_a_source_is_a_mistake_and_not_the_lack_of_a_dataset(tmp_path):
    path = write(tmp_path, all={"stages": ["quantize"]})
    path.write_text(path.read_text(encoding="utf-8") + "prepare: {}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"prepare\.source: missing"):
        params.load(path)
