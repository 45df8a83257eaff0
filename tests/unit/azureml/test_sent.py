"""What is sent to Azure ML: no credential, and the commit that it is of."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
from test_azureml import loaded, small_plan
from tiny import ROOT

from slmake import params
from slmake.azureml import service
from slmake.azureml.pipeline import Mount
from slmake.errors import UserError


@pytest.mark.parametrize("field", ["data", "model"])
@pytest.mark.parametrize(
    "text",
    [
        "azureml://datastores/shop/paths/a.json?sv=2022-11-02&sig=SECRET99",
        "azureml://datastores/shop/paths/token=SECRET99/a.json",
        "azureml://datastores/shop/paths/a.json?code=SECRET99",
        "hf:org/name@main?token=SECRET99",
        "https://u:SECRET99@host/a.json",
    ],
)
def test_no_credential_gets_into_the_pipeline(tmp_path, field, text):
    """What stands in the settings is written into the pipeline, the steps' code and the run's tags."""
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, **{field: text})
    assert "nothing was sent" in str(caught.value)
    assert "SECRET99" not in str(caught.value)


def test_the_commit_is_that_of_what_is_sent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for name in ("params.yaml", "Snakefile", "dvc.lock"):
        Path(name).write_text("first")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    everything = params.load(ROOT / "params.yaml")
    Path("dvc.lock").write_text("of the last build here")
    assert service.tags(everything, small_plan())["git_commit"] == commit
    for name in ("params.yaml", "data/train.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("second")
        assert service.tags(everything, small_plan())["git_commit"] == f"{commit}-changed"
        subprocess.run([*git, "stash", "-q", "--include-untracked"], check=True)


def test_the_commit_has_what_dvc_keeps_by_its_receipt(tmp_path, monkeypatch):
    """Git ignores a large dataset, and says nothing of it."""
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    data, run = Path("data/train.json"), functools.partial(subprocess.run, check=True, capture_output=True)
    data.parent.mkdir()
    data.write_text("[]")
    run([*git, "init", "-q"])
    run([sys.executable, "-m", "dvc", "init", "-q"])
    run([sys.executable, "-m", "dvc", "add", "-q", str(data)])
    run([*git, "add", "."])
    run([*git, "commit", "-q", "-m", "first"])
    everything = params.load(ROOT / "params.yaml")
    sent = small_plan()._replace(data={"data": Mount(str(data), str(data), "uri_file")})

    def is_changed(plan=sent) -> bool:
        return service.tags(everything, plan)["git_commit"].endswith("-changed")

    assert not is_changed()
    data.chmod(0o644)
    data.write_text("[1]")
    assert is_changed()
    run([sys.executable, "-m", "dvc", "add", "-q", str(data)])
    assert is_changed()  # the receipt is another
    run([*git, "commit", "-q", "-a", "-m", "second"])
    assert not is_changed()
    run([*git, "rm", "-q", "--cached", "data/train.json.dvc"])
    Path("data/train.json.dvc").unlink()
    run([*git, "commit", "-q", "-a", "-m", "third"])
    assert is_changed()  # nothing has it
    assert not is_changed(small_plan())  # Azure reads another in its place


def test_what_is_behind_a_link_is_not_in_the_commit(tmp_path, monkeypatch):
    """Git has the link alone."""
    project, git = tmp_path / "project", ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    project.mkdir()
    monkeypatch.chdir(project)
    (tmp_path / "rows.json").write_text("[]")
    Path("rows.json").symlink_to(tmp_path / "rows.json")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    sent = small_plan()._replace(data={"data": Mount("rows.json", "rows.json", "uri_file")})
    assert service.tags(params.load(ROOT / "params.yaml"), sent)["git_commit"].endswith("-changed")
