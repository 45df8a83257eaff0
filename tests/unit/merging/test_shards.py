"""Threads that read, merge and write pieces of one file."""

import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch
from safetensors.torch import save_file

from slmake.errors import UserError
from slmake.merging import shards


def test_results_come_in_order_whoever_is_first():
    with ThreadPoolExecutor(4) as threads:
        squares = shards.in_order(threads, lambda n: (time.sleep(0.001 * (n % 3)), n * n)[1], range(50), 8)
        assert list(squares) == [n * n for n in range(50)]


def test_tasks_are_drawn_only_so_far_ahead():
    drawn = []
    with (
        ThreadPoolExecutor(2) as threads,
        closing(shards.in_order(threads, lambda n: n, (drawn.append(n) or n for n in range(100)), 5)) as results,
    ):
        assert next(results) == 0
        assert len(drawn) == 6


def test_a_failure_is_raised_and_nothing_runs_after_the_end():
    """A file that is closed then is written no more."""
    begun, closed = [], threading.Event()

    def work(n: int) -> int:
        begun.append((n, closed.is_set()))
        time.sleep(0.01)
        if n == 3:
            raise OSError("no space left on device")
        assert not closed.is_set()
        return n

    with ThreadPoolExecutor(3) as threads:
        with (
            pytest.raises(OSError, match="no space"),
            closing(shards.in_order(threads, work, range(100), 20)) as results,
        ):
            list(results)
        closed.set()
        count = len(begun)
        time.sleep(0.1)
    assert len(begun) == count < 40
    assert not any(late for _, late in begun)


def test_each_thread_has_its_own_buffers():
    buffers = shards.BufferPool()
    mine = buffers.get("read", (4, 2), torch.float32)
    assert buffers.get("read", (8,), torch.float32).data_ptr() == mine.data_ptr()
    with ThreadPoolExecutor(1) as other:
        assert other.submit(buffers.get, "read", (4, 2), torch.float32).result().data_ptr() != mine.data_ptr()


def test_a_file_that_became_shorter_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.arange(1000.0)}, file)
    with shards.Shard(file) as shard:
        whole = shard.read(torch.empty(1000), shard.begin["weight"])
        assert torch.equal(whole, torch.arange(1000.0))
        with open(file, "r+b") as handle:
            handle.truncate(file.stat().st_size - 4)
        with pytest.raises(UserError, match="became shorter while it was read"):
            shard.read(torch.empty(1000), shard.begin["weight"])


def test_pieces_are_written_at_their_places_in_any_order(tmp_path):
    with shards.Output(tmp_path / "out") as out:
        assert out.write(struct.pack("<Q", 7), 16) == 24
        assert out.write(b"x" * 16, 0) == 16
        out.complete(24)
    assert (tmp_path / "out").read_bytes() == b"x" * 16 + struct.pack("<Q", 7)
