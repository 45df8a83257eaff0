"""Which errors tell of the machine, and not of the model or options that a library was given."""

import errno
import os

from slmake.errors import UserError

# What libraries in C++ say of memory that they do not get, and the system of a machine that fails.
MEMORY = ("bad_alloc", "bad allocation", "allocate memory", "out of memory", "not enough memory")
MACHINE = (errno.EAGAIN, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOSPC)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, by the exception's kind or its words."""
    # "cannot allocate memory in static TLS block" depends on which library is loaded first.
    if isinstance(error, ImportError):
        return False
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in MEMORY)


def is_of_machine(error: BaseException) -> bool:
    """Whether an error is of the machine, or of this project, so that it says nothing of the model that a library was given."""
    return (
        isinstance(error, UserError)
        or is_out_of_memory(error)
        or any(os.strerror(number) in str(error) for number in MACHINE)
    )
