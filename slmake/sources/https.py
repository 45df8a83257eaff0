"""A file of a web server. User and password come from ~/.netrc (or the file that NETRC names), proxies from the environment."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import parse_qsl, unquote, urlsplit

from slmake import cli
from slmake.credentials import HARMLESS, harmless, masked
from slmake.errors import UserError
from slmake.sources.base import Source, not_of_form
from slmake.sources.download import PASSING, Broken, Restart, download, number_of

TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True, kw_only=True)
class WebFile(Source):
    """`https://host/path`; a query only of parameters that carry no credential."""

    kind = "https"
    prefixes = ("https://", "http://")
    form = "https://host/path"

    @classmethod
    def parse(cls, text: str) -> Self:
        if re.search(r"[\s\0-\x1f\\]", text) or re.search(r"[\0-\x1f\x7f]", unquote(text)):
            raise not_of_form(cls, text, ": it holds white space, a control character or a backslash")
        try:
            url = urlsplit(text)
            _ = url.port
        except ValueError:
            raise not_of_form(cls, text, ": no valid host") from None
        if "@" in url.netloc:
            raise ValueError(
                f"`{masked(text)}`: a URL with a user or password in it is refused: put them into ~/.netrc "
                "(machine HOST login USER password PASSWORD)"
            )
        if not re.fullmatch(r"[\w.-]+|[0-9a-f:]+", url.hostname or "") or url.path in ("", "/"):
            raise not_of_form(cls, text)
        if {".", ".."} & set(re.split(r"[/\\]", unquote(url.path))):
            raise not_of_form(cls, text, ": its path has a part `.` or `..`")
        if ";" in unquote(url.path) or "&" in url.path or "?" in unquote(url.path):
            raise ValueError(
                f"`{masked(text)}`: a URL with parameters in its path is refused: they may be a credential"
            )
        query = parse_qsl(url.query, keep_blank_values=True, max_num_fields=20)
        if (url.query and not query) or ";" in url.query or not all(harmless(*pair) for pair in query):
            raise ValueError(
                f"`{masked(text)}`: a URL with a query is refused but for {', '.join(sorted(HARMLESS))} with short plain values, because "
                "params.yaml, logs and results are shared. Put user and password, or a token as the password, into ~/.netrc. For Azure Blob "
                "use az://container/path, with the SAS in AZURE_STORAGE_SAS_TOKEN"
            )
        return cls(text=text, path=url.path)

    def fetch(self, use: str, folder: Path, job: cli.Job) -> tuple[Path, dict]:
        target = folder / (Path(unquote(self.path)).name or "file")
        with job.progress(None, "B") as bar:
            etag = from_web(self.text, target, bar)
        return target, {"etag": etag} if etag else {}


def from_web(url: str, target: Path, bar: cli.Progress) -> str | None:
    """Download a URL; return its ETag without quotes, if the server gave one."""
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
                _check_status(url, answer, start)
                if not start:
                    given = answer.headers.get("ETag", "")
                    note.write_text("" if given.startswith("W/") else given, encoding="utf-8")
                expected, received = number_of(answer.headers.get("Content-Length")), 0
                for block in answer.iter_content(2**20):
                    received += len(block)
                    yield block
                if received < (expected or 0):
                    raise Broken(f"the connection closed after {start + received:,} bytes")
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            text = str(error)
            reason = (
                "its name does not resolve" if "resolve" in text else "connection refused" if "refused" in text else ""
            )
            raise Broken(f"the connection broke ({reason or type(error).__name__})") from None
        except (requests.RequestException, ValueError) as error:  # the latter: an address that it redirects to is none
            raise UserError(f"{url}: {type(error).__name__}: check the address and the network.") from None

    download(read, target, None, url, bar)
    etag = note.read_text(encoding="utf-8").strip('"')
    note.unlink()
    return etag or None


def _check_status(url: str, answer, start: int) -> None:
    """Raise Broken, Restart or UserError unless the body of an answer continues at byte `start`."""
    if answer.status_code in PASSING:
        raise Broken(f"the server answered {answer.status_code}", number_of(answer.headers.get("Retry-After")) or 0)
    if answer.status_code == 416 or (start and answer.status_code == 200):
        raise Restart
    if answer.status_code in (401, 403):
        raise UserError(
            f"{url}: the server answered {answer.status_code}: access refused. Put user and password (or a token as the password) into "
            "~/.netrc."
        )
    if answer.status_code not in (200, 206):
        raise UserError(f"{url}: the server answered {answer.status_code} {answer.reason}. Check the address.")
