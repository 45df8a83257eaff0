"""Azure Blob as the DVC remote, on a real blob server: push, fresh clone, pull, nothing to do."""

import hashlib
import os
import re
import shutil

import pytest
import yaml
from project import change, planned, run
from sharing import contents, git, remote
from tiny import ROOT

pytestmark = pytest.mark.real
TONES = "data/dataset.json"


def test_after_a_build_there_is_no_second_copy_and_nothing_to_do(pushed):
    """Files in build/ and in DVC's cache share their bytes, by hard links."""
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
    after = {"rehearse", "quantize", "evaluate", "gates", "package", "report"}
    assert planned(clone) == after
    assert set(yaml.safe_load(run(clone, "dvc", "status", "--json").stdout)) == {
        "code",
        "rehearse",
        "quantize",
        "package",
        "report",
    }
    git(clone, "checkout", "-q", "params.yaml")
    data = clone / TONES
    data.write_text(data.read_text().replace("number 5 of", "number five of"), encoding="utf-8")
    assert planned(clone) == {"prepare", "finetune", "merge", *after}
    assert set(yaml.safe_load(run(clone, "dvc", "status", "--json").stdout)) == {"prepare", "package"}


def test_dvc_fetch_and_pull_alone_work_too(pushed, clone):
    assert run(clone, "dvc", "fetch").returncode == 0
    assert not (clone / "build").exists()
    assert run(clone, "dvc", "pull").returncode == 0
    assert contents(clone) == contents(pushed[0])


def test_pull_into_changed_parameters_marks_nothing_as_built(clone):
    change(clone, "gates", max_accuracy_drop=0.97)
    done = remote(clone, "pull")
    assert done.returncode == 1
    named = re.search(r"what was recorded is here, but (.+) would be built again", done.stdout)
    assert sorted(named[1].split(", ")) == ["gates", "package", "rehearse", "report"]
    assert "gates" in planned(clone)


def test_read_only_links_do_not_stop_a_rebuild(clone):
    """Without root's power to write what is read-only."""
    assert remote(clone, "pull").returncode == 0
    change(clone, "gates", max_accuracy_drop=0.98)
    results = clone / "results" / "gates.json"
    assert run(clone, "dvc", "checkout", "--relink").returncode == 0
    assert not results.stat().st_mode & 0o200
    before = results.stat().st_ino
    ordinary = ["setpriv", "--bounding-set=-dac_override", "--"] if os.geteuid() == 0 else []
    done = run(clone, *ordinary, "snakemake", "--cores", "all", "--nocolor")
    assert done.returncode == 0, done.stdout
    assert results.stat().st_ino != before
    assert results.stat().st_mode & 0o200


def test_second_push_after_a_changed_file_moves_only_that_file(pushed, clone, blob_server):
    _, container = pushed

    def there():
        return {blob.name for blob in blob_server.client().get_container_client(container).list_blobs()}

    assert remote(clone, "pull").returncode == 0
    before, files = there(), contents(clone)
    change(clone, "gates", max_accuracy_drop=0.99)
    assert run(clone, "dvc", "repro").returncode == 0
    changed = [path for path, digest in contents(clone).items() if files.get(path) != digest]
    assert "results/gates.json" in changed
    assert not [path for path in changed if path.startswith(("build/base", "build/merged", "build/onnx"))]
    done = remote(clone, "push")
    assert done.returncode == 0, done.stdout
    new = {name for name in there() - before if not name.endswith(".dir")}
    digests = [hashlib.md5((clone / path).read_bytes()).hexdigest() for path in changed]
    assert new == {f"tones/files/md5/{digest[:2]}/{digest[2:]}" for digest in digests}


def test_push_brings_back_what_is_gone_though_dvc_remembers_it(pushed, clone, blob_server):
    """A blob was deleted in the remote; the object of its folder, which DVC takes for a proof, is there."""
    _, container = pushed
    blobs = blob_server.client().get_container_client(container)
    assert remote(clone, "pull").returncode == 0
    model = hashlib.md5((clone / "build" / "onnx-int4" / "model.onnx.data").read_bytes()).hexdigest()
    gone = f"tones/files/md5/{model[:2]}/{model[2:]}"
    before = {blob.name: blob.size for blob in blobs.list_blobs()}
    blobs.delete_blob(gone)
    assert "Everything is up to date" in run(clone, "dvc", "push").stdout
    done = remote(clone, "push")
    assert done.returncode == 0, done.stdout
    assert "of what DVC did not check, 1 blobs were missing or cut" in done.stdout
    assert {blob.name: blob.size for blob in blobs.list_blobs()} == before
    # What is whole there need not be here; what is in neither place is no success.
    shutil.rmtree(clone / ".dvc" / "cache")
    done = remote(clone, "push")
    assert done.returncode == 0, done.stdout
    content = blobs.download_blob(gone).readall()
    blobs.delete_blob(gone)
    done = remote(clone, "push")
    assert done.returncode == 1
    assert "build/onnx-int4 is whole neither in DVC's cache here nor in the remote" in done.stdout
    blobs.upload_blob(gone, content)


@pytest.mark.parametrize(
    "url",
    [
        "az://data/x",
        "azure://UPPER/x",
        "azure://data/x?sig=abc",
        "azure://data/x&sig=abc",
        "azure://data/x;AccountKey=abc",
        "azure://data/sig=abc",
        "https://host/x",
        "",
    ],
)
def test_remote_of_another_form_is_refused(tmp_path, url):
    done = run(ROOT, "python", "-m", "tools.remote", "add", url)
    assert done.returncode == 1
    assert "not of the form azure://container/path" in done.stdout
    assert "abc" not in done.stdout
