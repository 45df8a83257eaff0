"""Goals of an Olive search as gates, and options with several values as quantize.search."""

import pytest
from test_forms import BUILDER, loaded, notes, read, small, tutorial


def with_goal(content: dict, kind: str, name: str, goal: object) -> dict:
    metric = {"name": "m", "type": kind, "sub_types": [{"name": name, "priority": 1, "goal": goal}]}
    return content | {"evaluators": {"common": {"metrics": [metric]}}}


FIELD = "evaluators.common.metrics.0.sub_types.0.goal"


@pytest.mark.parametrize(
    ("kind", "name", "goal", "gate"),
    [
        ("accuracy", "accuracy_score", {"type": "threshold", "value": 0.8}, ("accuracy", "minimum", 0.8)),
        ("accuracy", "accuracy_score", {"type": "max-degradation", "value": 0.02}, ("accuracy", "maximum_drop", 0.02)),
        ("accuracy", "f1_score", {"type": "min-improvement", "value": 0.1}, ("macro_f1", "maximum_drop", -0.1)),
        ("accuracy", "f1_score", {"type": "percent-max-degradation", "value": 5}, ("macro_f1", "minimum_ratio", 0.95)),
        ("latency", "avg", {"type": "percent-min-improvement", "value": 20}, ("latency_ms_p50", "maximum_ratio", 0.8)),
        ("latency", "p99", {"type": "threshold", "value": 40}, ("latency_ms_p99", "maximum", 40.0)),
        ("throughput", "avg", {"type": "percent-min-improvement", "value": 10}, ("generated_tokens_per_s", "minimum_ratio", 1.1)),
        ("size_on_disk", "bytes", {"type": "percent-max-degradation", "value": 10}, ("size_bytes", "maximum_ratio", 1.1)),
    ],
)  # fmt: skip
def test_a_goal_is_a_gate(tmp_path, kind, name, goal, gate):
    made = loaded(read(with_goal(tutorial(old=False), kind, name, goal)), tmp_path)
    (check,) = made.gates.checks
    assert (check.metric, check.kind, check.bound) == gate
    assert "gates" in made.all.stages


@pytest.mark.parametrize(
    ("kind", "name", "goal"),
    [
        ("latency", "avg", {"type": "min-improvement", "value": 3}),
        ("latency", "avg", {"type": "percent-min-improvement", "value": 100}),
        ("custom", "score", {"type": "threshold", "value": 1}),
        ("accuracy", ["accuracy_score"], {"type": "threshold", "value": 1}),
        ("accuracy", "accuracy_score", {"type": "threshold"}),
        ("accuracy", "accuracy_score", "high"),
    ],
)
def test_a_goal_that_no_gate_says_is_named(tmp_path, kind, name, goal):
    imported = read(with_goal(tutorial(old=False), kind, name, goal))
    assert "no gate says this" in notes(imported, "nearest")[FIELD]
    assert "gates" not in loaded(imported, tmp_path).all.stages


def test_goals_without_a_dataset(tmp_path):
    accuracy = with_goal(small(BUILDER), "accuracy", "accuracy_score", {"type": "threshold", "value": 0.8})
    assert "bound kl_mean or perplexity" in notes(read(accuracy), "nearest")[FIELD]
    assert loaded(read(accuracy), tmp_path).all.stages == ["quantize", "evaluate", "report"]
    latency = with_goal(small(BUILDER), "latency", "avg", {"type": "percent-min-improvement", "value": 20})
    assert loaded(read(latency), tmp_path).gates.checks[0].against == "previous"


def searched(strategy: object, **options: object) -> dict:
    content = tutorial(old=False) | {"search_strategy": strategy}
    content["passes"]["builder"] |= options
    return content


@pytest.mark.parametrize(
    "settings",
    [
        {"num_samples": 5, "seed": 7},
        {"search_algorithm_config": {"num_samples": 5, "seed": 7, "multivariate": True}},
        {"sampler": "tpe", "max_samples": 5, "seed": 7, "max_iter": None, "include_pass_params": True},
    ],
)
def test_options_with_several_values_are_searched(tmp_path, settings):
    strategy = {"execution_order": "joint", "search_algorithm": "tpe"} | settings
    content = searched(
        strategy, int4_block_size=[16, 32], int4_accuracy_level=[1, 4], int4_algo_config=["rtn", "k_quant"]
    )
    search = loaded(read(content), tmp_path).quantize.search
    assert (search.block_size, search.accuracy_level, search.algo_config) == ([16, 32], [1, 4], ["rtn", "k_quant"])
    assert (search.budget, search.seed) == (5, 7)
    assert loaded(read(content), tmp_path).quantize.matmul_mixed_precision is None  # both names say 4 bits throughout
    plain = loaded(read(searched(False, int4_block_size=[16, 32])), tmp_path).quantize.search
    assert (plain.block_size, plain.budget) == ([16, 32], 12)


def test_a_search_over_nothing_and_one_without_a_dataset():
    imported = read(searched({"execution_order": "joint"}))
    assert "no option has several values" in notes(imported, "nearest")["search_strategy"]
    without = small(BUILDER | {"int4_block_size": [16, 32]}, engine={"search_strategy": {"seed": 1}})
    assert "no pass names one" in notes(read(without), "unknown")["engine.search_strategy"]
    assert (
        "one value is expected"
        in notes(read(small(BUILDER | {"shared_embeddings": [True]})), "unknown")["passes.p0.shared_embeddings"]
    )
    assert "expected a mapping" in notes(read(small(BUILDER, search_strategy="joint")), "unknown")["search_strategy"]
