"""Downloads: a broken one resumes, retries are bounded, and a file appears only when it is complete."""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from slmake import cli
from slmake.errors import UserError

ATTEMPTS = 6  # without a byte of progress
PASSING = (429, 500, 502, 503, 504)  # HTTP answers that another try may change


class Broken(Exception):
    """A failure of connection or server that may pass; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0):
        super().__init__(reason)
        self.wait = wait


class Restart(Exception):
    """The server cannot continue where the partial file ends."""


def number_of(header: str | None) -> int | None:
    """The whole number that a header of an HTTP answer is; None where it is absent or another text."""
    return int(header) if re.fullmatch(r"[0-9]{1,15}", header or "") else None


def download(
    read: Callable[[int], Iterator[bytes]], target: Path, size: int | None, what: str, bar: cli.Progress
) -> None:
    """Write what `read` yields to `target`, which appears only when it is complete.

    Args:
        read: takes an offset in bytes and yields the content from there on; raises Broken, Restart or UserError.
        size: bytes expected, if known.
        what: the source's name, for errors.

    Raises:
        UserError: it broke ATTEMPTS times without a byte of progress. The partial file stays, and the next call resumes it.
    """
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    failures, begun = 0, partial.stat().st_size if partial.exists() else 0
    furthest = begun  # what is downloaded again is no progress
    bar.update(begun)
    while size is None or begun < size or not partial.exists():
        done = begun
        try:
            with open(partial, "ab") as out:
                for block in read(done):
                    out.write(block)
                    done += len(block)
                    bar.update(len(block))
            if size is not None and done < size:
                raise Broken(f"the connection closed after {done:,} of {size:,} bytes")
            begun = done
            break
        except Restart:
            bar.update(-done)
            partial.unlink(missing_ok=True)
            begun = 0
            continue
        except Broken as error:
            failures = 1 if done > furthest else failures + 1
            begun, furthest = done, max(done, furthest)
            if failures >= ATTEMPTS:
                raise UserError(
                    f"{what}: {error}, and {ATTEMPTS} attempts gave nothing more ({done:,} bytes are kept). Run the same command "
                    "again later: it resumes there."
                ) from None
            time.sleep(min(30, error.wait or 0.5 * 2**failures))
    if size is not None and begun != size:
        partial.unlink()
        raise UserError(f"{what}: {begun:,} bytes arrived, {size:,} were announced. Run the same command again.")
    partial.rename(target)


def digest_of(files: dict[str, str]) -> str:
    """SHA-256 over names and sums of several files: what `outputs.folder_digest` gives for a folder of exactly these."""
    lines = (f"{name}\0{value}\n" for name, value in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
