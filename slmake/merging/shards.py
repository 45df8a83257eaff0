"""Reading and writing safetensors files piece by piece, in bounded memory and beside the arithmetic."""

import json
import math
import os
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slmake.errors import UserError
from slmake.model_folder import check_safetensors

READ_AHEAD = 2**26  # bytes that the kernel is asked to read before they are needed
WRITE_BACK = 2**26  # bytes after which the kernel is asked to start writing to the disk


class BufferPool:
    """Buffers that every tensor reuses: the kernel's work on new pages costs several times what the arithmetic does.

    Each buffer exists twice: `swap` changes to the other set, while the first is being written to the file.
    """

    def __init__(self):
        self.flat: dict = {}
        self.side = self.slot = 0

    def swap(self) -> None:
        """Change to the other set of buffers; the current one is unchanged until the next swap."""
        self.side = 1 - self.side

    def get(self, role: str, shape: tuple[int, ...], dtype, swapped: bool = True):
        """A contiguous, uninitialized tensor; it overwrites the previous one of this role in the current set.

        Args:
            swapped: False for a buffer that exists once.
        """
        import torch

        count, key = math.prod(shape), (role, dtype, self.side if swapped else None)
        if count > len(self.flat.get(key, ())):
            self.flat[key] = None  # freed before the larger one is allocated
            self.flat[key] = torch.empty(count, dtype=dtype)
        return self.flat[key][:count].view(tuple(shape))


class AsyncWriter:
    """A file that a thread writes, in order, while the next piece is computed: writing takes as long as the arithmetic."""

    def __init__(self, path: Path, buffers: BufferPool):
        self.buffers, self.pool, self.last = buffers, ThreadPoolExecutor(1), None
        self.file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self.started = 0  # bytes that the kernel was asked to write to the disk

    def __enter__(self):
        return self

    def write(self, tensor) -> None:
        """Start writing a contiguous tensor's bytes. Returns when the previous write has ended, and swaps the buffers.

        Raises:
            OSError: the previous write failed.
        """
        import torch

        data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        previous, self.last = self.last, self.pool.submit(self._write, data)
        if previous:
            previous.result()
        self.buffers.swap()

    def _write(self, data: memoryview) -> None:
        self.file.write(data)
        pending = self.file.tell() - self.started
        if pending >= WRITE_BACK and hasattr(os, "posix_fadvise"):
            # For pages that are not on the disk yet, this asks Linux to start writing them now, not at the end.
            os.posix_fadvise(self.file.fileno(), self.started, pending, os.POSIX_FADV_DONTNEED)
            self.started += pending

    def __exit__(self, kind, *_):
        self.pool.shutdown()
        try:
            if self.last and kind is None:
                self.last.result()
        finally:
            self.file.close()


class Shard:
    """A safetensors file that is read piece by piece into the same buffers (a mapping costs a page fault for every few pages)."""

    def __init__(self, path: Path, buffers: BufferPool):
        self.buffers, self.kinds, self.pool = buffers, check_safetensors(path), ThreadPoolExecutor(1)
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
        self.pool.shutdown(cancel_futures=True)
        self.handle.close()

    def stream(self, name: str, step: int) -> Iterator:
        """A tensor's bytes in order, at most `step` at a time, as uint8; a thread reads the next ones meanwhile.

        There are three buffers for all files of a pool: one is being read into, one is computed with, one may still be being
        written.
        """
        import torch

        pending = deque()
        for first, last in pieces(self.bytes[name], step):
            self.buffers.slot = slot = (self.buffers.slot + 1) % 3
            flat = self.buffers.get(f"read {slot}", (last - first,), torch.uint8, swapped=False)
            pending.append(self.pool.submit(self._read, flat, self.begin[name] + first))
            if len(pending) == 2:
                yield pending.popleft().result()
        for read in pending:
            yield read.result()

    def _read(self, flat, offset: int):
        """Fill a buffer with the file's bytes from `offset`."""
        if hasattr(os, "posix_fadvise") and offset + READ_AHEAD // 2 > self.asked:
            os.posix_fadvise(self.handle.fileno(), offset, READ_AHEAD, os.POSIX_FADV_WILLNEED)
            self.asked = offset + READ_AHEAD
        self.handle.seek(offset)
        view = memoryview(flat.numpy())
        while len(view):
            count = self.handle.readinto(view)
            if not count:
                raise UserError(f"{self.handle.name}: became shorter while it was read. Fetch the model again.")
            view = view[count:]
        return flat


def pieces(length: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, last) of consecutive pieces of at most `step`."""
    for first in range(0, length, step):
        yield first, min(first + step, length)
