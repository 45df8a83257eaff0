"""Probes: few layers that take what the real model's layers take."""

import os
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import make_model

from slmake import cli, memory, params
from slmake.rehearsal import chain, estimate, twin
from slmake.training import trainer


def config(layers: int, width: int, **fields):
    import transformers

    return transformers.LlamaConfig(num_hidden_layers=layers, hidden_size=width, **fields)


@pytest.mark.parametrize(
    ("layers", "width", "counts"),
    [(30, 576, [2, 8]), (32, 3072, [2, 4]), (2, 64, [2]), (3, 3072, [2, 3]), (5, 64, [2, 4])],
)
def test_layers_of_the_probes(layers, width, counts):
    assert estimate.probe_layers(config(layers, width)) == counts


def test_a_probe_has_whole_periods_of_layer_types():
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 3
    assert estimate.probe_layers(config(18, 640, layer_types=kinds)) == [6, 12]


def test_a_probe_has_the_bases_data_type(tmp_path):
    base = make_model(tmp_path / "base")
    twin.make_model(base, tmp_path / "probe", lambda config: twin.cut(config, 1), "bfloat16")
    with safe_open(tmp_path / "probe" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_parameters_are_counted_in_the_files_headers(tmp_path):
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base", tie_word_embeddings=False)
    counted = sum(value.numel() for value in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert estimate._parameters(base) == counted


def test_a_probe_trains_on_the_longest_batches(tmp_path, base, dataset, monkeypatch):
    seen = []
    compute = trainer.Trainer._loss

    def loss(self, data, chosen):
        seen.append(int(data.lengths[chosen].max()))
        return compute(self, data, chosen)

    monkeypatch.setattr(trainer.Trainer, "_loss", loss)
    section = params.Finetune(per_device_train_batch_size=2)
    chain.finetune(section, base, dataset, tmp_path / "adapter", 2, cli.Job("rehearse", sys.stderr, None))
    from slmake.training.data import Data

    assert seen[0] == int(Data(dataset / "train.parquet").lengths.max())
    assert seen[1] <= seen[0]


def test_weights_are_packed_where_half_of_the_memory_holds_three_copies(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 24 * 10**9)
    assert trainer.room_to_pack(2 * 10**9)
    assert not trainer.room_to_pack(2 * 10**9 + 1)


def test_a_probe_packs_as_the_whole_model_would(tmp_path, base, dataset, monkeypatch):
    from slmake.training import lora_linear

    packed = []
    monkeypatch.setattr(memory, "available", lambda: 10**9)
    monkeypatch.setattr(lora_linear, "packable", lambda weight: True)
    monkeypatch.setattr(lora_linear.Frozen, "__init__", frozen(packed))
    for parameters in (None, 10**9):
        made = trainer.Trainer(
            params.Finetune(), base, dataset, tmp_path, cli.Job("finetune", None, None), parameters=parameters
        )
        assert made.parameters == parameters
    assert len(packed) % 2 == 0
    assert (set(packed[: len(packed) // 2]), set(packed[len(packed) // 2 :])) == ({True}, {False})


def frozen(packed: list[bool]):
    def make(self, weight: torch.Tensor, pack: bool | None = None) -> None:
        self.weight, self.packed = weight, None
        if pack is not None:
            packed.append(pack)

    return make


def test_kernel_caches_are_bounded_but_a_users_bound_stays(tmp_path, base, dataset, monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    trainer.Trainer(params.Finetune(), base, dataset, tmp_path, cli.Job("finetune", None, None))
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"


def test_calibration_counts_for_memory_once_and_for_time_by_layer(tmp_path):
    from tiny import write_params

    everything = params.load(write_params(tmp_path / "params.yaml"))
    results = [{"memory": 1e9, "seconds": 10.0}, {"memory": 1.1e9, "seconds": 12.0}]
    need = estimate._quantizing(everything, results, {"memory": 4e9, "seconds": 14.0}, [2, 4], 32, 5e8, 10**9)
    assert need.memory == 4e9
    assert need.seconds == pytest.approx(10 + 30 + 4 * 16)
    assert need.disk == 1.5e9
    plain = estimate._quantizing(everything, results, None, [2, 4], 32, 5e8, 10**9)
    assert np.allclose([plain.memory, plain.seconds, plain.disk], [2.5e9, 40, 5e8])
