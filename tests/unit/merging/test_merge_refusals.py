"""merge: no broken model ever, whatever the base model or the adapter."""

import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from merge_script import edited, make_adapter, refused, run, tensors_of
from safetensors.torch import load_file, save_file
from tiny import make_model

from slmake.merging import merge as merge_module

UP = "base_model.model.model.layers.1.mlp.up_proj.lora_"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, capsys, base, adapter, value):
    def spoil(tensors):
        tensors[f"{UP}B.weight"][3, 0] = value

    spoilt = edited(adapter, tmp_path / "spoilt", spoil)
    message = refused(tmp_path, capsys, base, spoilt)
    assert f"{spoilt}/adapter_model.safetensors: tensor {UP}B.weight has 1 values that are not finite" in message


@pytest.mark.parametrize("piece", [merge_module.PIECE, 64])
def test_infinities_that_cancel_in_a_sum_are_found(tmp_path, capsys, monkeypatch, base, adapter, piece):
    """Counted over the whole tensor, also where its rows are merged one by one."""
    monkeypatch.setattr(merge_module, "PIECE", piece)

    def spoil(tensors):
        tensors[f"{UP}A.weight"][0] = 1e30
        tensors[f"{UP}B.weight"][3, 0], tensors[f"{UP}B.weight"][4, 0] = 1e30, -1e30

    message = refused(tmp_path, capsys, base, edited(adapter, tmp_path / "spoilt", spoil))
    assert "model.layers.1.mlp.up_proj.weight: 128 values are not finite" in message


def test_base_that_is_not_finite_is_refused(tmp_path, capsys, base, adapter):
    """Also in a tensor that the adapter leaves alone."""
    spoilt = Path(shutil.copytree(base, tmp_path / "spoilt"))
    tensors = tensors_of(base)
    tensors["model.norm.weight"][5] = math.nan
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight: 1 values are not finite" in refused(tmp_path, capsys, spoilt, adapter)


def test_overflow_of_float16_is_refused(tmp_path, capsys, base, adapter):
    def grow(tensors):
        tensors[f"{UP}A.weight"][:] = 0
        tensors[f"{UP}A.weight"][0, 0], tensors[f"{UP}B.weight"][3, 0] = 1e3, 1e3

    large = edited(adapter, tmp_path / "large", grow)
    message = refused(tmp_path, capsys, base, large, dtype="float16")
    assert "model.layers.1.mlp.up_proj.weight: " in message
    assert "not finite after the merge" in message


def test_adapter_of_another_architecture_is_refused(tmp_path, capsys, base):
    other = make_model(tmp_path / "phi", "phi3")
    message = refused(tmp_path, capsys, base, make_adapter(other, tmp_path / "adapter"))
    assert "the base model has no tensor model.layers.0.mlp.gate_up_proj.weight" in message
    assert "(4 of the adapter's 8 are missing): it is another base model." in message


def test_a_trained_bias_of_a_layer_without_one_is_no_other_base(tmp_path, capsys, base, adapter):
    def add(tensors):
        tensors[f"{UP}B.bias"] = torch.ones(tensors[f"{UP}B.weight"].shape[0])

    trained = edited(adapter, tmp_path / "bias", add, lora_bias=True)
    message = refused(tmp_path, capsys, base, trained)
    assert "the adapter changes model.layers.1.mlp.up_proj.bias, and that layer has no bias" in message
    assert "Train it again without lora_bias." in message


def test_adapter_on_a_weight_of_integers_is_refused(tmp_path, capsys, base, adapter):
    packed = Path(shutil.copytree(base, tmp_path / "packed"))
    tensors = tensors_of(base)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    message = refused(tmp_path, capsys, packed, adapter)
    assert f"{name} is of type I8: an adapter cannot be merged into it." in message


def test_adapter_of_another_size_is_refused(tmp_path, capsys, base):
    other = make_model(tmp_path / "wide", intermediate_size=160)
    message = refused(tmp_path, capsys, base, make_adapter(other, tmp_path / "adapter"))
    assert "the adapter's update of model.layers.0.mlp." in message
    assert "it belongs to another base model." in message


def test_truncated_adapter_is_refused(tmp_path, capsys, base, adapter):
    cut = edited(adapter, tmp_path / "cut")
    path = cut / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert f"{path}: truncated or corrupt safetensors" in refused(tmp_path, capsys, base, cut)


def test_adapter_without_one_matrix_is_refused(tmp_path, capsys, base, adapter):
    half = edited(adapter, tmp_path / "half", lambda tensors: tensors.pop(f"{UP}B.weight"))
    message = refused(tmp_path, capsys, base, half)
    assert "the adapter has only one of the two matrices for model.layers.1.mlp.up_proj.weight" in message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_adapter_names_the_command_that_makes_it(tmp_path, capsys, base, adapter, name):
    lost = edited(adapter, tmp_path / "lost")
    (lost / name).unlink()
    message = refused(tmp_path, capsys, base, lost)
    assert f"{lost}/{name}: no such file. Build the adapter with `snakemake --cores all {lost}`." in message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
@pytest.mark.timeout(10)
def test_a_pipe_in_an_adapter_is_refused_unread(tmp_path, capsys, base, adapter, name):
    odd = edited(adapter, tmp_path / "odd")
    (odd / name).unlink(missing_ok=True)
    os.mkfifo(odd / name)
    message = refused(tmp_path, capsys, base, odd)
    assert f"{odd / name}: a pipe, a socket or a device, not a file." in message


def test_missing_shard_of_the_base_is_named(tmp_path, capsys):
    base = make_model(tmp_path / "base", shards="150KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    lost = sorted(base.glob("model-*.safetensors"))[1]
    lost.unlink()
    assert f"names {lost.name}, which is not there" in refused(tmp_path, capsys, base, adapter)


def test_tensor_in_two_shards_of_the_base_is_refused(tmp_path, capsys):
    """One of another shape would be written over its neighbours."""
    base = make_model(tmp_path / "base", shards="150KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    first, second = sorted(base.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: torch.zeros(3, 5)}, second, metadata={"format": "pt"})
    message = refused(tmp_path, capsys, base, adapter)
    assert f"{base}: tensor {name} is in {first.name} and in {second.name}" in message


def test_existing_output_is_refused(tmp_path, capsys, base, adapter):
    folder = run(tmp_path, base, adapter)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        run(tmp_path, base, adapter)
    assert f"{folder} already exists" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == before
