"""finetune: the same bytes from the same inputs, killed or not; a loss that is the plain one; an adapter PEFT loads."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import make_model, make_rows, write_params

from scripts import finetune, prepare
from slmake import params
from slmake.training import checkpoints as checkpoints_module
from slmake.training import data as data_module
from slmake.training import model as model_module
from slmake.training import schedule

SETTINGS = {
    "method": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "compute_dtype": "float32",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "num_train_epochs": 2.0,
    "max_steps": None,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "group_by_length": True,
    "max_grad_norm": 1.0,
    "eval_steps": 4,
    "logging_steps": 1,
    "save_steps": 1000,
    "early_stopping_patience": 0,
    "early_stopping_threshold": 0.0,
    "qat": "none",
    "seed": 42,
    "data_seed": 42,
}
FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "train_loss.csv", "eval_loss.csv")


def command(folder: Path, base: Path, dataset: Path, checkpoints: Path | None = None, **changes: object) -> list[str]:
    """Arguments of the script, with its parameter file written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {
        "params": write_params(folder / "params.yaml", finetune={**SETTINGS, **changes}),
        "base": base,
        "dataset": dataset,
        "output": folder / "adapter",
        "train-loss": folder / "train_loss.csv",
        "eval-loss": folder / "eval_loss.csv",
        "checkpoints": checkpoints or folder / "checkpoints",
    }
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))]


def tune(folder: Path, base: Path, dataset: Path, checkpoints: Path | None = None, **changes: object) -> Path:
    """Run the script in this process; returns the folder of its outputs."""
    finetune.main(command(folder, base, dataset, checkpoints, **changes))
    return folder


def refused(capsys, folder: Path, *arguments: Path, **changes: object) -> str:
    """The script's error; it exits with 1 and leaves nothing but the parameter file."""
    with pytest.raises(SystemExit) as caught:
        tune(folder, *arguments, **changes)
    assert caught.value.code == 1
    assert [path.name for path in folder.iterdir()] == ["params.yaml"]
    message = capsys.readouterr().err
    return message[message.index("finetune: error: ") :]


def curve(path: Path) -> list[dict[str, float]]:
    """A loss curve as numbers."""
    with open(path, newline="", encoding="utf-8") as handle:
        return [{key: float(value) for key, value in line.items()} for line in csv.DictReader(handle)]


def contents(folder: Path) -> dict[str, bytes]:
    """The four outputs' bytes."""
    return {name: (folder / name).read_bytes() for name in FILES}


def make_dataset(folder: Path, base: Path, rows: int = 96, **changes: object) -> Path:
    """`prepare`'s output for other parameters."""
    folder.mkdir(parents=True)
    (folder / "rows.json").write_text(json.dumps(make_rows(rows)), encoding="utf-8")
    file = write_params(folder / "params.yaml", prepare={"source": str(folder / "rows.json"), **changes})
    arguments = ["--params", file, "--base", base, "--output", folder / "dataset", "--report", folder / "report.json"]
    prepare.main([str(argument) for argument in arguments])
    return folder / "dataset"


def plain_loss(model, dataset: Path, split: str = "eval") -> float:
    """Mean cross entropy per answer token, row by row, from full logits."""
    import pyarrow.parquet
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for row in pyarrow.parquet.read_table(dataset / f"{split}.parquet").to_pylist():
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logits = model(input_ids=ids).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            total, count = total + loss.item(), count + int((labels[1:] != -100).sum())
    return total / count


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, base, dataset) -> Path:
    """One plain run; do not write into it."""
    return tune(tmp_path_factory.mktemp("tuned") / "run", base, dataset)


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
    assert (tuned / "train_loss.csv").read_text().splitlines()[0] == "step,epoch,loss,learning_rate"
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


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def padded(tmp_path_factory, base) -> Path:
    """A dataset padded to a fixed length, with a mask."""
    folder = tmp_path_factory.mktemp("padded") / "data"
    return make_dataset(folder, base, pad_to_max_len=True, max_seq_len=64)


@pytest.fixture(scope="module")
def joined(tmp_path_factory, base) -> Path:
    """A dataset of packed rows: several answers in each sequence, and no mask."""
    folder = tmp_path_factory.mktemp("joined") / "data"
    return make_dataset(folder, base, strategy="join", max_seq_len=128, use_attention_mask=False)


@pytest.mark.parametrize("max_shared_len", [0, 512], ids=["padded batch", "shared prefix"])
@pytest.mark.parametrize("kind", ["dataset", "padded", "joined"])
def test_loss_sum_equals_plain_cross_entropy_over_full_logits(request, base, kind, max_shared_len):
    import torch

    from slmake.training import shared_prefix

    folder = request.getfixturevalue(kind)
    section = params.Finetune(**SETTINGS)
    device = torch.device("cpu")
    data = data_module.Data(folder / "train.parquet")
    chosen = np.array([5, 0, 2, 9])
    batch = data.batch(chosen, device)
    if kind == "padded":
        assert batch["input_ids"].shape == (4, 64)
        assert batch["attention_mask"].sum() == batch["tokens"] < 4 * 64
    if kind == "joined":
        assert batch["attention_mask"] is None
    peft = model_module.load_model(section, base, device)
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.1)
    logits = peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:].reshape(-1)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), targets, ignore_index=-100, reduction="sum"
    )
    if max_shared_len:
        shared_prefix.share(peft.get_base_model())
    head = model_module.Head(peft.get_base_model())
    found, count = model_module.loss_sum(peft, head, data, chosen, device, max_shared_len)
    assert count == int((targets != -100).sum())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    gradients = {name: value.grad.clone() for name, value in peft.named_parameters() if value.grad is not None}
    peft.zero_grad()
    found.backward()
    assert len(gradients) == 28
    for name, value in peft.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": True}, {"method": "qlora", "compute_dtype": "float32"}]
)
def test_plain_batches_give_the_losses_of_shared_prefixes(tmp_path, base, dataset, monkeypatch, capsys, changes):
    """And the log says which of the two was computed."""
    from slmake.training import shared_prefix

    said = []
    for name in ("shared", "plain"):
        if name == "plain":
            monkeypatch.setattr(shared_prefix, "agrees", lambda *_: False)
        tune(tmp_path / name, base, dataset, max_steps=6, **changes)
        printed = capsys.readouterr().err.splitlines()
        said.append(next(line for line in printed if "shared-prefix computation" in line))
    assert said[0].endswith("shared-prefix computation: on")
    assert said[1].endswith("shared-prefix computation: off, this model does not support it")
    for file in ("train_loss.csv", "eval_loss.csv"):
        shared, plain = ([line["loss"] for line in curve(tmp_path / name / file)] for name in ("shared", "plain"))
        assert shared == pytest.approx(plain, abs=2e-4)


def test_loss_does_not_depend_on_padding(tmp_path, base, dataset, padded):
    """The same rows padded to 64 tokens give the same curve."""
    train = "train.parquet"
    assert len(data_module.Data(padded / train)) == len(data_module.Data(dataset / train))
    same = {"group_by_length": False, "max_steps": 4}
    short = curve(tune(tmp_path / "short", base, dataset, **same) / "train_loss.csv")
    long = curve(tune(tmp_path / "long", base, padded, **same) / "train_loss.csv")
    assert [line["loss"] for line in long] == pytest.approx([line["loss"] for line in short], abs=1e-4)


def test_gradient_accumulation_of_two_by_four_equals_a_batch_of_eight(tmp_path, base, dataset):
    same = {"group_by_length": False, "max_steps": 8}
    whole = tune(tmp_path / "whole", base, dataset, **same)
    halves = tune(
        tmp_path / "halves",
        base,
        dataset,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **same,
    )
    expected, found = curve(whole / "train_loss.csv"), curve(halves / "train_loss.csv")
    assert len(found) == 8
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-4)
    held_out = curve(whole / "eval_loss.csv")[-1]["loss"]
    assert curve(halves / "eval_loss.csv")[-1]["loss"] == pytest.approx(held_out, abs=1e-4)


def test_gradient_checkpointing_gives_the_same_losses(tmp_path, base, dataset, tuned):
    import torch

    section = params.Finetune(**{**SETTINGS, "gradient_checkpointing": True})
    assert model_module.load_model(section, base, torch.device("cpu")).get_base_model().is_gradient_checkpointing
    folder = tune(tmp_path / "run", base, dataset, gradient_checkpointing=True)
    expected, found = curve(tuned / "train_loss.csv"), curve(folder / "train_loss.csv")
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-5)


def test_logging_steps_average_over_answer_tokens(tmp_path, base, dataset, tuned):
    """Every fourth line instead of every one: the mean over the tokens between them."""
    folder = tune(tmp_path / "run", base, dataset, logging_steps=4)
    every, fourth = curve(tuned / "train_loss.csv"), curve(folder / "train_loss.csv")
    assert [line["step"] for line in fourth] == [*range(4, len(every), 4), len(every)]
    for line in fourth[:-1]:
        part = [point["loss"] for point in every[int(line["step"]) - 4 : int(line["step"])]]
        assert min(part) < line["loss"] < max(part)
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == (
        tuned / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_bfloat16_base_keeps_a_float32_adapter(tmp_path, base, dataset):
    from slmake.model_folder import check_safetensors

    folder = tune(tmp_path / "run", base, dataset, compute_dtype="bfloat16")
    assert set(check_safetensors(folder / "adapter/adapter_model.safetensors").values()) == {"F32"}
    losses = [line["loss"] for line in curve(folder / "train_loss.csv")]
    assert losses[-1] < losses[0] - 0.3


def test_qlora_on_cpu_saves_a_loadable_adapter(tmp_path, base, dataset):
    """The loss falls over the 4-bit base, and that base with the adapter gives the eval loss of the curve."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tune(tmp_path / "run", base, dataset, method="qlora", double_quant=True, quant_type="nf4")
    losses = [line["loss"] for line in curve(folder / "train_loss.csv")]
    assert losses[-1] < losses[0] - 0.3
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    # Training mode (there is no dropout): in evaluation mode bitsandbytes switches to a bfloat16 kernel on CPU.
    model = PeftModel.from_pretrained(model, folder / "adapter").train()
    expected = curve(folder / "eval_loss.csv")[-1]["loss"]
    assert plain_loss(model, dataset) == pytest.approx(expected, abs=1e-3)


def test_qlora_trains_as_lora_over_the_dequantized_base_does(tmp_path, base, dataset):
    """The 4-bit kernels' forward and backward passes are those of the weights they stand for."""
    import torch
    from safetensors.torch import load_file, save_file

    from slmake.merging import merge as merging

    plain = Path(shutil.copytree(base, tmp_path / "base"))
    tensors = load_file(plain / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = merging.fake_quantize(value, torch.float32, "nf4", True)
            assert not torch.equal(tensors[name], value)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    expected = tune(tmp_path / "lora", plain, dataset)
    found = tune(tmp_path / "qlora", base, dataset, method="qlora", double_quant=True, quant_type="nf4")
    losses = [[line["loss"] for line in curve(folder / "train_loss.csv")] for folder in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    one, other = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (found, expected))
    for name, value in other.items():
        assert float((one[name] - value).norm() / value.norm()) < 0.02, name


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("modules", ["all-linear", ["gate_proj", "up_proj"]], ids=["all", "two"])
def test_quantization_aware_training_scores_the_weights_it_will_be_quantized_to(tmp_path, base, dataset, rate, modules):
    """Eval loss = loss of the merged weights after round-to-nearest, whatever share of the layers each step quantizes."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from slmake.training import qat

    changes = {"qat": "int4", "qat_block_size": 32, "qat_target_modules": modules, "qat_rate": rate}
    folder = tune(tmp_path / "run", base, dataset, **changes)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    for name, module in model.named_modules():
        if name.endswith("_proj") and (modules == "all-linear" or name.rsplit(".", 1)[-1] in modules):
            module.weight.data = qat.round_to_nearest(module.weight.data, 4, 32)
    expected = curve(folder / "eval_loss.csv")[-1]["loss"]
    assert plain_loss(model, dataset) == pytest.approx(expected, abs=1e-4)
    losses = [line["loss"] for line in curve(folder / "train_loss.csv")]
    assert losses[-1] < losses[0] - 0.3


def test_qat_modules_that_match_nothing(tmp_path, base, dataset, capsys):
    for modules in (["gate"], ["up_proj", "gate"]):
        message = refused(capsys, tmp_path / "run", base, dataset, qat="int4", qat_target_modules=modules)
        assert "finetune.qat_target_modules: ['gate'] matches no layer that has an adapter." in message


# -- killed and started again ------------------------------------------------------------------------------------------

# save_steps changes no result, so that the undisturbed runs need not write a checkpoint after every step.
KILLED = {"save_steps": 1, "max_steps": 40, "lora_dropout": 0.1, "logging_steps": 7, "eval_steps": 10}
ENDED = {
    "save_steps": 1,
    "max_steps": 40,
    "logging_steps": 7,
    "eval_steps": 3,
    "early_stopping_patience": 8,
    "early_stopping_threshold": 0.5,
}


def interrupt(folder: Path, number: signal.Signals, base: Path, dataset: Path, **changes: object):
    """Start the script, wait for its fifth checkpoint, send a signal; returns the exit code and its messages."""
    arguments = [sys.executable, "-m", "scripts.finetune", *command(folder, base, dataset, **changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 600
        while not any(int(path.name[5:]) >= 5 for path in (folder / "checkpoints").glob("*/step-*")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        _, messages = process.communicate(timeout=60)
    assert list((folder / "checkpoints").glob("*/step-*")), "the run was over before the signal came"
    assert not any((folder / name).exists() for name in FILES)
    return process.returncode, messages


@pytest.fixture(scope="module")
def killed(tmp_path_factory, base, dataset) -> Path:
    """What a run killed with SIGKILL leaves behind; copy it."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    code, _ = interrupt(folder, signal.SIGKILL, base, dataset, **KILLED)
    assert code == -signal.SIGKILL
    return folder


def resumed_from(messages: str) -> int:
    """Step in the line that says where a run goes on."""
    (line,) = [line for line in messages.splitlines() if "resumes from step" in line]
    assert line.endswith(" of 40")
    return int(line.split()[-3])


def test_killed_run_goes_on_and_gives_the_bytes_of_an_undisturbed_one(tmp_path, base, dataset, killed, capsys):
    """With dropout; a half-written later checkpoint is not used."""
    undisturbed = tune(tmp_path / "undisturbed", base, dataset, **{**KILLED, "save_steps": 1000})
    capsys.readouterr()
    folder = Path(shutil.copytree(killed, tmp_path / "killed"))
    (run,) = (folder / "checkpoints").iterdir()
    last = max(int(path.name[5:]) for path in run.glob("step-*"))
    (run / ".step-00000039.partial").mkdir()
    (run / ".step-00000039.partial" / "tensors.safetensors").write_bytes(b"half")
    tune(folder, base, dataset, **KILLED)
    assert resumed_from(capsys.readouterr().err) == last >= 5
    assert contents(folder) == contents(undisturbed)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in undisturbed.iterdir())


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tensors.safetensors", None, "Error while deserializing header: "),
        ("tensors.safetensors", "", "Error while deserializing header: "),
        ("state.json", "", "state.json is damaged: Expecting value"),
        ("state.json", '{"step": 7}', "state.json is damaged: it has no `bad_evaluations`"),
    ],
    ids=["cut", "empty", "empty-state", "state-lacks"],
)
def test_damaged_checkpoint_is_discarded(tmp_path, base, dataset, killed, capsys, file, content, told):
    """The run goes on from an older one, or from the beginning."""
    undisturbed = tune(tmp_path / "undisturbed", base, dataset, **{**KILLED, "save_steps": 1000})
    folder = Path(shutil.copytree(killed, tmp_path / "killed"))
    (run,) = (folder / "checkpoints").iterdir()
    older = sorted(run.glob("step-*"))[-1]
    for name in ("step-00000037", "step-00000038"):
        damaged = Path(shutil.copytree(older, run / name))
        cut = (damaged / file).read_bytes()[:-50]
        (damaged / file).write_bytes(cut if content is None else content.encode())
    if content is None:  # none is left
        shutil.rmtree(older)
    capsys.readouterr()
    tune(folder, base, dataset, **KILLED)
    messages = capsys.readouterr().err
    for name in ("step-00000037", "step-00000038"):
        assert f"finetune: the checkpoint {run / name} is damaged and is discarded: {told}" in messages
    assert "error" not in messages.replace("Error while deserializing", "")
    if content is None:
        assert "goes on" not in messages
    else:
        assert resumed_from(messages) == int(older.name[5:])
    assert contents(folder) == contents(undisturbed)
    assert not (folder / "checkpoints").exists()


def test_run_ended_by_sigterm_goes_on_and_gives_the_bytes_of_an_undisturbed_one(tmp_path, base, dataset, capsys):
    """With early stopping: the best adapter so far and the count of bad evaluations survive too."""
    undisturbed = tune(tmp_path / "undisturbed", base, dataset, **{**ENDED, "save_steps": 1000})
    folder = tmp_path / "ended"
    code, messages = interrupt(folder, signal.SIGTERM, base, dataset, **ENDED)
    assert code == 130
    assert "finetune: error: interrupted. Run the same command again to resume." in messages
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "params.yaml"]
    capsys.readouterr()
    tune(folder, base, dataset, **ENDED)
    assert resumed_from(capsys.readouterr().err) >= 5
    assert contents(folder) == contents(undisturbed)
    held_out = curve(folder / "eval_loss.csv")
    assert held_out[-1]["step"] < 40  # it did stop early


@pytest.mark.parametrize("change", [{"learning_rate": 4e-3}, {"seed": 1}, {"lora_dropout": 0.05}])
def test_checkpoint_of_other_parameters_is_not_used(tmp_path, base, dataset, killed, capsys, change):
    checkpoints = Path(shutil.copytree(killed / "checkpoints", tmp_path / "checkpoints"))
    changes = {**KILLED, "max_steps": 6, **change}
    before = sorted(path.relative_to(checkpoints) for path in checkpoints.rglob("*"))
    folder = tune(tmp_path / "run", base, dataset, checkpoints, **changes)
    assert "goes on" not in capsys.readouterr().err
    assert contents(folder) == contents(tune(tmp_path / "fresh", base, dataset, **changes))
    assert sorted(path.relative_to(checkpoints) for path in checkpoints.rglob("*")) == before


def test_fingerprint_depends_on_parameters_base_and_dataset_and_not_on_places(tmp_path, base, dataset):
    section = params.Finetune(**SETTINGS)
    key = checkpoints_module.fingerprint(section, base, dataset, "float32")
    assert len(key) == 32
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (base, dataset)]
    (copies[1] / ".snakemake_timestamp").touch()
    assert checkpoints_module.fingerprint(section, *copies, "float32") == key
    assert checkpoints_module.fingerprint(section, base, dataset, "bfloat16") != key
    assert checkpoints_module.fingerprint(params.Finetune(**{**SETTINGS, "seed": 1}), base, dataset, "float32") != key
    for folder, name in zip(copies, ("config.json", "prompt.json"), strict=True):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text + " ", encoding="utf-8")
        assert checkpoints_module.fingerprint(section, *copies, "float32") != key
        (folder / name).write_text(text, encoding="utf-8")
    assert checkpoints_module.fingerprint(section, *copies, "float32") == key


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


# -- errors ------------------------------------------------------------------------------------------------------------


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
