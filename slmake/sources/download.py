"""Files brought over a network: they resume where a connection broke, retries are bounded, and they appear only when whole."""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from slmake import cli, outputs
from slmake.errors import UserError
from slmake.sources import blob

ATTEMPTS = 6  # without a byte of progress
BLOCK = 16 * 2**20  # bytes of one request to Azure Blob
PARALLEL = 4  # requests at a time; a block each is held in memory
TIMEOUT = 60  # seconds without a byte


class Broken(Exception):
    """The connection or the server failed in a way that may pass; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0):
        super().__init__(reason)
        self.wait = wait


class Restart(Exception):
    """The server cannot go on where the partial file ends."""


def download(
    read: Callable[[int], Iterator[bytes]], target: Path, size: int | None, what: str, bar: cli.Progress
) -> None:
    """Write what `read` yields to `target`, which appears only when it is whole.

    Args:
        read: takes an offset in bytes and yields the content from there on; raises Broken, Restart or UserError.
        size: bytes expected, if known.
        what: the source's name, for errors.

    Raises:
        UserError: it broke ATTEMPTS times without a byte of progress. The partial file stays, and the next call goes on there.
    """
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    failures, begun = 0, partial.stat().st_size if partial.exists() else 0
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
            failures = 1 if done > begun else failures + 1
            begun = done
            if failures >= ATTEMPTS:
                raise UserError(
                    f"{what}: {error}, and {ATTEMPTS} attempts brought nothing more ({done:,} bytes are kept). Run the same command "
                    "again later: it goes on from there."
                ) from None
            time.sleep(min(30, error.wait or 0.5 * 2**failures))
    if size is not None and begun != size:
        partial.unlink()
        raise UserError(f"{what}: {begun:,} bytes came, {size:,} were announced. Run the same command again.")
    partial.rename(target)


def from_web(url: str, target: Path, bar: cli.Progress) -> str | None:
    """Download a URL; return its ETag without quotes, if the server gave one. ~/.netrc and proxy settings are honoured."""
    import requests

    target.parent.mkdir(parents=True, exist_ok=True)
    note = target.with_name(f"{target.name}.etag")  # which content the partial file is a part of
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"

    def read(start: int) -> Iterator[bytes]:
        etag = note.read_text(encoding="utf-8") if note.exists() else ""
        if start and not etag:
            raise Restart
        headers = {"Range": f"bytes={start}-", "If-Range": etag} if start else {}
        try:
            with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
                if answer.status_code in blob.PASSING:
                    after = answer.headers.get("Retry-After", "")
                    raise Broken(f"the server answered {answer.status_code}", float(after) if after.isdigit() else 0)
                if answer.status_code == 416 or (start and answer.status_code == 200):
                    raise Restart
                if answer.status_code in (401, 403):
                    raise UserError(
                        f"{url}: the server answered {answer.status_code}: access refused. Put user and password into ~/.netrc."
                    )
                if answer.status_code not in (200, 206):
                    raise UserError(
                        f"{url}: the server answered {answer.status_code} {answer.reason}. Check the address."
                    )
                if not start:
                    given = answer.headers.get("ETag", "")
                    note.write_text("" if given.startswith("W/") else given, encoding="utf-8")
                expected, came = answer.headers.get("Content-Length"), 0
                for block in answer.iter_content(2**20):
                    came += len(block)
                    yield block
                if expected and came < int(expected):
                    raise Broken(f"the connection closed after {start + came:,} bytes")
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            said = str(error)
            reason = (
                "its name does not resolve" if "resolve" in said else "connection refused" if "refused" in said else ""
            )
            raise Broken(f"the connection broke ({reason or type(error).__name__})") from None
        except requests.RequestException as error:
            raise UserError(f"{url}: {type(error).__name__}: check the address and the network.") from None

    download(read, target, None, url, bar)
    etag = note.read_text(encoding="utf-8").strip('"')
    note.unlink()
    return etag or None


def from_blob(fs, container: str, entry: blob.Blob, target: Path, what: str, bar: cli.Progress) -> None:
    """Download one blob, PARALLEL blocks at a time, on the condition that its ETag stays what the listing said."""
    import asyncio

    from azure.core import MatchConditions
    from azure.core import exceptions as azure

    client = fs.service_client.get_blob_client(container, entry.path)

    async def block(start: int) -> bytes:
        stream = await client.download_blob(
            offset=start,
            length=min(BLOCK, entry.size - start),
            etag=f'"{entry.etag}"',
            match_condition=MatchConditions.IfNotModified,
            **blob.RETRIES,
        )
        return await stream.readall()

    async def blocks(start: int) -> list[bytes | BaseException]:
        starts = range(start, min(entry.size, start + PARALLEL * BLOCK), BLOCK)
        return await asyncio.gather(*map(block, starts), return_exceptions=True)

    def read(start: int) -> Iterator[bytes]:
        while start < entry.size:
            for came in blob.run(fs, functools.partial(blocks, start)):
                if isinstance(came, azure.ResourceModifiedError):
                    raise UserError(f"{what}: it was changed while it was read. Run the same command again.")
                if isinstance(came, azure.HttpResponseError) and came.status_code not in (
                    429,
                    500,
                    502,
                    503,
                    504,
                    206,
                    200,
                ):
                    raise blob.explain(came, what)
                if isinstance(came, azure.AzureError | OSError):
                    raise Broken(f"the connection broke ({type(came).__name__})", blob.wait_asked(came))
                if isinstance(came, BaseException):
                    raise came
                yield came
                start += len(came)

    download(read, target, entry.size, what, bar)


def digest_of(files: dict[str, str]) -> str:
    """SHA-256 over names and sums of several files: what `outputs.folder_digest` gives for a folder of exactly these."""
    lines = (f"{name}\0{value}\n" for name, value in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sums(files: dict[str, Path]) -> dict[str, str]:
    """SHA-256 of each file, by the name it is known by."""
    return {name: outputs.sha256(path) for name, path in sorted(files.items())}
