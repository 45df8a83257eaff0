"""finetune: a loss that is the plain one, whatever the batches, types and bits of the base model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from finetune_script import SETTINGS, curve, make_dataset, plain_loss, refused, tune

from slmake import params
from slmake.training import data as data_module
from slmake.training import model as model_module


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
        assert batch["attention_mask"].sum() == data.real[chosen].sum() < 4 * 64
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


def test_padding_without_a_mask_is_no_token(tmp_path, base, padded):
    """What GPTQ is calibrated on is the same with and without `use_attention_mask`."""
    bare = make_dataset(tmp_path / "data", base, pad_to_max_len=True, max_seq_len=64, use_attention_mask=False)
    with_mask, without = (data_module.Data(folder / "train.parquet") for folder in (padded, bare))
    assert with_mask.masked
    assert not without.masked
    assert (without.lengths == 64).all()
    assert without.real.tolist() == with_mask.real.tolist()


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
