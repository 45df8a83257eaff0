"""docs/azure.md: every command in it, as it stands there, from an empty account to a colleague's pull."""

import json
import re
import subprocess

import pytest
from preloaded import link_environment
from project import change, environment, planned, run
from sharing import contents, git, initialise
from tiny import ROOT, make_rows

pytestmark = pytest.mark.real

# Who uses Git has told it a name; an empty home folder has not.
AUTHOR = {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def equip(project) -> None:
    """The environment that `make setup` made already, and file times that say so."""
    link_environment(project / ".venv")
    for lock in (project / "envs").glob("*.lock"):
        subprocess.run(["touch", "-d", "2020-01-01", lock], check=True)
    (project / ".git" / "info" / "exclude").write_text(".venv\nMakefile\n")


def test_every_command_as_written(copy_of_built, tmp_path, blob_server, container, monkeypatch):
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "azure.md").read_text(encoding="utf-8"), re.M | re.S)
    share, colleague, version, pin, publish = blocks

    def shell(project, block: str) -> str:
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", block],
            cwd=project,
            env=environment() | AUTHOR,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    client = blob_server.client()
    owner, other = copy_of_built, tmp_path / "other"
    initialise(owner)
    (owner / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    equip(owner)
    git(owner, "add", "-A")
    git(owner, "commit", "-q", "-m", "start")

    assert "the container models was created" in shell(owner, share)
    git(tmp_path, "clone", "-q", str(owner), "other")
    (other / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    equip(other)
    output = shell(other, colleague)
    assert "everything matches its receipt" in output
    assert "up to date" in output
    assert "Nothing to be done" in output
    assert contents(other) == contents(owner)

    rows = "".join(json.dumps(row) + "\n" for row in make_rows(96))
    (other / "data" / "phrases.jsonl").write_text(rows, encoding="utf-8")
    shell(other, version)
    client.create_container("data")
    client.get_blob_client("data", "phrases.jsonl").upload_blob(rows)
    assert re.search(r"^az://data/phrases.jsonl#etag=\S+$", shell(other, pin), re.M)

    client.create_container("released")
    change(other, "all", stages=["finetune", "merge", "quantize", "evaluate", "gates", "publish"])
    change(other, "publish", url="az://released/tones")
    assert planned(other) == {"publish"}
    assert "every byte is right" in shell(other, publish)
    assert planned(other) == set()
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=second;AccountKey=x")
    assert planned(other) == {"publish"}  # az://container/path leaves the account to the environment
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    assert planned(other) == set()  # nothing can be published
    assert run(other, "git", "status", "--porcelain", "data").stdout == ""
    for name in ("models", "data", "released"):
        client.delete_container(name)
