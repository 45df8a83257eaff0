"""search and candidate: which options are tried, what is measured on which rows, and who wins."""

import json
from pathlib import Path

import pytest
from tiny import write_params

from scripts import candidate, quantize, search
from slmake import params
from slmake.errors import UserError
from slmake.export import proposals
from slmake.prompts import load_prompt
from slmake.scoring import selection
from slmake.scoring.questions import TUNING, Questions

MANY = {
    "algo_config": ["default", "rtn", "k_quant"],
    "block_size": [16, 32, 64, 128],
    "accuracy_level": [0, 4],
    "matmul_mixed_precision": [None, "last_matmul:int8"],
    "int8_nodes": [[], ["*/attn/*"], ["*/down_proj/*"]],
}


def section(**fields: object) -> params.Quantize:
    return params.Quantize(
        algo_config="rtn", matmul_mixed_precision=None, int8_nodes=[], search=params.Search(**fields)
    )


def entry(number: int, accuracy: float, size: int, latency: float = 10.0) -> dict:
    """What candidate.py measures, in short."""
    return {
        "candidate": number,
        "options": {"block_size": 16 * (number + 1)},
        "metrics": {"accuracy": accuracy, "size_bytes": size},
        "benchmark": {"latency_ms_p50": latency},
        "parity": {
            "prompts": 100,
            "kl_mean": 1 - accuracy,
            "kl_max": 1.0,
            "top1_agreement": 1.0,
            "logit_diff_max": 1.0,
        },
        "drop": {"accuracy": round(0.9 - accuracy, 6), "accuracy_low": 0.0, "accuracy_high": 0.1},
    }


REFERENCE = {"rows": 100, "metrics": {"accuracy": 0.9, "size_bytes": 1000}, "benchmark": {}}


def everything(tmp_path: Path, gates: dict, **fields: object) -> params.Params:
    search_fields = {"block_size": [16, 32, 64], **fields}
    file = write_params(
        tmp_path / "params.yaml",
        quantize={"int8_nodes": [], "search": search_fields},
        gates={"min_accuracy": None, "max_accuracy_drop": None, **gates},
    )
    return params.load(file)


# -- what is tried -----------------------------------------------------------------------------------------------------


def test_grid_is_every_possible_combination():
    """Mixed precision does not go with `default`: of 2 · 2 combinations 3 are left; the section's own options stand for the rest."""
    found = proposals.grid(section(algo_config=["default", "rtn"], matmul_mixed_precision=[None, "last_matmul:int8"]))
    assert [(one["algo_config"], one["matmul_mixed_precision"]) for one in found] == [
        *(("default", None), ("rtn", None), ("rtn", "last_matmul:int8")),
    ]
    assert {one["block_size"] for one in found} == {32}
    assert proposals.count(section(algo_config=["default", "rtn"])) == 2
    assert proposals.batch_before(section(algo_config=["default", "rtn"]), 1) == slice(0)


def test_a_longer_list_builds_only_what_is_new():
    before, after = section(block_size=[16, 32]), section(block_size=[16, 32, 64], budget=20, objective="latency")
    for name in ("merged", "0", "1"):
        assert proposals.depends_on(before, name) == proposals.depends_on(after, name)
    assert proposals.depends_on(before, "0") != proposals.depends_on(before, "1")
    assert proposals.depends_on(section(block_size=[16, 32], rows=50), "0") != proposals.depends_on(before, "0")
    assert proposals.depends_on(section(**MANY), "0") != proposals.depends_on(section(**MANY, seed=1), "0")


def test_impossible_search_is_refused():
    with pytest.raises(UserError, match="none of the combinations is possible"):
        proposals.count(section(algo_config=["default"], int8_nodes=[["*/attn/*"]]))


def test_optuna_proposes_under_the_budget_and_every_job_agrees():
    """Two batches of three: the second depends on what the first measured, and on nothing else."""
    some = section(**MANY, budget=6, batch=3)
    assert proposals.count(some) == 6
    batches = [slice(0, 0)] * 3 + [slice(0, 3)] * 3 + [slice(3, 6)]
    assert [proposals.batch_before(some, number) for number in range(7)] == batches
    first = [proposals.proposal(some, number, []) for number in range(3)]
    measured = [(0.3, 100.0), None, (0.1, 90.0)]
    second = [proposals.proposal(some, number, measured) for number in (3, 4, 5)]
    assert second == [proposals.proposal(some, number, measured) for number in (3, 4, 5)]
    proposed = first + second
    assert all(one in proposals.grid(some) for one in proposed)
    assert all(proposed.count(one) == 1 for one in proposed)
    assert first == [proposals.proposal(some, number, measured) for number in range(3)]


def test_a_batch_carries_the_figures_of_all_batches_before(tmp_path):
    """The third batch reads the second's files only; a candidate that failed, or diverged to infinity, has no figures."""

    def write(number: int, before: list, **result) -> Path:
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "measured.json").write_text(json.dumps({"figures_before": before, **result}), encoding="utf-8")
        return folder

    def figures(kl: float, size: int) -> dict:
        return {"parity": {"kl_mean": kl}, "metrics": {"size_bytes": size}}

    first = [write(0, [], **figures(0.1, 100)), write(1, [], failed="refused")]
    assert selection.figures_before([], "size") == []
    known = selection.figures_before(first, "size")
    second = [write(2, known, **figures(float("inf"), 90)), write(3, known, **figures(0.3, 80))]
    after = [tuple(each) if each else None for each in selection.figures_before(second, "size")]
    assert after == [(0.1, 100), None, None, (0.3, 80)]


def test_optuna_comes_down_to_the_better_region():
    """A made-up landscape where small blocks and kept attention are better: later proposals go there more often than chance."""
    some = section(**MANY, budget=20, batch=4)

    def figures(options: dict) -> tuple[float, float]:
        return (
            0.5 * (options["block_size"] > 32) + 0.5 * (options["int8_nodes"] != ["*/attn/*"]),
            50.0 + (options["block_size"] > 32),
        )

    measured: list = []
    for batch in range(5):
        options = [proposals.proposal(some, 4 * batch + k, measured) for k in range(4)]
        measured += [figures(one) for one in options]
    early, late = measured[:8], measured[12:]
    assert sum(kl for kl, _ in late) / len(late) < sum(kl for kl, _ in early) / len(early)


# -- who wins ----------------------------------------------------------------------------------------------------------


def test_the_smallest_that_passes_wins(tmp_path):
    found = selection.choose(
        everything(tmp_path, {"max_accuracy_drop": 0.02}),
        REFERENCE,
        [
            entry(0, 0.80, 100),
            entry(1, 0.89, 140),
            entry(2, 0.90, 200),
            {"candidate": 3, "options": {}, "failed": "no"},
        ],
    )
    assert (found["winner"], found["options"]) == (1, {"block_size": 32})
    assert [one.get("passed") for one in found["candidates"]] == [False, True, True, None]
    assert [one.get("pareto") for one in found["candidates"]] == [True, True, True, None]


def test_the_fastest_wins_when_asked(tmp_path):
    some = everything(tmp_path, {"max_accuracy_drop": 0.02}, objective="latency")
    found = selection.choose(
        some, REFERENCE, [entry(0, 0.89, 100, 20.0), entry(1, 0.89, 140, 9.0), entry(2, 0.7, 80, 1.0)]
    )
    assert found["winner"] == 1
    assert [one["pareto"] for one in found["candidates"]] == [False, True, True]


def test_pareto_front():
    assert selection.pareto([(0.9, 100), (0.8, 100), (0.9, 120), (0.95, 150), (0.9, 100)]) == [
        True,
        False,
        False,
        True,
        True,
    ]


def test_no_survivor_shows_the_nearest_misses(tmp_path):
    some = everything(tmp_path, {"max_accuracy_drop": 0.01})
    failed = {"candidate": 3, "options": {}, "failed": "ONNX Runtime cannot run it"}
    with pytest.raises(UserError) as caught:
        selection.choose(some, REFERENCE, [entry(0, 0.5, 100), entry(1, 0.88, 140), entry(2, 0.8, 200), failed])
    message = str(caught.value)
    assert message.startswith(
        "none of 4 candidates passes the gates on the tuning rows. The nearest:\ncandidate 1: block_size 32\n"
    )
    assert "MISSED  max_accuracy_drop  int4 against merged  0.0200" in message
    assert "candidate 3 could not be built: ONNX Runtime cannot run it" in message


def test_gates_that_tuning_rows_cannot_judge_are_left_out():
    gates = params.Gates(
        min_accuracy=0.5,
        published="last.json",
        checks=[
            params.Gate(metric="accuracy", minimum=0.1, model="base"),
            params.Gate(metric="accuracy", maximum_drop=0.1, against="published"),
            params.Gate(metric="size_bytes", maximum_ratio=0.25, against="merged"),
            params.Gate(metric="kl_mean", maximum=0.1),
        ],
    )
    assert [gate.metric for gate in selection.tuning_gates(gates).every().values()] == [
        "accuracy",
        "size_bytes",
        "kl_mean",
    ]


def test_too_few_tuning_rows_are_told(tmp_path):
    with pytest.raises(
        UserError, match=r"on the 100 tuning rows of quantize.search: gates.max_accuracy_drop: .* at least 200"
    ):
        selection.choose(everything(tmp_path, {"max_accuracy_drop": 0.005}), REFERENCE, [entry(0, 0.9, 1)])


# -- end to end on a tiny model ----------------------------------------------------------------------------------------


def test_candidates_are_built_measured_and_the_winner_taken_over(tmp_path, base, dataset, capsys):
    """Two possible candidates and one that the builder cannot do, on rows of eval and train."""
    file = write_params(
        tmp_path / "params.yaml",
        quantize={"matmul_mixed_precision": None, "int8_nodes": [], "search": {"block_size": [16, 32], "rows": 20}},
        gates={"min_accuracy": None, "max_accuracy_drop": None, "checks": [{"metric": "kl_mean", "maximum": 5.0}]},
        evaluate={"bootstrap_samples": 100, "latency_rows": 2},
    )
    shared = ["--params", file, "--model", base, "--dataset", dataset]

    def measure(name: str, *more: object) -> dict:
        candidate.main([str(a) for a in [*shared, "--candidate", name, *more, "--output", tmp_path / "search" / name]])
        return json.loads((tmp_path / "search" / name / "measured.json").read_text(encoding="utf-8"))

    merged = measure("merged")
    reference = ["--reference", tmp_path / "search" / "merged"]
    zero, one = measure("0", *reference), measure("1", *reference)
    assert merged["rows"] == 20
    test_rows = set(Questions(dataset).rows)
    assert not test_rows & set(Questions(dataset, 20, TUNING).rows)
    assert [found["options"]["block_size"] for found in (zero, one)] == [16, 32]
    assert zero["metrics"]["size_bytes"] > one["metrics"]["size_bytes"]
    assert 0 < zero["parity"]["kl_mean"] < one["parity"]["kl_mean"] * 1.5
    folders = [tmp_path / "search" / name for name in ("0", "1")]
    arguments = ["--params", file, *reference, "--candidates", *folders, "--output", tmp_path / "search.json"]
    search.main([str(a) for a in arguments])
    result = json.loads((tmp_path / "search.json").read_text(encoding="utf-8"))
    assert result["winner"] == 1
    assert "candidate 1 of 2 is the smallest that passes" in capsys.readouterr().err
    arguments = [
        "--params",
        file,
        "--model",
        base,
        "--search",
        tmp_path / "search.json",
        "--candidates",
        tmp_path / "search",
    ]
    quantize.main([str(a) for a in [*arguments, "--dataset", dataset, "--output", tmp_path / "onnx"]])
    assert load_prompt(tmp_path / "onnx") == load_prompt(dataset)
    for path in (tmp_path / "search" / "1" / "model").iterdir():
        assert (tmp_path / "onnx" / path.name).read_bytes() == path.read_bytes()


def only_candidate(tmp_path, base, dataset) -> list[str]:
    """The arguments for the one candidate of a search, whose pattern matches no node."""
    file = write_params(
        tmp_path / "params.yaml",
        quantize={
            "matmul_mixed_precision": None,
            "int8_nodes": [],
            "search": {"int8_nodes": [["*/nothing/*"]], "rows": 8},
        },
    )
    (tmp_path / "merged").mkdir()
    arguments = [
        "--params",
        file,
        "--candidate",
        "0",
        "--model",
        base,
        "--dataset",
        dataset,
        "--reference",
        tmp_path / "merged",
    ]
    return [str(a) for a in [*arguments, "--output", tmp_path / "0"]]


def test_a_candidate_that_cannot_be_built_is_a_finding(tmp_path, base, dataset):
    candidate.main(only_candidate(tmp_path, base, dataset))
    found = json.loads((tmp_path / "0" / "measured.json").read_text(encoding="utf-8"))
    assert "`*/nothing/*` matches no node" in found["failed"]
    assert not (tmp_path / "0" / "model").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("slmake/export/gptq.py changed after this build was planned."), "gptq.py changed after this build"),
        (RuntimeError("std::bad_alloc"), "out of memory. Use smaller batches"),
    ],
    ids=["changed code", "memory"],
)
def test_what_says_nothing_of_a_candidate_fails_the_rule(tmp_path, base, dataset, monkeypatch, capsys, error, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(candidate, "build", fail)
    with pytest.raises(SystemExit):
        candidate.main(only_candidate(tmp_path, base, dataset))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "0").exists()


def test_winner_that_is_gone_is_named(tmp_path, base, capsys):
    (tmp_path / "search.json").write_text(json.dumps({"winner": 4, "options": {}}), encoding="utf-8")
    arguments = [
        "--params",
        write_params(tmp_path / "params.yaml"),
        "--model",
        base,
        "--search",
        tmp_path / "search.json",
    ]
    with pytest.raises(SystemExit):
        quantize.main([str(a) for a in [*arguments, "--candidates", tmp_path, "--output", tmp_path / "onnx"]])
    assert f"the winner of {tmp_path}/search.json is not there" in capsys.readouterr().err
