"""What a message of ours quotes of another library's."""

import errno

import pytest

from slmake.errors import UserError, first_line, is_of_machine


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad\nat line 3"), "bad"),
        (ValueError("\n\n  bad value\nmore"), "bad value"),
        (KeyError(), "KeyError"),
        (ValueError(" \n"), "ValueError"),
    ],
    ids=["lines", "blank lines first", "no message", "white space"],
)
def test_the_first_line_of_a_message(error, line):
    assert first_line(error) == line


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
        (RuntimeError("[ONNXRuntimeError] : 1 : block_size 8 is not supported"), False),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "model.onnx"), False),
    ],
    ids=str,
)
def test_what_says_nothing_of_the_model(error, of_machine):
    assert is_of_machine(error) == of_machine
