"""Texts without credentials."""

import pytest

from slmake.sources import blob
from slmake.sources.secrets import scrub


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://me:pw@host/x?sig=abc&v=1", "see https://***@host/x?sig=***&v=1"),
        ("https://token@host/x", "https://***@host/x"),
        ("AccountKey=abc;EndpointSuffix=core", "AccountKey=***;EndpointSuffix=core"),
        ("abfs://c:pw@store.dfs/x", "abfs://c:***@store.dfs/x"),
        ("abfs://data@store.dfs.core.windows.net/x", "abfs://data@store.dfs.core.windows.net/x"),
        ("https://host:8080/pkg@1/design=2", "https://host:8080/pkg@1/design=2"),
        ("accuracy=0.8 tokens=12 key=5", "accuracy=0.8 tokens=12 key=5"),
    ],
)
def test_scrub(text, expected):
    assert scrub(text) == expected


def test_credentials_of_the_environment_are_scrubbed(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_KEY", "c2VjcmV0")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=a;AccountKey=b3RoZXI=;X=y")
    assert blob.scrub("c2VjcmV0 and b3RoZXI= refused") == "*** and *** refused"
