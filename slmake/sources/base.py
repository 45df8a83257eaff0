"""What every source scheme shares: its class, its pin, and plain relative names. Standard library only."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar, Self
from urllib.parse import unquote

from slmake import cli
from slmake.credentials import masked
from slmake.errors import UserError

MOST_UNPACKED, SMALL = 100, 2**28  # a packed file may become so many times as large, and so many bytes in any case


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Where a dataset or a base model comes from. A subclass for each scheme; schemes.py lists them.

    Attributes:
        text: what is read: as given, without the pin and without the file inside a wheel.
        path: the file or folder: on this disk, or below what the scheme names.
        pin: ("sha256", 64 hex digits) or ("etag", value).
        member: a file inside a wheel.
        in_place_of: the source of params.yaml that it replaces, where azureml/settings.yaml names another.
    """

    kind: ClassVar[str]
    prefixes: ClassVar[tuple[str, ...]]
    form: ClassVar[str]  # how it is written, for messages
    pin_needed: ClassVar[bool] = True  # nothing in the text itself fixes the content
    models_only: ClassVar[bool] = False

    text: str
    path: str = ""
    pin: tuple[str, str] | None = None
    member: str = ""
    in_place_of: str = ""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self:
        """Read a text without its pin.

        Raises:
            ValueError: not of the scheme's form; the message holds no credential.
        """

    @abstractmethod
    def fetch(self, use: str, folder: Path, job: cli.Job) -> tuple[Path, dict]:
        """Bring the content to this disk.

        Args:
            use: `model` or `dataset`.
            folder: where a download is kept, resumed by the next call with the same source and pin.

        Returns:
            The file or folder, and what is worth recording: revision, ETag, version.

        Raises:
            UserError: it is not there or cannot be reached.
        """

    def pinned(self, job: cli.Job) -> str:
        """The source's text with a pin for what is there now; a scheme without one of its own is read once for its SHA-256."""
        from slmake.sources.fetching import sha256_of

        return f"{self.full}#sha256={sha256_of(self, job)}"

    def check_etag(self, actual: str | None) -> None:
        """Raise UserError where the source is pinned to another ETag."""
        if self.pin and self.pin[0] == "etag" and actual != self.pin[1]:
            raise UserError(
                f"{self.full} is not what was asked for: etag {actual or 'unknown'}, expected {self.pin[1]}. If it changed on purpose, "
                f"put the new pin into params.yaml: `python -m tools.pin '{self.full}'` prints it."
            )

    @property
    def full(self) -> str:
        """The source as it was given, with the file inside the wheel, without the pin."""
        return f"{self.text}/{self.member}" if self.member else self.text

    @property
    def remote(self) -> bool:
        """Whether it must be fetched before it can be read."""
        return self.kind != "local"

    @property
    def sha256(self) -> str | None:
        """The SHA-256 it is pinned to, if it is."""
        return self.pin[1] if self.pin and self.pin[0] == "sha256" else None


def check_plain(name: str, text: str) -> str:
    """A relative file name as it is, if it stays inside its folder.

    Raises:
        ValueError: absolute, with `..`, a backslash, an empty part or a control character.
    """
    parts = name.split("/")
    if (
        not name
        or PurePosixPath(name).is_absolute()
        or {"", ".", ".."} & set(parts)
        or re.search(r"[\\\0-\x1f?#]", unquote(name))
    ):
        raise ValueError(
            f"`{masked(text)}` names a file that is no plain relative path: letters, no `..`, no `?` or `#`"
        )
    return name


def not_of_form(source: type[Source], text: str, more: str = "") -> ValueError:
    """The error of a text that is not of its scheme's form."""
    return ValueError(f"`{masked(text)}` is not of the form {source.form}{more}")
