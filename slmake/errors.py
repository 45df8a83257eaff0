"""The exception whose message is written for the user."""


class UserError(Exception):
    """Something that the user can correct: the message says what, where, and what to do next."""


def first_line(error: Exception) -> str:
    """The first line of another library's message, to be quoted in one of ours; without a message, the exception's name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
