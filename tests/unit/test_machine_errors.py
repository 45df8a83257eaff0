"""Errors of the machine, and those of a model or of options."""

import errno

import pytest

from slmake.errors import UserError
from slmake.machine_errors import is_of_machine


@pytest.mark.parametrize(
    ("error", "of_machine"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 4096"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("mmap of model.onnx.data: Cannot allocate memory"), True),
        (OSError(errno.EIO, "Input/output error", "model.onnx"), True),
        (UserError("slmake/export/gptq.py changed after this build was planned"), True),
        (ImportError("libgomp.so.1: cannot allocate memory in static TLS block"), False),
        (RuntimeError("[ONNXRuntimeError] : 1 : block_size 8 is not supported"), False),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "model.onnx"), False),
    ],
    ids=str,
)
def test_what_says_nothing_of_the_model(error, of_machine):
    assert is_of_machine(error) == of_machine
