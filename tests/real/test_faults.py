"""Everything that moves data, under everything that goes wrong with networks, servers and disks (docs/reliability.md).

Each case runs one command while one thing is broken. Either it goes through, or it stops with a message, shows nothing half-done, and
the same command finishes once the fault is gone. In the end every byte is compared. `make faults` writes the figures.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import preloaded
import pytest
from azurite import Azurite
from project import environment
from proxy import Faulty
from sharing import contents, git, remote
from tiny import ROOT, write_params

from slmake.outputs import folder_digest

pytestmark = pytest.mark.real
AGAIN = "same command again"


class Case:
    """One command at one server: how it is run, and how many bytes are not what they should be."""

    def __init__(self, folder: Path, server: Azurite, pushed: tuple):
        self.folder, self.server, self.project = folder, server, pushed[0]
        self.client = server.client()
        self.container = server.container()

    @property
    def blobs(self):
        return self.client.get_container_client(self.container)

    def stored(self) -> dict[str, bytes]:
        return {blob.name: self.blobs.download_blob(blob.name).readall() for blob in self.blobs.list_blobs()}

    def environment(self) -> dict[str, str]:
        """Modules are looked for in the working folder first, and outside of a project in this one."""
        return environment() | {"PYTHONPATH": str(ROOT)}

    def run(self, command: list) -> None:
        """Run a command that must not fail."""
        variables = self.environment()
        program = [preloaded.program("python", variables), *map(str, command)]
        subprocess.run(program, cwd=self.cwd, env=variables, check=True, capture_output=True)

    def start(self, port: int, **options) -> subprocess.Popen:
        variables = self.environment() | {
            "AZURE_STORAGE_CONNECTION_STRING": self.server.connection(port, options.get("key"))
        }
        return subprocess.Popen(
            [preloaded.program("python", variables), *map(str, self.command)],
            cwd=self.cwd,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lost(self) -> int:
        """Bytes that are missing or wrong after the command has ended well."""
        wanted, found = self.wanted(), self.found()
        return sum(len(content) for name, content in wanted.items() if found.get(name) != content)

    def wrong(self) -> int:
        """Bytes that are there under a name that promises others."""
        wanted, found = self.wanted(), self.found()
        return sum(len(content) for name, content in found.items() if name in wanted and wanted[name] != content)


class Push(Case):
    """tools.remote push, to an empty remote."""

    def __init__(self, folder, server, pushed, full):
        super().__init__(folder, server, pushed)
        self.cwd = folder / "full"
        subprocess.run(["cp", "-a", full, self.cwd], check=True)
        self.aim(self.container)
        self.command = ["-m", "tools.remote", "push"]

    def aim(self, container: str) -> None:
        config = self.cwd / ".dvc" / "config"
        config.write_text(re.sub(r"azure://[^/\n]+", f"azure://{container}", config.read_text()))

    def wanted(self):
        cache = self.cwd / ".dvc" / "cache"
        return {
            f"tones/{path.relative_to(cache).as_posix()}": path.read_bytes()
            for path in cache.glob("files/md5/*/*")
            if path.is_file()
        }

    def found(self):
        return self.stored()

    def damage(self, change: Callable) -> None:
        self.run(self.command)
        name, content = max(self.stored().items(), key=lambda item: len(item[1]))
        self.blobs.upload_blob(name, change(content), overwrite=True)


class Pull(Push):
    """tools.remote pull, into a fresh clone."""

    def __init__(self, folder, server, pushed, full):
        Case.__init__(self, folder, server, pushed)
        git(folder, "clone", "-q", str(self.project), "clone")
        self.cwd = folder / "clone"
        self.aim(self.container)
        cache = full / ".dvc" / "cache"
        for path in cache.glob("files/md5/*/*"):
            self.blobs.upload_blob(f"tones/{path.relative_to(cache).as_posix()}", path.read_bytes())
        self.command = ["-m", "tools.remote", "pull"]

    def wanted(self):
        return {name: (self.project / name).read_bytes() for name in contents(self.project)}

    def found(self):
        return {name: (self.cwd / name).read_bytes() for name in contents(self.cwd)}

    def damage(self, change: Callable) -> None:
        name, content = max(self.stored().items(), key=lambda item: len(item[1]))
        self.heal = lambda: self.blobs.upload_blob(name, content, overwrite=True)
        self.blobs.upload_blob(name, change(content), overwrite=True)

    def fill(self, small: Path) -> None:
        (self.cwd / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {small}\n")


class Publish(Case):
    """scripts.publish, over a model that was published before."""

    def __init__(self, folder, server, pushed, full):
        super().__init__(folder, server, pushed)
        self.cwd, self.model = folder, self.project / "build" / "onnx-int4"
        old = folder / "old"
        old.mkdir()
        (old / "model.onnx").write_bytes(b"old" * 1000)
        self.publish(old, "before")
        self.before = self.stored()
        self.aim(self.container)
        self.command = self.arguments(self.model, "published")

    def aim(self, container: str) -> None:
        write_params(self.cwd / "params.yaml", publish={"url": f"az://{container}/models"})

    def arguments(self, model: Path, name: str) -> list:
        output = self.cwd / f"{name}.json"
        return [
            "-m",
            "scripts.publish",
            "--params",
            self.cwd / "params.yaml",
            "--model",
            model,
            "--output",
            output,
        ]

    def publish(self, model: Path, name: str) -> None:
        self.aim(self.container)
        self.run(self.arguments(model, name))

    def wanted(self):
        digest = folder_digest(self.model)
        files = {p.relative_to(self.model).as_posix(): p for p in self.model.rglob("*") if p.is_file()}
        return {
            f"models/{digest}/{name}": path.read_bytes() for name, path in files.items() if ".snakemake" not in name
        } | {name: content for name, content in self.before.items() if not name.endswith("latest.json")}

    def found(self):
        found = self.stored()
        latest = json.loads(found["models/latest.json"])
        published = (self.cwd / "published.json").exists()
        assert (latest["digest"] == folder_digest(self.model)) >= published  # a receipt only where the pointer moved
        if latest["digest"] == folder_digest(self.model):  # a pointer only to what is whole
            assert all(found[f"models/{latest['digest']}/{name}"] for name in latest["files"])
        return found

    def damage(self, change: Callable) -> None:
        self.publish(self.model, "first")
        name, content = max(self.stored().items(), key=lambda item: len(item[1]))
        self.blobs.upload_blob(name, change(content), overwrite=True)


class Fetch(Case):
    """scripts.fetch_model, from a folder in a container."""

    def __init__(self, folder, server, pushed, full):
        super().__init__(folder, server, pushed)
        self.cwd, self.base = folder, self.project / "data" / "base"
        for path in self.base.iterdir():
            self.blobs.upload_blob(f"base/{path.name}", path.read_bytes())
        self.aim(self.container)
        self.place = folder
        self.command = [
            *("-m", "scripts.fetch_model", "--params", "params.yaml", "--output", folder / "base"),
            *("--report", folder / "base.json", "--log", folder / "log", "--downloads", folder / "downloads"),
        ]

    def aim(self, container: str) -> None:
        source = f"az://{container}/base#sha256={folder_digest(self.base)}"
        write_params(self.cwd / "params.yaml", fetch_model={"source": source, "sha256": None, "dtype": "auto"})

    def wanted(self):
        return {path.name: path.read_bytes() for path in self.base.iterdir()}

    def found(self):
        assert (self.cwd / "base").exists() == (self.cwd / "base.json").exists()
        return {path.name: path.read_bytes() for path in (self.cwd / "base").glob("*")}

    def damage(self, change: Callable) -> None:
        name, content = "base/model.safetensors", self.stored()["base/model.safetensors"]
        self.heal = lambda: self.blobs.upload_blob(name, content, overwrite=True)
        self.blobs.upload_blob(name, change(content), overwrite=True)

    def fill(self, small: Path) -> None:
        self.command[-1] = small / "downloads"


OPERATIONS = {"push": Push, "pull": Pull, "publish": Publish, "fetch_model": Fetch}
EVERY = tuple(OPERATIONS)
DOWN = ("pull", "fetch_model")
# name: which operations it can strike, and what the command says when it stops (None: it goes through).
FAULTS = {
    "connection cut, twice": (EVERY, None),
    "connection cut again and again": (EVERY, AGAIN),
    "500, twice": (EVERY, None),
    "503 with Retry-After, twice": (EVERY, None),
    "503 again and again": (EVERY, AGAIN),
    "slow link": (EVERY, None),
    "server killed, started again": (EVERY, AGAIN),
    "disk full": (DOWN, "the disk is full"),
    "wrong key": (EVERY, "the credentials were refused"),
    "missing container": (EVERY, "there is no container `nowhere-at-all`. Create it"),
    "blob truncated": (EVERY, {"pull": "", "fetch_model": "expected"}),
    "blob changed": (("pull", "publish", "fetch_model"), {"pull": "", "fetch_model": "expected"}),
}


@pytest.fixture(scope="session")
def full(pushed, blob_server, tmp_path_factory) -> Path:
    """A clone after `pull`: everything is in its cache."""
    folder = tmp_path_factory.mktemp("full")
    git(folder, "clone", "-q", str(pushed[0]), "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", blob_server.connection())
        done = remote(folder / "project", "pull")
    assert done.returncode == 0, done.stdout
    return folder / "project"


@pytest.fixture(scope="session")
def ledger() -> Callable[[dict], None]:
    """Notes what happened in a case; SLMAKE_FAULTS names a file of JSON Lines for it, which several processes may write to."""

    def note(line: dict) -> None:
        if path := os.environ.get("SLMAKE_FAULTS"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")

    return note


@pytest.fixture
def small(tmp_path):
    """A file system of 200 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system: run as root")
    yield SimpleNamespace(
        path=folder, grow=lambda: subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    )
    subprocess.run(["umount", "-l", folder], check=True)


CUTS = {
    "push": ("cut_up", 136_000),
    "pull": ("cut_down", 200_000),
    "publish": ("cut_up", 60_000),
    "fetch_model": ("cut_down", 60_000),
}


def break_line(proxy: Faulty, operation: str, fault: str) -> None:
    """Tell the proxy what to do."""
    proxy.times = 2 if "twice" in fault else None
    if "cut" in fault:
        # DVC takes one folder after another, and waits a minute for each file that does not get through: only the largest do
        # not. On the way up the model is among them, which two folders share.
        setattr(proxy, *CUTS[operation])
    elif fault == "slow link":
        proxy.rate = 300_000
    elif fault[0] == "5":
        proxy.status = (int(fault[:3]), 1 if "Retry-After" in fault else None)


def pytest_generate_tests(metafunc):
    """Each operation's class meets the faults that can strike it."""
    if metafunc.cls:
        where = metafunc.cls.operation
        metafunc.parametrize("fault", [fault for fault, (operations, _) in FAULTS.items() if where in operations])


class Campaign:
    """One class for each operation, so that they can run side by side: most of their time is waiting."""

    def test_nothing_is_lost(self, fault, tmp_path, blob_server, container, pushed, full, request, ledger):
        told = FAULTS[fault][1]
        told = told.get(self.operation) if isinstance(told, dict) else told
        server, own = blob_server, None
        if "killed" in fault:
            (tmp_path / "disk").mkdir()
            server = own = Azurite(tmp_path / "disk").start()
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AZURE_STORAGE_CONNECTION_STRING", server.connection())
                case = OPERATIONS[self.operation](tmp_path, server, pushed, full)
                if "blob" in fault:
                    case.damage(
                        (lambda whole: whole[:-1])
                        if "truncated" in fault
                        else lambda whole: whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:]
                    )
                if fault == "missing container":
                    case.aim("nowhere-at-all")
                disk = request.getfixturevalue("small") if fault == "disk full" else None
                if disk:
                    case.fill(disk.path)
                if own:
                    own.restart()
                begun = time.monotonic()
                with Faulty(server.port) as proxy:
                    break_line(proxy, self.operation, fault)
                    if own:
                        proxy.rate = 100_000
                    process = case.start(proxy.port, key="d3Jvbmcga2V5" * 7 + "d3Jv" if fault == "wrong key" else None)
                    if own:
                        while proxy.passed < 150_000 and process.poll() is None:
                            time.sleep(0.02)
                        own.kill()
                    said, _ = process.communicate(timeout=1000)
                    hits = proxy.hits
                took = time.monotonic() - begun
                if own:
                    own.start()
                assert (process.returncode == 0) is (told is None), said
                assert told is None or told in said, said
                assert "Traceback" not in said
                assert server.key not in said
                assert hits >= 2 or not re.match("conn|50", fault), said
                assert hits <= 8 * len(case.wanted()) + 10  # bounded: a file is tried eight times at most
                wrong = case.wrong() if "blob" not in fault or self.operation in DOWN else 0
                if disk:
                    disk.grow()
                if fault == "missing container":
                    case.aim(case.container)
                getattr(case, "heal", lambda: None)()
                if process.returncode:
                    again = case.start(server.port)
                    finished, _ = again.communicate(timeout=600)
                    assert again.returncode == 0, finished
                lost = case.lost()
            ledger(
                {
                    "operation": self.operation,
                    "fault": fault,
                    "stopped": bool(process.returncode),
                    "hits": hits,
                    "seconds": round(took, 1),
                }
                | {"bytes_wrong": wrong, "bytes_lost": lost, "bytes": sum(map(len, case.wanted().values()))}
            )
            assert wrong == 0
            assert lost == 0
        finally:
            if own:
                own.kill()
            else:
                blob_server.client().delete_container(case.container)


class TestPush(Campaign):
    operation = "push"


class TestPull(Campaign):
    operation = "pull"


class TestPublish(Campaign):
    operation = "publish"


class TestFetchModel(Campaign):
    operation = "fetch_model"
