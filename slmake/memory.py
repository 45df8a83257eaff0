"""Memory of this process and this machine: how much there is, and giving back what can be read again."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

PAGE = 4096
PAGEOUT = 21  # MADV_PAGEOUT of Linux: unlike MADV_DONTNEED, it never loses what is not in a file


def available() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, IndexError):
        own = root / Path("/proc/self/cgroup").read_text().split("::")[-1].strip().lstrip("/")
        for group in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit is the word `max`
                limits.append(int((group / "memory.max").read_text()))
    return min(limits)


def release(tensors: Iterable) -> None:
    """Take tensors that are mapped from files out of this process's memory; they are read again when they are needed.

    transformers maps the weights of a safetensors file, so that memory grows with what was read once. Other tensors stay
    as they are, and so does everything on another system than Linux.

    Args:
        tensors: torch tensors on the CPU.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    for tensor in tensors:
        storage = tensor.untyped_storage()
        start = storage.data_ptr() // PAGE * PAGE
        length = storage.data_ptr() + storage.nbytes() - start
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), PAGEOUT)
