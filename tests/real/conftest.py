"""The real components: a blob server, an Apptainer image, a one-node Slurm. Absent ones are skipped in one line that says what to do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from azurite import Azurite, program
from project import change, new_project, run, snakemake
from proxy import Faulty
from sharing import git, initialise, remote
from tiny import ROOT

IMAGE = ROOT / "containers" / "slmake-cpu.sif"
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def image() -> str:
    """`all.container` for the image that tests/real/image.sh builds."""
    if not shutil.which("apptainer"):
        pytest.skip("no apptainer: tests/real/install.sh installs it (Debian, Ubuntu)")
    if not IMAGE.is_file():
        pytest.skip("no image: tests/real/image.sh builds containers/slmake-cpu.sif (or `make image sif`)")
    digest = subprocess.run(["sha256sum", IMAGE], capture_output=True, text=True, check=True).stdout.split()[0]
    return f"{IMAGE}@sha256:{digest}"


@pytest.fixture(scope="session")
def contained(tmp_path_factory, base, image) -> Path:
    """A tiny project after `snakemake --profile profiles/container`, what it printed in `printed.txt`. Copy it to change it."""
    project = new_project(tmp_path_factory.mktemp("contained") / "project", base)
    change(project, "all", container=image)
    done = snakemake(project, "--profile", "profiles/container")
    assert done.returncode == 0, done.stdout
    (project / "printed.txt").write_text(done.stdout, encoding="utf-8")
    return project


@pytest.fixture
def copy_of_contained(contained, tmp_path) -> Path:
    """A private copy, file times and Snakemake's records included."""
    target = tmp_path / "project"
    subprocess.run(["cp", "-a", contained, target], check=True)
    return target


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A one-node Slurm on the loopback interface while the tests run."""
    if not shutil.which("sbatch") or not shutil.which("munged", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("no Slurm: tests/real/install.sh installs slurm-wlm and munge (Debian, Ubuntu)")
    if os.getuid():
        pytest.skip("the one-node Slurm needs root")
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run(
        [HERE / "slurm.sh", "start", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert started.returncode == 0, started.stdout
    yield folder
    subprocess.run([HERE / "slurm.sh", "stop", folder], check=True)


@pytest.fixture(scope="session")
def blob_server(tmp_path_factory):
    """A running Azurite; each test takes a container of its own."""
    if program() is None:
        pytest.skip("Azurite is not installed: `make azurite` (needs npm)")
    server = Azurite(tmp_path_factory.mktemp("azurite")).start()
    yield server
    server.kill()


@pytest.fixture
def container(blob_server, monkeypatch) -> str:
    """A new container; the environment leads to its account."""
    for name in [name for name in os.environ if name.startswith(("AZURE_", "AZUREML_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", blob_server.connection())
    return blob_server.container()


@pytest.fixture
def proxy(blob_server, container, monkeypatch):
    """A proxy before the blob server, without faults yet; the environment leads through it."""
    with Faulty(blob_server.port) as between:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", blob_server.connection(between.port))
        yield between


@pytest.fixture(scope="session")
def pushed(built, blob_server, tmp_path_factory):
    """A built project, committed and pushed to a remote of its own, and that container's name. Do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", blob_server.connection())
        project = tmp_path_factory.mktemp("pushed") / "project"
        subprocess.run(["cp", "-a", built, project], check=True)
        assert run(project, "python", "-m", "slmake.platforms.dvc_yaml").returncode == 0  # it follows params.yaml
        initialise(project)
        container = blob_server.container()
        done = remote(project, "add", f"azure://{container}/tones")
        assert done.returncode == 0, done.stdout
        assert run(project, "python", "-m", "slmake.platforms.dvc_yaml", "--digests").returncode == 0
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
