"""finetune: the same bytes from the same inputs, an adapter that PEFT loads, and as many steps as were asked for."""

import json
import math

import pytest
from finetune_script import FILES, SETTINGS, command, contents, curve, make_dataset, plain_loss, tune

from scripts import finetune
from slmake import params
from slmake.training import data as data_module
from slmake.training import schedule

# -- outputs -----------------------------------------------------------------------------------------------------------


def test_two_runs_in_different_folders_are_byte_identical(tmp_path, base, dataset, tuned):
    again = tune(tmp_path / "elsewhere", base, dataset)
    assert contents(again) == contents(tuned)


def test_outputs_are_the_adapter_and_both_curves_and_nothing_else(tuned):
    found = sorted(path.relative_to(tuned).as_posix() for path in tuned.rglob("*") if path.is_file())
    assert found == sorted([*FILES, "params.yaml"])
    assert not (tuned / "checkpoints").exists()
    assert (tuned / "adapter" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["seed", "data_seed"])
def test_another_seed_gives_another_adapter(tmp_path, base, dataset, tuned, name):
    other = contents(tune(tmp_path / "run", base, dataset, **{name: 7}))
    first = contents(tuned)
    assert other["adapter/adapter_model.safetensors"] != first["adapter/adapter_model.safetensors"]
    assert other["train_loss.csv"] != first["train_loss.csv"]
    assert other["adapter/adapter_config.json"] == first["adapter/adapter_config.json"]


def test_loss_falls_and_curves_are_complete(dataset, tuned):
    import pyarrow.parquet

    rows = pyarrow.parquet.read_metadata(dataset / "train.parquet").num_rows
    steps = 2 * math.ceil(rows / 8)
    train, held_out = curve(tuned / "train_loss.csv"), curve(tuned / "eval_loss.csv")
    assert (tuned / "train_loss.csv").read_text().splitlines()[0] == "step,epoch,loss,learning_rate,processes,threads"
    assert (tuned / "eval_loss.csv").read_text().splitlines()[0] == "step,epoch,loss"
    assert [line["step"] for line in train] == list(range(1, steps + 1))
    assert train[-1]["epoch"] == 2.0
    assert [line["step"] for line in held_out] == [*range(4, steps, 4), steps]
    assert train[0]["loss"] == pytest.approx(math.log(512), abs=0.5)  # a random model guesses
    assert train[-1]["loss"] < train[0]["loss"] - 0.3  # as far as so small a frozen head lets it fall
    assert held_out[-1]["loss"] < held_out[0]["loss"] - 0.1


def test_peft_loads_the_adapter_strictly_and_gives_the_same_eval_loss(base, dataset, tuned):
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = plain_loss(model, dataset)
    model = PeftModel.from_pretrained(model, tuned / "adapter").eval()
    stored, loaded = load_file(tuned / "adapter" / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    assert stored.keys() == loaded.keys()
    assert len(stored) == 2 * 7 * 2  # A and B of seven products in two layers
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)
    assert all(value.dtype == torch.float32 for value in stored.values())
    after = plain_loss(model, dataset)
    assert after == pytest.approx(curve(tuned / "eval_loss.csv")[-1]["loss"], abs=1e-5)
    assert after < before - 0.3


def test_adapter_config_says_what_was_asked_for(tuned):
    config = json.loads((tuned / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 4, 8)
    names = {"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"}
    assert {name.rsplit(".", 1)[-1] for name in config["target_modules"]} == names
    assert config["target_modules"] == sorted(config["target_modules"])
    assert list(config) == sorted(config)


def test_existing_output_is_refused(base, dataset, tuned, capsys):
    before = contents(tuned)
    with pytest.raises(SystemExit):
        finetune.main(command(tuned, base, dataset))
    assert f"{tuned / 'adapter'} already exists" in capsys.readouterr().err
    assert contents(tuned) == before


# -- early stopping ----------------------------------------------------------------------------------------------------


def test_early_stopping_keeps_the_best_adapter(tmp_path, base, dataset, capsys):
    """No evaluation can be 10 better than the first, so the run ends after two more and keeps the first."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    changes = {"eval_steps": 2, "early_stopping_patience": 2, "early_stopping_threshold": 10.0, "max_steps": 20}
    folder = tune(tmp_path / "run", base, dataset, **changes)
    assert "6 steps (stopped early)" in capsys.readouterr().err
    held_out = curve(folder / "eval_loss.csv")
    assert [line["step"] for line in held_out] == [2, 4, 6]
    assert held_out[2]["loss"] < held_out[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    assert plain_loss(model, dataset) == pytest.approx(held_out[0]["loss"], abs=1e-5)


def test_early_stopping_lets_a_run_that_gets_better_finish(tmp_path, base, dataset, tuned):
    folder = tune(tmp_path / "run", base, dataset, early_stopping_patience=50)
    held_out = curve(folder / "eval_loss.csv")
    assert held_out == curve(tuned / "eval_loss.csv")
    assert curve(folder / "train_loss.csv") == curve(tuned / "train_loss.csv")


def test_early_stop_before_the_first_line_of_the_curve(tmp_path, base, dataset, capsys):
    """Stopped after step 2 with a line every 5 steps: the run ends well and its curve still shows what it did."""
    changes = {"eval_steps": 1, "early_stopping_patience": 1, "early_stopping_threshold": 10.0, "logging_steps": 5}
    folder = tune(tmp_path / "run", base, dataset, **changes)
    assert "2 steps (stopped early)" in capsys.readouterr().err
    assert [line["step"] for line in curve(folder / "train_loss.csv")] == [2]


# -- how long ----------------------------------------------------------------------------------------------------------


def test_fraction_of_an_epoch(tmp_path, base, dataset):
    folder = tune(tmp_path / "run", base, dataset, num_train_epochs=0.5)
    per_epoch = math.ceil(len(data_module.Data(dataset / "train.parquet")) / 8)
    train = curve(folder / "train_loss.csv")
    assert len(train) == math.ceil(per_epoch / 2)
    assert train[-1]["epoch"] == pytest.approx(math.ceil(per_epoch / 2) / per_epoch, abs=1e-4)


def test_max_steps_overrides_epochs(tmp_path, base, dataset):
    folder = tune(tmp_path / "run", base, dataset, max_steps=3, num_train_epochs=50.0)
    assert [line["step"] for line in curve(folder / "train_loss.csv")] == [1, 2, 3]
    assert [line["step"] for line in curve(folder / "eval_loss.csv")] == [3]


def test_empty_eval_split(tmp_path, base, capsys):
    """No eval loss, and no trouble."""
    dataset = make_dataset(tmp_path / "data", base, eval_fraction=0.0)
    assert len(data_module.Data(dataset / "eval.parquet")) == 0
    capsys.readouterr()
    folder = tune(tmp_path / "run", base, dataset, max_steps=4)
    assert (folder / "eval_loss.csv").read_text() == "step,epoch,loss\n"
    message = capsys.readouterr().err
    assert "4 steps, loss " in message
    assert "eval loss" not in message


def test_learning_rate_of_the_curve_is_the_schedules(tuned, dataset):
    plan = schedule.Schedule(params.Finetune(**SETTINGS), data_module.Data(dataset / "train.parquet").lengths)
    for line in curve(tuned / "train_loss.csv"):
        assert line["learning_rate"] == pytest.approx(plan.learning_rate(int(line["step"]) - 1), rel=1e-5)
