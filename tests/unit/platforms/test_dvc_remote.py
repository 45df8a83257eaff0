"""The default remote by DVC's settings and the environment: no message, and no file that Git has, repeats a credential of them."""

import base64
import os
from pathlib import Path

import pytest
from tiny import write_params

from slmake.errors import UserError
from slmake.platforms import dvc_remote
from slmake.sources import blob
from tools import remote

SECRET = "s3cr3tS3CR3T"


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch) -> Path:
    """DVC's settings, without a remote yet; the environment names no account."""
    monkeypatch.chdir(tmp_path)
    for name in ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    Path(".dvc").mkdir()
    return Path(".dvc/config")


def with_url(config: Path, url: str) -> None:
    config.write_text(f"[core]\n    remote = storage\n['remote \"storage\"']\n    url = {url}\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("url", "container", "path"),
    [
        ("azure://models/tones/", "models", "tones"),
        ("azure://models", "models", ""),
        ("azure://models/my%20models", "models", "my%20models"),
    ],
)
def test_a_remote(config, url, container, path):
    with_url(config, url)
    assert dvc_remote.place() == ("", container, path)


@pytest.mark.parametrize(
    "url",
    [
        f"azure://models/x?sig={SECRET}",
        f"azure://me:{SECRET}@models/x",
        f"azure://m/token={SECRET}",
        f"s3://me:{SECRET}@b",
    ],
)
def test_a_credential_in_a_remote_is_refused_and_not_repeated(config, url):
    with_url(config, url)
    with pytest.raises(UserError, match=r"^the remote storage is") as refused:
        dvc_remote.place()
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("file", dvc_remote.CONFIG)
@pytest.mark.parametrize("text", ["<<<<<<< HEAD\n", "[core]\na = 1\n[core]\n", "\xff"])
def test_settings_that_cannot_be_read_are_named(config, file, text):
    with_url(config, "azure://models/tones")
    Path(file).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"^{file} cannot be read: .* bring back what Git has"):
        dvc_remote.place()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AZURE_STORAGE_ACCOUNT", f"https://a.blob.core.windows.net/?sig={SECRET}"),
        ("AZURE_STORAGE_CONNECTION_STRING", f"AccountName=models AccountKey={SECRET}"),
        ("AZURE_STORAGE_CONNECTION_STRING", f"AccountName=models,AccountKey={SECRET}"),
    ],
)
def test_what_is_no_account_s_name_is_not_written(config, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(remote, "dvc", lambda *arguments: pytest.fail("written"))
    with pytest.raises(UserError, match=f"{variable} is no name of an account") as refused:
        remote.add("azure://models/tones")
    assert SECRET not in str(refused.value)


def test_the_account_of_the_environment(monkeypatch):
    assert dvc_remote.account_name() is None
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "models2")
    assert dvc_remote.account_name() == "models2"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"AccountKey={SECRET};AccountName=models;X=y")
    assert dvc_remote.account_name() == "models"


def test_an_account_that_is_none_is_named_nowhere(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", f"models;AccountKey={SECRET}")
    assert not blob.account_here()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "models")
    assert blob.account_here() == "models"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"AccountName=archive {SECRET};AccountKey=x")
    assert not blob.account_here()
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=archive;AccountKey=x")
    assert blob.account_here() == "archive"


def test_credentials_of_another_account_are_not_used(config, monkeypatch):
    """adlfs, and with it DVC, takes the connection string of the environment whatever account is named."""
    key = base64.b64encode(b"key").decode()
    string = f"DefaultEndpointsProtocol=https;AccountName=models;AccountKey={key};EndpointSuffix=core.windows.net"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", string)
    with_url(config, "azure://models/tones")
    config.write_text(config.read_text() + "    account_name = models\n")
    assert dvc_remote.place() == ("models", "models", "tones")
    config.write_text(config.read_text().replace("= models", "= archive"))
    with pytest.raises(
        UserError, match=r"remote .* is of the account archive, AZURE_STORAGE_CONNECTION_STRING of models"
    ):
        dvc_remote.place()
    for account, credential in (("models", None), ("archive", "key")):
        opened = blob.filesystem(account, credential)
        assert opened.account_name == account
        assert opened.service_client.account_name == account
        assert (opened.connection_string == string) == (account == "models")
    assert os.environ["AZURE_STORAGE_CONNECTION_STRING"] == string
    shared = "BlobEndpoint=https://models.blob.core.windows.net/;SharedAccessSignature=sv=1&sig=x"
    local = "BlobEndpoint=http://127.0.0.1:10000/models;SharedAccessSignature=sv=1&sig=x"  # no name is known to be its account's
    own = "BlobEndpoint=https://blobs.example.com;SharedAccessSignature=sv=1&sig=x"
    second = "blobendpoint=https://MODELS-secondary.z1.blob.storage.azure.net/;SharedAccessSignature=sv=1"
    assert {
        blob.account_of(text) for text in (string, string.replace("AccountName", "accountname"), shared, second)
    } == {"models"}
    assert {blob.account_of(text) for text in (local, own, "", "x")} == {""}


@pytest.mark.parametrize("command", ["pull", "restore"])
def test_a_missing_signing_key_is_said_before_anything_moves(monkeypatch, capsys, command):
    done = []
    monkeypatch.setattr(remote, command, lambda job: done.append(command))
    write_params(Path("params.yaml"), package={"signing_key": "key.pem"})
    with pytest.raises(SystemExit):
        remote.main([command])
    assert "key.pem: no such file" in (said := capsys.readouterr().err)
    assert "`.venv/bin/python -m tools.verify --key PUBLIC.pem`" in said
    assert not done
    Path("key.pem").touch()
    remote.main([command])
    write_params(
        Path("params.yaml"), package={"signing_key": "gone.pem"}, all={"stages": ["finetune"]}
    )  # signs nothing
    remote.main([command])
    assert done == [command] * 2
