"""Azure Blob as the DVC remote, on a real blob server: push, fresh clone, pull, nothing to do; and what faults do to it."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from azurite import Azurite
from project import change, planned, run
from proxy import Faulty
from tiny import ROOT

pytestmark = pytest.mark.real
TONES = "data/dataset.json"


def git(project: Path, *command: str) -> None:
    done = run(project, "git", *command)
    assert done.returncode == 0, done.stdout


def remote(project: Path, *command: str):
    """scripts/remote.py in a project."""
    return run(project, "python", "scripts/remote.py", *command)


def contents(project: Path) -> dict[str, str]:
    """SHA-256 of everything built, by path."""
    paths = [path for name in ("build", "results") for path in (project / name).rglob("*")]
    return {
        path.relative_to(project).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
        if path.is_file() and not path.name.startswith(".snakemake")
    }


def initialise(project: Path) -> None:
    """A Git and DVC repository with the project's own DVC settings."""
    git(project, "init", "-q", "-b", "main")
    git(project, "config", "user.email", "test@example.org")
    git(project, "config", "user.name", "test")
    shutil.copytree(ROOT / ".dvc", project / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))


@pytest.fixture(scope="module")
def pushed(built, blob_server, tmp_path_factory):
    """A built project, committed and pushed to a remote of its own. Do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", blob_server.connection())
        project = tmp_path_factory.mktemp("pushed") / "project"
        subprocess.run(["cp", "-a", built, project], check=True)
        initialise(project)
        container = blob_server.container()
        done = remote(project, "add", f"azure://{container}/tones")
        assert done.returncode == 0, done.stdout
        assert run(project, "dvc", "commit", "--force", "--quiet").returncode == 0
        git(project, "add", "-A")
        git(project, "commit", "-q", "-m", "build")
        done = remote(project, "push")
        assert done.returncode == 0, done.stdout
        assert f"azure://{container}/tones holds" in done.stdout
    return project, container


@pytest.fixture
def clone(pushed, tmp_path, container) -> Path:
    """A colleague's fresh clone, with nothing built. (`container` sets the environment.)"""
    git(tmp_path, "clone", "-q", str(pushed[0]), "clone")
    return tmp_path / "clone"


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


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["push", "pull"])
@pytest.mark.parametrize("fault", ["cut", "500", "503", "slow"])
def test_transfer_through_a_faulty_line_ends_with_identical_bytes(
    pushed, clone, blob_server, container, monkeypatch, verb, fault
):
    if verb == "push":
        assert remote(clone, "pull").returncode == 0
        assert remote(clone, "add", f"azure://{container}/again").returncode == 0
    with Faulty(blob_server.port) as proxy:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", blob_server.connection(proxy.port))
        if fault == "slow":
            proxy.rate = 500_000
        else:
            proxy.times = 2
            if fault == "cut":
                setattr(proxy, "cut_up" if verb == "push" else "cut_down", 60_000)
            else:
                proxy.status = (int(fault), 1)
        done = remote(clone, verb)
        assert done.returncode == 0, done.stdout
        assert fault == "slow" or proxy.hits == 2
        assert blob_server.key not in done.stdout
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", blob_server.connection())
    if verb == "push":
        shutil.rmtree(clone / ".dvc" / "cache")
        shutil.rmtree(clone / "build")
        assert remote(clone, "pull").returncode == 0
    assert contents(clone) == contents(pushed[0])


def test_server_killed_in_the_middle_and_started_again(clone, tmp_path, pushed, container, monkeypatch):
    """Push to a server of its own, killed while the first bytes arrive: an error; started again, the same command finishes."""
    assert remote(clone, "pull").returncode == 0
    (tmp_path / "disk").mkdir()
    server = Azurite(tmp_path / "disk").start()
    try:
        name = server.container()
        with Faulty(server.port) as proxy:
            proxy.rate = 200_000
            monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", server.connection(proxy.port))
            assert remote(clone, "add", f"azure://{name}/tones").returncode == 0
            environment = os.environ | {"PYTHONPATH": ""}
            pushing = subprocess.Popen(
                [sys.executable, "scripts/remote.py", "push"],
                cwd=clone,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            while not any((tmp_path / "disk" / "__blobstorage__").glob("*")) and pushing.poll() is None:
                time.sleep(0.1)
            server.kill()
            text, _ = pushing.communicate(timeout=300)
            assert pushing.returncode == 1
            assert "the server cannot be reached or the connection broke" in text
            assert "run the same command again" in text
        server.start()
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", server.connection())
        done = remote(clone, "push")
        assert done.returncode == 0, done.stdout
        shutil.rmtree(clone / ".dvc" / "cache")
        shutil.rmtree(clone / "build")
        assert remote(clone, "pull").returncode == 0
        assert contents(clone) == contents(pushed[0])
    finally:
        server.kill()


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_blob_changed_behind_our_back_is_not_accepted(pushed, clone, blob_server, container, damage):
    """Pull refuses it; `push` from where the right bytes are brings a cut one back; a changed one is deleted first, as the error says."""
    project, place = pushed
    client = blob_server.client().get_container_client(place)
    name = max((blob for blob in client.list_blobs()), key=lambda blob: blob.size).name
    whole = client.download_blob(name).readall()
    wrong = whole[:-1] if damage == "cut" else whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:]
    client.upload_blob(name, wrong, overwrite=True)
    try:
        done = remote(clone, "pull")
        assert done.returncode == 1, done.stdout
        for path in (clone / "build").rglob("*"):
            assert not path.is_file() or path.read_bytes() != wrong
        if damage == "cut":
            assert remote(project, "push").returncode == 0
            assert client.download_blob(name).readall() == whole
    finally:
        client.upload_blob(name, whole, overwrite=True)
    assert remote(clone, "pull").returncode == 0
    assert contents(clone) == contents(project)


def test_disk_full_on_pull(pushed, clone, tmp_path):
    """The clone's cache is on a full 1 MB file system: an error that says so; with space, the same command finishes."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system: run as root")
    try:
        assert run(clone, "dvc", "cache", "dir", "--local", str(small)).returncode == 0
        done = remote(clone, "pull")
        assert done.returncode == 1
        assert "the disk is full. Free some space and run the same command again" in done.stdout
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        done = remote(clone, "pull")
        assert done.returncode == 0, done.stdout
        assert contents(clone) == contents(pushed[0])
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@pytest.mark.parametrize(
    ("connection", "url", "told"),
    [
        (lambda server: server.connection(key="d3Jvbmcga2V5" * 7 + "d3Jv"), None, "the credentials were refused"),
        (
            lambda server: server.connection(),
            "azure://nowhere-at-all/x",
            "there is no container `nowhere-at-all`. Create it",
        ),
        (lambda server: server.connection(port=9), None, "the server cannot be reached"),
    ],
    ids=["wrong key", "missing container", "no server"],
)
def test_pull_says_what_is_wrong_before_anything_moves(clone, blob_server, monkeypatch, connection, url, told):
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection(blob_server))
    if url:
        assert run(clone, "dvc", "remote", "modify", "storage", "url", url).returncode == 0
    done = remote(clone, "pull")
    assert done.returncode == 1
    assert told in done.stdout
    assert blob_server.key not in done.stdout
    assert "Traceback" not in done.stdout
    assert not (clone / "build").exists()


@pytest.mark.parametrize("url", ["az://data/x", "azure://UPPER/x", "azure://data/x?sig=abc", "https://host/x", ""])
def test_remote_of_another_form_is_refused(tmp_path, url):
    done = run(ROOT, "python", "scripts/remote.py", "add", url)
    assert done.returncode == 1
    assert "not of the form azure://container/path" in done.stdout
    assert "abc" not in done.stdout
