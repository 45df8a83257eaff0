"""Azure Blob as the DVC remote, on a real blob server: push, fresh clone, pull, nothing to do."""

import hashlib
import os
import subprocess

import pytest
import yaml
from project import change, planned, run
from sharing import contents, git, remote
from tiny import ROOT

pytestmark = pytest.mark.real
TONES = "data/dataset.json"


def test_after_a_build_there_is_no_second_copy_and_nothing_to_do(pushed):
    """Files in build/ and in DVC's cache share their bytes (hard links here, where the file system has no reflinks)."""
    project, _ = pushed
    weights = project / "build" / "base" / "model.safetensors"
    assert weights.stat().st_nlink >= 2
    assert not weights.stat().st_mode & 0o222
    assert planned(project) == set()
    assert "up to date" in run(project, "dvc", "repro").stdout


def test_the_remote_holds_no_credential_and_nothing_phones_home(pushed, blob_server):
    project, container = pushed
    text = (project / ".dvc" / "config").read_text()
    assert f"azure://{container}/tones" in text
    assert blob_server.key not in text
    assert "analytics = false" in text
    assert "verify = true" in text


def test_fresh_clone_pull_and_both_engines_have_nothing_to_do(pushed, clone):
    done = remote(clone, "pull")
    assert done.returncode == 0, done.stdout
    assert "everything matches its receipt" in done.stdout
    assert contents(clone) == contents(pushed[0])
    assert planned(clone) == set()
    repro = run(clone, "dvc", "repro")
    assert "up to date" in repro.stdout, repro.stdout
    # … and after that, changes are noticed by both, exactly.
    change(clone, "quantize", accuracy_level=0)
    assert planned(clone) == {"quantize", "evaluate", "gates"}
    assert set(yaml.safe_load(run(clone, "dvc", "status", "--json").stdout)) == {"quantize"}
    git(clone, "checkout", "-q", "params.yaml")
    data = clone / TONES
    data.write_text(data.read_text().replace("number 5 of", "number five of"), encoding="utf-8")
    assert planned(clone) == {"prepare", "finetune", "merge", "quantize", "evaluate", "gates"}
    assert set(yaml.safe_load(run(clone, "dvc", "status", "--json").stdout)) == {"prepare"}


def test_dvc_fetch_and_pull_alone_work_too(pushed, clone):
    assert run(clone, "dvc", "fetch").returncode == 0
    assert not (clone / "build").exists()
    assert run(clone, "dvc", "pull").returncode == 0
    assert contents(clone) == contents(pushed[0])


def test_pull_into_changed_parameters_marks_nothing_as_built(clone):
    change(clone, "gates", min_accuracy=0.5)
    done = remote(clone, "pull")
    assert done.returncode == 1
    assert "what was pulled is here, but gates would be built again" in done.stdout
    assert "gates" in planned(clone)


def test_read_only_links_do_not_stop_a_rebuild(clone):
    """As an ordinary user, whom (unlike root) read-only files do stop."""
    assert remote(clone, "pull").returncode == 0
    change(clone, "gates", min_accuracy=0.01)
    results = clone / "results" / "gates.json"
    assert run(clone, "dvc", "checkout", "--relink").returncode == 0
    assert not results.stat().st_mode & 0o200
    before = results.stat().st_ino
    user = {}
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", "65534:65534", clone], check=True)
        for folder in [clone, *clone.parents][:4]:
            folder.chmod(folder.stat().st_mode | 0o055)
        user = {"user": 65534, "group": 65534}
    done = run(
        clone,
        "env",
        "HOME=/tmp",
        "XDG_CACHE_HOME=/tmp/.cache-nobody",
        "snakemake",
        "--cores",
        "all",
        "--nocolor",
        **user,
    )
    assert done.returncode == 0, done.stdout
    assert results.stat().st_ino != before
    assert results.stat().st_mode & 0o200


def test_second_push_after_a_changed_file_moves_only_that_file(pushed, clone, blob_server):
    _, container = pushed

    def there():
        return {blob.name for blob in blob_server.client().get_container_client(container).list_blobs()}

    assert remote(clone, "pull").returncode == 0
    before = there()
    change(clone, "gates", min_accuracy=0.02)
    assert run(clone, "dvc", "repro").returncode == 0
    done = remote(clone, "push")
    assert done.returncode == 0, done.stdout
    new = there() - before
    assert len(new) == 1
    assert new == {
        f"tones/files/md5/{(digest := hashlib.md5((clone / 'results/gates.json').read_bytes()).hexdigest())[:2]}/{digest[2:]}"
    }


@pytest.mark.parametrize("url", ["az://data/x", "azure://UPPER/x", "azure://data/x?sig=abc", "https://host/x", ""])
def test_remote_of_another_form_is_refused(tmp_path, url):
    done = run(ROOT, "python", "scripts/remote.py", "add", url)
    assert done.returncode == 1
    assert "not of the form azure://container/path" in done.stdout
    assert "abc" not in done.stdout
