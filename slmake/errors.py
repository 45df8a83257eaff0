"""The exception whose message is written for the user."""


class UserError(Exception):
    """Something that the user can correct: the message says what, where, and what to do next."""
