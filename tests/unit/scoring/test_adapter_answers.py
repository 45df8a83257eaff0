"""The adapter is asked some rows and has the figures that it would have of all of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_script import merged_adapter, read_json, read_rows, run
from safetensors.torch import load_file, save_file

from slmake.scoring import adapter_answers
from slmake.scoring.run import Run

SECTION = {"max_new_tokens": 4, "parity_prompts": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory, taught) -> dict[str, Path]:
    """The taught model, a small adapter that changes some of its answers, and their merge."""
    return merged_adapter(taught, tmp_path_factory.mktemp("adapter"), rank=2)


def _answers(folder: Path) -> list[str]:
    return [row["adapter"] for row in read_rows(folder / "predictions.csv")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset, models) -> Path:
    """The scores where the adapter is asked every row."""
    section = SECTION | {"parity_prompts": 16}
    return run(tmp_path_factory.mktemp("whole") / "run", dataset, models=models, **section)


def test_some_rows_give_the_figures_of_all(tmp_path, dataset, models, whole):
    some = run(tmp_path / "some", dataset, models=models, **SECTION)
    scores, expected = (read_json(folder / "metrics.json") for folder in (some, whole))
    assert expected["adapter"].pop("rows_asked") == 16
    assert 4 <= scores["adapter"].pop("rows_asked") < 16
    assert scores["adapter"].pop("answer_perplexity") == pytest.approx(
        expected["adapter"].pop("answer_perplexity"), rel=1e-4
    )
    assert scores["adapter"] == expected["adapter"]
    assert _answers(some) == _answers(whole)
    assert len(set(_answers(some))) > 1
    assert scores["drop"] == expected["drop"]
    assert expected["parity"]["merged_vs_adapter"]["prompts"] == 16
    assert 4 <= scores["parity"]["merged_vs_adapter"]["prompts"] < 16


def test_of_a_wrong_merge_every_row_is_asked(tmp_path, dataset, models, whole):
    """An adapter that has nothing to do with the merged model keeps its own answers, and parity says so."""
    wrong = Path(shutil.copytree(models["merged"], tmp_path / "wrong"))
    weights = load_file(wrong / "model.safetensors")
    noise = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if "mlp" in name:
            weights[name] = weight + 0.5 * weight.std() * torch.randn(weight.shape, generator=noise)
    save_file(weights, wrong / "model.safetensors", {"format": "pt"})
    folder = run(tmp_path / "run", dataset, models=models | {"merged": wrong}, **SECTION)
    scores = read_json(folder / "metrics.json")
    assert scores["adapter"]["rows_asked"] == 16
    assert scores["parity"]["merged_vs_adapter"]["prompts"] == 16
    assert scores["parity"]["merged_vs_adapter"]["kl_max"] > 0.01
    assert _answers(folder) == _answers(whole)


def _run(texts: list[str], logits: list, margins: list[float]) -> Run:
    return Run(texts, [], np.zeros(len(texts)), [np.array([[x, 0.0]]) for x in logits], margins=np.array(margins))


@pytest.mark.parametrize(
    ("texts", "logits", "expected"),
    [
        (["a", "b"], [1.0, 2.0], [3]),  # the same function: only the row that is nearly undecided
        (["a", "b"], [1.0, 2.1], [2, 3]),  # rounding that may turn a row, too
        (["a", "x"], [1.0, 2.0], [2, 3, 4]),  # another answer, where none can be: not the same function
        (["a", "b"], [1.0, float("nan")], [2, 3, 4]),
    ],
)
def test_rows_that_rounding_may_turn_are_asked(texts, logits, expected):
    merged = _run(["a", "b", "c", "d", "e"], [1.0, 2.001, 3.0, 4.0, 5.0], [9.0, 9.0, 0.9, 0.001, 9.0])
    adapter = _run([*texts, "", "", ""], [*logits, 0.0, 0.0, 0.0], [np.inf] * 5)
    assert adapter_answers.unclear(adapter, merged, [0, 1]) == expected
