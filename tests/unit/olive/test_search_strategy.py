"""What of Olive's search_strategy is taken over, and what cannot be had and is named."""

import pytest
from test_forms import loaded, notes, read
from test_goals import searched


@pytest.mark.parametrize(
    ("given", "algorithm", "tried", "kept"),
    [
        (["default", "rtn"], "k_quant", ["default", "rtn"], []),
        (["k_quant", "k_quant_last"], "k_quant", [], [None, "last_matmul:int8"]),
        (["rtn_last", "rtn"], "rtn", [], ["last_matmul:int8", None]),
        (["k_quant_mixed"], "k_quant", [], ["last_matmul:int8,mixed_layers:int8"]),
    ],
)
def test_several_algorithms(tmp_path, given, algorithm, tried, kept):
    section = loaded(read(searched({"seed": 1}, int4_algo_config=given)), tmp_path).quantize
    assert (section.algo_config, section.search.algo_config) == (algorithm, tried)
    assert section.search.matmul_mixed_precision == kept


@pytest.mark.parametrize("given", [["rtn", "k_quant_last"], ["rtn", "awq"], [], [["rtn"]]])
def test_several_algorithms_that_cannot_be_searched(given):
    assert "passes.builder.int4_algo_config" in notes(read(searched({}, int4_algo_config=given)), "unknown")


def test_several_precisions_cannot_be_searched():
    imported = read(searched({"seed": 1}, precision=["int4", "int8"]))
    assert "several can be searched of algo_config" in notes(imported, "unknown")["passes.builder.precision"]


def test_several_group_sizes_are_block_sizes(tmp_path):
    content = searched({"max_samples": 2})
    content["passes"] = {"gptq": {"type": "Gptq", "group_size": [32, 128]}} | content["passes"]
    search = loaded(read(content), tmp_path).quantize.search
    assert (search.block_size, search.budget) == ([32, 128], 2)


@pytest.mark.parametrize(
    ("priorities", "objective"),
    [
        ({"latency": 1, "size_on_disk": 2}, "latency"),
        ({"latency": 2, "size_on_disk": 1}, "size"),
        ({"accuracy": 1, "throughput": 2}, "latency"),
        ({"accuracy": 1}, "size"),
        ({"latency": -1}, "size"),
    ],
)
def test_the_first_metric_by_priority_is_what_the_search_aims_at(tmp_path, priorities, objective):
    metrics = [
        {"name": kind, "type": kind, "sub_types": [{"name": "avg", "priority": priority}]}
        for kind, priority in priorities.items()
    ]
    content = searched({"seed": 1}, int4_block_size=[16, 32]) | {"evaluators": {"common": {"metrics": metrics}}}
    assert loaded(read(content), tmp_path).quantize.search.objective == objective


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_samples", 0),
        ("max_samples", "many"),
        ("seed", -1),
        ("seed", True),
        ("execution_order", "chaos"),
        ("strange", 1),
        ("search_algorithm_config", [1]),
    ],
)
def test_settings_that_cannot_be_had_are_named(field, value):
    imported = read(searched({field: value}, int4_block_size=[16, 32]))
    assert f"search_strategy.{field}" in notes(imported, "unknown")


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("max_time", 60, "nearest"),
        ("max_time", None, "dropped"),
        ("stop_when_goals_met", True, "nearest"),
        ("stop_when_goals_met", False, "dropped"),
        ("output_model_num", 5, "nearest"),
    ],
)
def test_what_the_search_does_otherwise_is_in_the_table(tmp_path, field, value, kind):
    imported = read(searched({field: value}, int4_block_size=[16, 32]))
    assert f"search_strategy.{field}" in notes(imported, kind)
    assert loaded(imported, tmp_path).quantize.search.budget == 12


def test_each_setting_has_its_line():
    """Also where nothing is searched."""
    settings = {"execution_order": "joint", "sampler": "tpe", "max_samples": 3, "seed": 5}
    for options in ({}, {"int4_block_size": [16, 32]}):
        lines = [row.field for row in read(searched(settings, **options)).rows]
        assert {f"search_strategy.{name}" for name in settings} <= set(lines)
