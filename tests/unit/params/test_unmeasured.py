"""Gates on what evaluate does not measure, and constraints with nothing to hold, are refused before anything is built."""

import pytest
from tiny import write_params

from slmake import params
from slmake.errors import UserError


@pytest.mark.parametrize(
    ("evaluate", "gate", "message"),
    [
        ({}, {"metric": "constrained_accuracy", "minimum": 0.5}, "measured where evaluate.constrain is set"),
        ({}, {"metric": "valid", "minimum": 0.5}, "measured where evaluate.constrain is set"),
        (
            {"constrain": "labels"},
            {"metric": "constrained_accuracy", "minimum": 0.5, "model": "merged"},
            "only the exported model has the figure constrained_accuracy",
        ),
        (
            {"constrain": "labels"},
            {"metric": "constrained_accuracy", "maximum_drop": 0.1},
            "only the exported model has the figure constrained_accuracy",
        ),
        (
            {"lm_eval": ["wikitext"]},
            {"metric": "lm_eval.wikitext.word_perplexity", "maximum_drop": 0.1},
            "more is not better",
        ),
        (
            {"lm_eval": ["hellaswag"]},
            {"metric": "lm_eval.hellaswag.acc", "minimum": 0.1, "model": "adapter"},
            "the harness does not run the adapter",
        ),
    ],
)
def test_gates_that_can_never_be_judged(tmp_path, evaluate, gate, message):
    file = write_params(tmp_path / "params.yaml", evaluate=evaluate, gates={"checks": [gate]})
    with pytest.raises(UserError) as caught:
        params.load(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("evaluate", "gate"),
    [
        ({"constrain": "labels"}, {"metric": "constrained_accuracy", "minimum": 0.5}),
        ({"constrain": "tools", "metrics": ["tool_name"]}, {"metric": "constrained_tool_name", "minimum": 0.5}),
        ({"lm_eval": ["hellaswag"]}, {"metric": "lm_eval.hellaswag.acc", "maximum_drop": 0.1}),
        ({"lm_eval": ["wikitext"]}, {"metric": "lm_eval.wikitext.word_perplexity", "maximum_ratio": 1.1}),
    ],
)
def test_gates_that_can(tmp_path, evaluate, gate):
    file = write_params(tmp_path / "params.yaml", evaluate=evaluate, gates={"checks": [gate]})
    assert params.load(file).gates.checks[0].metric == gate["metric"]


def test_a_constraint_without_rows(tmp_path):
    stages = ["quantize", "evaluate"]
    file = write_params(
        tmp_path / "params.yaml", all={"stages": stages}, prepare=None, evaluate={"constrain": {"regex": "a"}}
    )
    with pytest.raises(UserError, match="it holds answers to a dataset's rows"):
        params.load(file)
