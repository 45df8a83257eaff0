"""The exceptions whose messages are written for the user."""

from slmake.credentials import scrub
from slmake.text import printable


class UserError(Exception):
    """Something that the user can correct: the message says what, where, and what to do next.

    Of what it quotes it has neither control characters nor credentials.
    """

    def __init__(self, message: str = ""):
        super().__init__(printable(scrub(message)))


class NotBuildable(UserError):
    """A model cannot be exported with these settings, here or elsewhere: a search records it of a candidate and continues."""


def first_line(error: Exception) -> str:
    """The first line of another library's message, to be quoted in one of ours; without a message, the exception's name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_failure(error: BaseException) -> bool:
    """Whether something failed, and nobody asked for the end: the crash of a library in Rust (pyo3's PanicException) is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


# What to do about symbolic links in the place of a model's files: its weights then lie in another folder, and a package has files alone.
RELINK = "`.venv/bin/dvc config --local cache.type hardlink,copy`, then `.venv/bin/dvc checkout --relink` puts files in the place of DVC's links."
# Where a project is checked, and not built, its signing key is not there.
PUBLIC_HALF = (
    "Without the private key nothing is built here, but the package that `.venv/bin/dvc pull` fetches can be checked, with the public half: "
    "`.venv/bin/python -m tools.verify --key PUBLIC.pem`."
)
