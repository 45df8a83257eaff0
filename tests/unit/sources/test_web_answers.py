"""What a web server answers is never trusted: one clear message, and nothing of it reaches the terminal as an escape sequence."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from slmake import cli
from slmake.sources import download
from slmake.sources.blob import wait_asked
from slmake.sources.fetching import fetch
from slmake.sources.schemes import parse

SUM = "a" * 64


@contextmanager
def server(answer: bytes) -> Iterator[str]:
    """A server that gives every request the same bytes; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    client.recv(65536)
                    client.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def asked(answer: bytes, tmp_path, monkeypatch, refused) -> str:
    """The message that a source of such a server gets."""
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)

    def run(url: str) -> None:
        with cli.job("test") as job:
            fetch(parse(f"{url}/rows.json#sha256={SUM}"), "data", tmp_path, job)

    with server(answer) as url:
        return refused(run, url)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"200 OK\r\nContent-Length: abc", "InvalidHeader|attempts gave nothing more|sha256"),
        (b"200 OK\r\nContent-Length: \xb2", "attempts gave nothing more|sha256"),
        (b"200 OK\r\nContent-Length: " + b"9" * 5000, "attempts gave nothing more|sha256"),
        (b"503 Busy\r\nRetry-After: \xb2", "the server answered 503, and 6 attempts gave nothing more"),
        (b"503 Busy\r\nRetry-After: " + b"9" * 5000, "the server answered 503, and 6 attempts gave nothing more"),
        (b"302 Found\r\nLocation: http://[::1", "check the address and the network"),
        (b"302 Found\r\nLocation: http://a..b/x", "check the address and the network"),
        (b"302 Found\r\nLocation: http://" + b"a" * 80 + b"/x", "check the address and the network"),
        (b"302 Found\r\nLocation: http://\xff\xfe/x", "check the address and the network"),
        (b"404 \x1b[31mred\x1b]0;title\x07", "the server answered 404 .*red.*Check the address"),
    ],
)  # fmt: skip
def test_a_strange_answer_is_one_message(answer, reason, tmp_path, monkeypatch, refused):
    message = asked(b"HTTP/1.1 " + answer + b"\r\nConnection: close\r\n\r\n[]", tmp_path, monkeypatch, refused)
    assert re.search(reason, message)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", message)


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7), ("99", 30), ("\xb2", 0), ("9" * 5000, 0), ("Fri, 27 Nov 2026 10:00:00 GMT", 0)]
)
def test_how_long_a_server_asks_to_wait(header, seconds):
    class Failure(Exception):
        response = SimpleNamespace(headers={"Retry-After": header})

    assert wait_asked(Failure()) == seconds


def test_what_is_downloaded_again_is_no_progress(tmp_path, monkeypatch, refused):
    """Without an ETag nothing can be resumed: a body that is cut each time ends after as many attempts as any other failure."""
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\nConnection: close\r\n\r\n" + b"x" * (2**20 + 1)
    assert "6 attempts gave nothing more (1,048,576 bytes are kept)" in asked(cut, tmp_path, monkeypatch, refused)
