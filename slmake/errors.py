"""The exception whose message is written for the user."""

import errno
import os

from slmake.text import printable

# What libraries in C++ say of memory that they do not get, and the system of a machine that fails.
MEMORY = ("bad_alloc", "bad allocation", "allocate memory", "out of memory", "not enough memory")
MACHINE = (errno.EAGAIN, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOSPC)


class UserError(Exception):
    """Something that the user can correct: the message says what, where, and what to do next; with no control character of what it quotes."""

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


class NotBuildable(UserError):
    """A model cannot be exported with these settings, here or elsewhere: a search records it of a candidate, and goes on."""


def first_line(error: Exception) -> str:
    """The first line of another library's message, to be quoted in one of ours; without a message, the exception's name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, by the exception's kind or its words."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in MEMORY)


def is_of_machine(error: BaseException) -> bool:
    """Whether an error tells of the machine, or is ours, so that it says nothing of the model that a library was given."""
    return (
        isinstance(error, UserError)
        or is_out_of_memory(error)
        or any(os.strerror(number) in str(error) for number in MACHINE)
    )


def is_failure(error: BaseException) -> bool:
    """Whether something failed, and nobody asked for the end: the crash of a library in Rust (pyo3's PanicException) is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
