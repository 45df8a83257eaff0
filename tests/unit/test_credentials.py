"""Texts without credentials."""

import pytest
from bad_inputs import SECRET
from tiny import write_params

from slmake import params
from slmake.credentials import harmless, holds_secret, masked, scrub
from slmake.errors import UserError
from slmake.sources import blob


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
        ("`https://h/x?abc123`: refused", "`https://h/x?***`: refused"),
        ("is https://h/x?***, not in Azure", "is https://h/x?***, not in Azure"),
        ("https://h/x?download: no such file", "https://h/x?download: no such file"),
        ("`AccountKey=abc` is no date, x,AccountKey=abc", "`AccountKey=***` is no date, x,AccountKey=***"),
    ],
)
def test_scrub(text, expected):
    assert scrub(text) == expected


@pytest.mark.parametrize(
    "begin",
    [
        *("hf_", "ghp_", "github_pat_", "glpat-", "xoxb-1-2-", "AKIA", "AIza", "eyJhbGciOiJIUzI1NiJ9.eyJ"),
        *("sk-", "sk-proj-", "sk-proj-Ab_c-", "sk-ant-api03-", "sk-svcacct-"),
    ],
)
def test_credentials_that_say_whose_they_are(begin):
    """Wherever they stand: they are recognized without a name before them."""
    token = begin + ("SECRETSECRET9999" if begin == "AKIA" else "Secret9" * 6)
    assert scrub(f"package.name: {token}: refused") == "package.name: ***: refused"
    assert scrub(f"MY_{token}") == "MY_***"
    assert holds_secret(f"https://h/{token}/rows.json")


@pytest.mark.parametrize(
    "text",
    ["hf_internal_testing/tiny-random-LlamaForCausalLM", "hf:org/sk-resnet-50-large-model-v2", "eyJust.eyJack.x"],
)
def test_names_that_look_like_credentials(text):
    assert scrub(text) == text
    assert not holds_secret(text)


KEY = f"-----BEGIN EC PRIVATE KEY-----\n{'SECRET99' * 8}\nSECRET9==\n-----END EC PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        repr(KEY),
        " ".join(KEY.split("\n")),
        KEY[:80],
        KEY.replace("EC ", ""),
        KEY.replace("EC PRIVATE KEY", "PGP PRIVATE KEY BLOCK"),
    ],
)
def test_no_message_repeats_a_private_key(text):
    """Its file's content in the place of its name, by whatever reads the parameter."""
    shown = str(UserError(f"package.license_files: {text}: no such file. Correct it."))
    assert "SECRET" not in shown
    assert shown.endswith(": no such file. Correct it.")


# Without the first line and the last, of P-256 and of Ed25519.
BASE64 = ("MHcCAQEEI" + "SECRET99 " * 19 + "==", "MC4CAQAwBQYDK2VwBCIEI" + "SECRET99" * 5 + "ab=")


@pytest.mark.parametrize("key", [KEY, KEY.strip().replace("\n", " "), *BASE64])
def test_a_key_in_params_yaml_is_refused_as_one(tmp_path, key):
    with pytest.raises(UserError, match=r"package\.signing_key: this is a key, and the name of its file") as refused:
        params.load(write_params(tmp_path / "params.yaml", package={"signing_key": key}))
    assert "SECRET" not in str(refused.value)
    named = write_params(tmp_path / "named.yaml", package={"signing_key": "../keys/my key.pem"})
    assert params.load(named).package.signing_key == "../keys/my key.pem"


def test_every_message_of_ours_loses_its_secrets_once():
    shown = str(
        UserError(f"params.yaml: fetch_model.chat_template: https://u:{SECRET}@h/x?v=1&sig={SECRET}: no such file")
    )
    assert shown == "params.yaml: fetch_model.chat_template: https://***@h/x?v=1&sig=***: no such file"
    assert str(UserError(shown)) == shown == scrub(shown)
    assert scrub(masked(f"https://h/x?sig={SECRET}")) == masked(f"https://h/x?sig={SECRET}") == "https://h/x?***"


def test_a_long_name_takes_no_time():
    """An hour, where its parts can be told apart in several ways."""
    for part, count in (("a_", 40), ("eyJaaaaaaaa-", 20000)):
        assert scrub(part * count + "x") == part * count + "x"


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
