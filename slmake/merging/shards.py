"""Reading and writing safetensors files piece by piece, by several threads in bounded memory."""

import json
import math
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from slmake.errors import UserError
from slmake.model_folder import check_safetensors

READ_AHEAD = 2**26  # bytes that the kernel is asked to read before they are needed
WRITE_BACK = 2**26  # bytes after which the kernel is asked to start writing to the disk


class Buffers:
    """Buffers that every tensor reuses: the kernel's work on new pages costs several times what the arithmetic does."""

    def __init__(self):
        self.flat: dict = {}

    def get(self, role: str, shape: tuple[int, ...], dtype):
        """A contiguous, uninitialized tensor; it overwrites the previous one of the same role."""
        import torch

        count, key = math.prod(shape), (role, dtype)
        if count > len(self.flat.get(key, ())):
            self.flat[key] = None  # freed before the larger one is allocated
            self.flat[key] = torch.empty(count, dtype=dtype)
        return self.flat[key][:count].view(tuple(shape))


class BufferPool(Buffers, threading.local):
    """Each thread's own buffers."""


def in_order(threads: ThreadPoolExecutor, function: Callable, tasks: Iterable, ahead: int) -> Iterator:
    """The results of `function` for each task, in order; at most `ahead` tasks are drawn before their results are taken.

    Raises what `function` raised. When the iterator is closed, no task is running, and none will.
    """
    pending = deque()
    try:
        for task in tasks:
            pending.append(threads.submit(function, task))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        wait([future for future in pending if not future.cancel()])


class Output:
    """A file of known layout, of which every thread writes its pieces at their offsets."""

    def __init__(self, path: Path):
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self.started = 0  # bytes that the kernel was asked to write to the disk

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data, offset: int) -> int:
        """Write bytes at an offset; returns the offset behind them.

        Raises:
            OSError: the disk is full, for example.
        """
        view = memoryview(data)
        while len(view):
            count = os.pwrite(self.file.fileno(), view, offset)
            view, offset = view[count:], offset + count
        return offset

    def complete(self, end: int) -> None:
        """Say that everything before `end` is written."""
        pending = end - self.started
        if pending >= WRITE_BACK and hasattr(os, "posix_fadvise"):
            # For pages that are not on the disk yet, this asks Linux to start writing them now, not at the end.
            os.posix_fadvise(self.file.fileno(), self.started, pending, os.POSIX_FADV_DONTNEED)
            self.started = end


class Shard:
    """A safetensors file that threads read piece by piece (a mapping costs a page fault for every few pages)."""

    def __init__(self, path: Path):
        self.kinds = check_safetensors(path)
        self.handle = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        (length,) = struct.unpack("<Q", self.handle.read(8))
        specs = json.loads(self.handle.read(length))
        self.metadata = specs.pop("__metadata__", {})
        self.shapes = {name: spec["shape"] for name, spec in specs.items()}
        self.begin = {name: 8 + length + spec["data_offsets"][0] for name, spec in specs.items()}
        self.bytes = {name: spec["data_offsets"][1] - spec["data_offsets"][0] for name, spec in specs.items()}
        self.asked = 0  # end of what the kernel was asked to read ahead

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.close()

    def read(self, tensor, offset: int):
        """Fill a contiguous tensor with the file's bytes from `offset`, and return it.

        Raises:
            UserError: the file ends before that.
        """
        if hasattr(os, "posix_fadvise") and offset + READ_AHEAD // 2 > self.asked:
            os.posix_fadvise(self.handle.fileno(), offset, READ_AHEAD, os.POSIX_FADV_WILLNEED)
            self.asked = offset + READ_AHEAD
        view = memoryview(as_bytes(tensor))
        while len(view):
            count = os.preadv(self.handle.fileno(), [view], offset)
            if not count:
                raise UserError(f"{self.handle.name}: became shorter while it was read. Fetch the model again.")
            view, offset = view[count:], offset + count
        return tensor


def as_bytes(tensor):
    """A contiguous tensor's memory as uint8 [bytes], shared with it."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy()


def pieces(length: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, last) of consecutive pieces of at most `step`; (0, 0) of nothing."""
    for first in range(0, max(length, 1), step):
        yield first, min(first + step, length)
