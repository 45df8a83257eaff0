"""memory: pages of mapped weights are given back, and nothing else is lost."""

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from slmake import memory

SIZE = 2**24  # weights of 4 bytes


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_mapped_weights_leave_memory_and_keep_their_values(tmp_path):
    generator = torch.Generator().manual_seed(0)
    save_file({"weight": torch.randn(SIZE, generator=generator)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        weight = file.get_slice("weight")[...]
    expected = weight.sum()
    before = resident()
    memory.release([weight])
    assert before - resident() > 0.9 * 4 * SIZE
    assert weight.sum() == expected


def test_other_tensors_keep_their_values():
    weight = torch.arange(SIZE)
    memory.release([weight, weight[5:7], torch.empty(0)])
    assert torch.equal(weight, torch.arange(SIZE))


def test_available_is_no_more_than_the_machine_has():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**28 < memory.available() <= total
