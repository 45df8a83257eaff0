"""finetune: what cannot be trained is refused with what, where and why."""

import shutil
from pathlib import Path

import pytest
from finetune_script import SETTINGS, make_dataset, refused, tune
from tiny import make_model

from slmake import params
from slmake.training import data as data_module
from slmake.training import schedule


def test_target_modules_that_match_nothing(tmp_path, base, dataset, capsys):
    message = refused(capsys, tmp_path / "run", base, dataset, target_modules=["query", "value"])
    assert "finetune.target_modules: ['query', 'value'] matches no module of this model." in message
    linear = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    assert f"Its linear modules: {linear}." in message


def test_one_target_module_that_matches_nothing(tmp_path, base, dataset, capsys):
    """A name with a slip in it must not be left out in silence."""
    message = refused(capsys, tmp_path / "run", base, dataset, target_modules=["q_proj", "v_porj"], max_steps=1)
    assert "v_porj" in message


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_adapter_on_tied_weights_is_refused_before_training(tmp_path, base, dataset, capsys, module):
    """The export has one matrix for both uses, and the adapter would change one of them."""
    message = refused(capsys, tmp_path / "run", base, dataset, target_modules=["q_proj", module], max_steps=1)
    assert "finetune.target_modules: adapters on the input embedding, or on an output head that shares its" in message


def test_adapter_on_an_output_head_of_its_own(tmp_path, dataset):
    from slmake.model_folder import check_safetensors

    base = make_model(tmp_path / "base", tie_word_embeddings=False)
    folder = tune(tmp_path / "run", base, dataset, target_modules=["lm_head"], max_steps=1)
    names = set(check_safetensors(folder / "adapter/adapter_model.safetensors"))
    assert names == {f"base_model.model.lm_head.lora_{side}.weight" for side in "AB"}


def test_early_stopping_without_eval_rows(tmp_path, base, capsys):
    dataset = make_dataset(tmp_path / "data", base, eval_fraction=0.0)
    message = refused(capsys, tmp_path / "run", base, dataset, early_stopping_patience=2)
    assert "finetune.early_stopping_patience: the eval split is empty" in message


def test_target_modules_by_name(tmp_path, base, dataset):
    from slmake.model_folder import check_safetensors

    folder = tune(tmp_path / "run", base, dataset, target_modules=["q_proj", "v_proj"], max_steps=1)
    names = {name.split(".")[-3] for name in check_safetensors(folder / "adapter/adapter_model.safetensors")}
    assert names == {"q_proj", "v_proj"}


def test_poisoned_weights_stop_at_the_first_step(tmp_path, base, dataset, capsys):
    """Every loss is NaN: the error names step 1 and the rows of its batch."""
    import torch
    from safetensors.torch import load_file, save_file

    poisoned = Path(shutil.copytree(base, tmp_path / "poisoned"))
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, poisoned / "model.safetensors", metadata={"format": "pt"})
    data = data_module.Data(dataset / "train.parquet")
    plan = schedule.Schedule(params.Finetune(**SETTINGS), data.lengths)
    rows = ", ".join(map(str, sorted(data.rows[plan.batches(0)[0]])))
    message = refused(capsys, tmp_path / "run", poisoned, dataset)
    assert f"the loss is nan at step 1 (rows {rows} of the dataset)." in message
    assert "Lower finetune.learning_rate" in message


def test_row_that_breaks_the_loss_is_named(tmp_path, dataset, capsys):
    """One row's token has a NaN embedding; batches of one row: the error names that row and its step."""
    import torch
    from safetensors.torch import load_file, save_file

    base = make_model(tmp_path / "base", tie_word_embeddings=False)
    data = data_module.Data(dataset / "train.parquet")
    settings = {"per_device_train_batch_size": 1, "group_by_length": False, "max_steps": 40, "eval_steps": 0}
    plan = schedule.Schedule(params.Finetune(**{**SETTINGS, **settings}), data.lengths)
    order = [int(plan.batches(step)[0][0]) for step in range(40)]
    tokens = [set(data.ids[data.offsets[i] : data.offsets[i + 1]].tolist()) for i in range(len(data))]
    # The first row from step 4 on with a token that no row before it has.
    step = next(s for s in range(3, 40) if tokens[order[s]] - set().union(*(tokens[i] for i in order[:s])))
    token = min(tokens[order[step]] - set().union(*(tokens[i] for i in order[:step])))
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    message = refused(capsys, tmp_path / "run", base, dataset, **settings)
    assert f"the loss is nan at step {step + 1} (rows {data.rows[order[step]]} of the dataset)." in message


def test_missing_base_and_dataset_name_the_command_that_makes_them(tmp_path, base, dataset, capsys):
    message = refused(capsys, tmp_path / "run", tmp_path / "no-base", dataset)
    assert f"{tmp_path}/no-base: no model here. Build it with `snakemake --cores all {tmp_path}/no-base`." in message
    message = refused(capsys, tmp_path / "run", base, tmp_path / "no-data")
    assert f"{tmp_path}/no-data/train.parquet: no such file. Build it with `snakemake" in message


def test_truncated_base(tmp_path, base, dataset, capsys):
    cut = Path(shutil.copytree(base, tmp_path / "cut"))
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-1000])
    message = refused(capsys, tmp_path / "run", cut, dataset)
    assert f"{cut}: truncated or corrupt weights: " in message
