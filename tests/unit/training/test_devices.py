"""What training does on a GPU, as far as a CPU shows it: where values are, and what the host waits for."""

import os

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slmake import cli, params
from slmake.training.data import to_device
from slmake.training.trainer import Trainer


@pytest.fixture
def trainer(tmp_path, base, dataset, monkeypatch):
    def make(**changes: object) -> Trainer:
        section = params.Finetune(max_steps=4, per_device_train_batch_size=4, compute_dtype="float32", **changes)
        return Trainer(section, base, dataset, tmp_path / "checkpoints", cli.Job("finetune", None, None))

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield make
    torch.use_deterministic_algorithms(False)


def test_a_copy_to_a_gpu_does_not_wait(monkeypatch):
    """The host goes on only if its side is pinned and the copy is not blocking."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **options: calls.append((device, options)) or self)
    cuda = torch.device("cuda", 1)
    assert to_device(np.arange(3), cuda).tolist() == [0, 1, 2]
    assert calls == ["pinned", (cuda, {"non_blocking": True})]


def test_a_copy_to_the_cpu_is_the_array_itself():
    array = np.arange(3)
    assert np.shares_memory(to_device(array, torch.device("cpu")).numpy(), array)


class HostReads(TorchDispatchMode):
    """Counts single values that the host reads from tensors: each of them waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_a_step_does_not_read_values_between_its_forward_passes(trainer):
    made = trainer(gradient_accumulation_steps=3)
    with HostReads() as reads:
        loss, _, _ = made._optimizer_step()
    assert reads.count == 0
    assert made.window[0] / made.window[1] == loss > 0


def test_resumed_moments_and_steps_are_on_the_trainers_device(trainer, monkeypatch):
    """Fused AdamW on a GPU reads its number of steps there."""
    made = trainer()
    made._optimizer_step()
    made.step = 1
    made._save()
    made.device = torch.device("meta")
    made._resume()
    states = [made.optimizer.state[value] for value in made.trained.values()]
    assert {tensor.device.type for state in states for tensor in state.values()} == {"meta"}
    resumed = trainer()
    assert resumed.step == 1
    assert {float(state["step"]) for state in resumed.optimizer.state.values()} == {1.0}


def test_products_on_cuda_are_deterministic_for_everyone_who_trains(trainer):
    """A rehearsal trains, too, and does not run scripts/finetune.py."""
    trainer()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
