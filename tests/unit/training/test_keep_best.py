"""finetune: keep_best keeps the adapter with the lowest eval loss, and trains to the end."""

import pytest
from finetune_script import SETTINGS, curve, make_dataset, plain_loss, refused, tune

from slmake import params
from slmake.errors import UserError


@pytest.mark.parametrize(("keep_best", "kept"), [(True, 0), (False, 2)])
def test_keep_best_takes_the_best_of_all_evaluations(tmp_path, base, dataset, keep_best, kept):
    """No evaluation can be 10 better than the first, so the first is the best; the run ends at its last step all the same."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    changes = {"eval_steps": 2, "keep_best": keep_best, "early_stopping_threshold": 10.0, "max_steps": 6}
    folder = tune(tmp_path / "run", base, dataset, **changes)
    losses = curve(folder / "eval_loss.csv")
    assert [line["step"] for line in losses] == [2, 4, 6]
    assert losses[0]["loss"] - losses[2]["loss"] > 1e-3
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    assert plain_loss(model, dataset) == pytest.approx(losses[kept]["loss"], abs=1e-5)


def test_keep_best_without_eval_rows(tmp_path, base, capsys):
    dataset = make_dataset(tmp_path / "data", base, rows=32, eval_fraction=0.0)
    message = refused(capsys, tmp_path / "run", base, dataset, keep_best=True)
    assert "finetune.keep_best: the eval split is empty" in message


def test_keep_best_needs_evaluations():
    with pytest.raises(ValueError, match=r"keep_best needs eval_steps of 1 or more"):
        params.Finetune(**SETTINGS | {"keep_best": True, "eval_steps": 0})


def test_keep_best_needs_eval_rows_before_any_job_starts(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(
        "fetch_model: {source: models/tiny}\n"
        "prepare: {source: rows.json, text_template: '{phrase} {tone}', eval_fraction: 0.0}\n"
        "finetune: {keep_best: true}\n"
    )
    with pytest.raises(
        UserError, match=r"finetune\.keep_best: without eval rows nothing says which adapter is the best"
    ):
        params.load(path)
