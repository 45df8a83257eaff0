"""What a package is made from under a condition only is a dependency of its stage, too: the signing key, a fetched adapter's report."""

import shutil
import subprocess

import pytest
import yaml
from merge_script import make_adapter
from project import change, new_project, run


@pytest.fixture
def project(base, tmp_path):
    """A tiny project with a key and an adapter in data/adapter, and nothing built."""
    folder = new_project(tmp_path / "project", base)
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", folder / "key.pem"], check=True
    )
    make_adapter(base, folder / "data" / "adapter")
    return folder


def inputs(project) -> set[str]:
    """The dependencies of the stage `package` in dvc.yaml, written anew."""
    done = run(project, "python", "-m", "slmake.platforms.dvc_yaml")
    assert done.returncode == 0, done.stdout
    return set(yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["package"]["deps"])


def test_the_signing_key_and_the_adapter_are_dependencies(project):
    before = inputs(project)
    assert not {"key.pem", "results/adapter.json"} & before
    change(project, "package", signing_key="key.pem")
    assert inputs(project) == before | {"key.pem"}
    change(project, "package", signing_key=None)
    change(project, "all", stages=["merge", "quantize", "evaluate", "gates", "package"])
    change(project, "adapter", source="data/adapter")
    assert "results/adapter.json" in inputs(project)
    done = run(project, "snakemake", "--dry-run", "--printshellcmds", "build/package")
    assert " --gates results/gates.json --adapter results/adapter.json --locks " in " ".join(done.stdout.split())


def test_an_input_that_came_or_went_is_named(repository):
    """A file in a folder of data; the rows that are there are the same."""
    (repository / "data" / "rows").mkdir()
    (repository / "data" / "dataset.json").rename(repository / "data" / "rows" / "a.json")
    change(repository, "prepare", source="data/rows")
    done = run(repository, "python", "-m", "tools.build")
    assert done.returncode == 0, done.stdout

    def verified() -> str:
        return run(repository, "python", "-m", "tools.verify").stdout

    assert "loads and generates" in verified()
    shutil.copy2(repository / "data" / "rows" / "a.json", repository / "data" / "rows" / "b.json")
    assert "data/rows/b.json: an input since the package was made; build again" in verified()
    (repository / "data" / "rows" / "a.json").unlink()
    assert "data/rows/a.json: no input any more; build again" in verified()
