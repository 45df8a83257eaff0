"""Texts without credentials."""

import pytest
from bad_inputs import SECRET
from tiny import write_params

from slmake import params
from slmake.errors import UserError
from slmake.sources import blob
from slmake.sources.secrets import harmless, scrub


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


@pytest.mark.parametrize(
    "line",
    [
        f"https://u:{SECRET}@h/x.json: bad",
        f'"https://h/x?sig={SECRET}"x',
        f"@https://u:{SECRET}@h/x.json",
        f"%https://h/x?code={SECRET}",
        f"[https://u:{SECRET}@h/x",
    ],
)
def test_a_line_that_is_no_yaml_is_not_repeated(tmp_path, line):
    file = tmp_path / "params.yaml"
    file.write_text(f"prepare:\n  source: {line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"not valid YAML: .*line \d, column \d") as refused:
        params.load(file)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("query", ["code", "anything", "x"])
def test_a_query_is_not_repeated_wherever_it_stands(tmp_path, query):
    file = write_params(tmp_path / "params.yaml", finetune={"lora_r": f"https://h/x?{query}={SECRET}"})
    with pytest.raises(UserError, match=r"finetune\.lora_r: .*not allowed") as refused:
        params.load(file)
    assert SECRET not in str(refused.value)
    assert scrub("see https://h/x?version=2") == "see https://h/x?version=2"


@pytest.mark.parametrize(
    "text",
    [
        "https://user:p@SECRET99@host/x was not found",
        "https://user:p/SECRET99@host/x was not found",
        "Authorization: Bearer SECRET99",
        '{"access_token": "SECRET99"}',
        "https://host/x?sig%3DSECRET99",
    ],
)
def test_other_peoples_messages_lose_their_secrets(text):
    assert "SECRET99" not in scrub(text)


@pytest.mark.parametrize("query", ["v=SECRETSECRET99", "raw=SECRETSECRET99", "download=SECRETSECRET99"])
def test_a_flag_of_an_address_is_no_place_for_a_secret(query):
    assert not harmless(*query.split("="))
    assert harmless("raw", "true")
