"""The project's programs as children of one process that has imported the heavy libraries.

Torch, Transformers and PEFT take seconds to import, and one build starts nine processes that do. So a test run has one
server, which imports them once. `python`, `snakemake` and `dvc` in the folder that `start` makes are small clients:
they hand the server their arguments, folder, environment and streams, and end as the child ends that it forks for them.
The server imports nothing of the project: a child imports what lies in its folder, as a new process does.

Forks share hash seeds and imported modules, and a signal to a client is passed on: tests of those start new processes.
"""

import atexit
import contextlib
import gc
import importlib
import json
import logging
import multiprocessing.util
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

PROGRAMS = {"snakemake": "snakemake.cli", "dvc": "dvc.cli"}  # each with a `main`
LIBRARIES = (
    *("torch", "transformers", "transformers.models.llama.modeling_llama", "transformers.modeling_utils", "peft"),
    *("transformers.generation", "datasets", "pandas", "pyarrow.parquet", "safetensors.torch", "onnx", "onnxruntime"),
    *("onnxruntime_genai", "onnxruntime_genai.models.builder", "pydantic", "matplotlib.figure", "matplotlib.backends.backend_svg"),
    *("snakemake.cli", "snakemake.api", "snakemake.workflow", "dvc.cli", "dvc.repo", "adlfs", "gguf"),
    *("snakemake.report.html_reporter", "snakemake.profiles", "smart_open", "yte", "docutils.parsers.rst.directives.images"),
    *("dvc.cli.parser", "dvc.lock", "dvc.rwlock", "dvc.cachemgr", "dvc.data_cloud", "dvc.repo.plots", "dvc.repo.stage"),
    *("scmrepo.git.backend.dulwich", "scmrepo.git.backend.gitpython", "scmrepo.git.backend.pygit2", "dulwich.repo"),
    *("cyclonedx.validation.json", "jsonschema", "rfc3987_syntax", "in_toto_attestation.v1.statement"),
    *("in_toto_attestation.predicates.provenance", "google.protobuf.json_format", "google.protobuf.struct_pb2", "ijson"),
    *("transformers.optimization", "transformers.trainer_pt_utils", "peft.tuners.lora", "torch.profiler._cupti_monitor"),
    *("peft.utils.transformers_weight_conversion", "matplotlib.pyplot", "multiprocessing.forkserver"),
    *("azure.storage.blob.aio", "azure.ai.ml", "azure.identity"),
)  # fmt: skip
CLIENT = """#!{python} -IS
import sys
sys.path.insert(0, {tests!r})
from preloaded import client
client({python!r})
"""


NAME = "pre-"  # how the names of the server's processes begin in /proc


FOLDER: Path | None = None  # of this test run's clients (tests/conftest.py); None: every program is a new process


def program(name: str, environment: dict[str, str]) -> str:
    """A program's client, put first in the PATH, or the program itself. The first call of a test run starts the server."""
    if FOLDER is None or name not in ("python", *PROGRAMS):
        return sys.executable if name == "python" else name
    from filelock import FileLock

    with FileLock(f"{FOLDER}.lock"):
        if not (FOLDER / "socket").exists():
            start(FOLDER, os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid())
    environment["PATH"] = f"{FOLDER}{os.pathsep}{environment['PATH']}"
    return str(FOLDER / name)


def link_environment(target: Path) -> None:
    """Make `target` this Python's virtual environment, for commands that name it: its programs are the server's clients."""
    server = Path(program("python", dict(os.environ))).parent
    (target / "bin").mkdir(parents=True)
    for folder in (Path(sys.prefix), Path(sys.prefix) / "bin"):
        for path in folder.iterdir():
            if path.name != "bin":
                (target / path.relative_to(sys.prefix)).symlink_to(path)
    for name in ("python", *PROGRAMS, "socket") if FOLDER else ():
        (target / "bin" / name).unlink(missing_ok=True)
        (target / "bin" / name).symlink_to(server / name)


def start(folder: Path, owner: int) -> None:
    """Start the server, which ends when the process `owner` does; returns when it accepts clients, which lie in `folder`."""
    folder.mkdir(exist_ok=True)
    for name in ("python", *PROGRAMS):
        file = folder / name
        file.write_text(CLIENT.format(python=sys.executable, tests=str(Path(__file__).parent)), encoding="utf-8")
        file.chmod(0o755)
    with open(folder / "log", "wb") as log:  # not a pipe: it may outlive this process
        server = subprocess.Popen(
            [sys.executable, __file__, folder / "socket", str(owner)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    while not (folder / "socket").exists():
        assert server.poll() is None, (folder / "log").read_text(encoding="utf-8")
        time.sleep(0.05)


def client(python: str) -> None:
    """Have the server run this program; what it does not know runs as a new process."""
    path = Path(sys.argv[0]).absolute()
    sys.argv[0] = str(path)
    if path.name == "python" and sys.argv[1:2] != ["-m"]:
        os.execv(python, [python, *sys.argv[1:]])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(str(path.with_name("socket")))
        message = json.dumps({"command": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()  # noqa: PTH109
        socket.send_fds(server, [len(message).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(message)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
        code = os.waitstatus_to_exitcode(int.from_bytes(server.recv(4), "big"))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(address: Path, owner: int) -> None:
    """Import the libraries, then fork a child for each client until `owner` ends. Returns in a child, with its work to do."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):  # azure.ai.ml is installed by `make azureml` only
            importlib.import_module(name)
    logging.getLogger().handlers.clear()  # some library sets it up when it is imported
    logging.getLogger().setLevel(logging.WARNING)
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address.with_suffix(".new")))
        listening.listen(64)
        os.rename(address.with_suffix(".new"), address)  # noqa: PTH104
        listening.settimeout(1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while Path(f"/proc/{owner}").exists():
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                listening.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _attend(connection)
                return
            connection.close()
    os._exit(0)


def _attend(connection: socket.socket) -> None:
    """Fork the client's process, pass signals on to it and its status back. Returns in that process, with its work to do."""
    connection.setblocking(True)
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as reader:
        request = json.loads(reader.read(int.from_bytes(size, "big")))
    child = os.fork()
    os.setpgid(child, child)
    if child == 0:
        connection.close()
        _become(streams, **request)
        return
    for stream in streams:
        os.close(stream)
    handle = os.pidfd_open(child)
    while handle not in select.select([handle, connection], [], [])[0]:
        if number := connection.recv(1):
            os.kill(child, number[0])
        else:  # a client that was killed cannot say so; with the child end the clients that it has started
            os.killpg(child, signal.SIGKILL)
            break
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(OSError):
        connection.sendall(status.to_bytes(4, "big"))
    os._exit(0)


def _become(streams: list[int], command: list[str], folder: str, environment: dict[str, str]) -> None:
    """Take over a client's streams, folder, environment and arguments."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # Libraries read it when they are loaded; Snakemake sets it to a rule's threads, and sums depend on it.
    threads = environment.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))
    importlib.import_module("torch").set_num_threads(int(threads))
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        errors, lines = ("backslashreplace", 1) if name == "stderr" else ("strict", -1)
        stream = open(number, mode, lines, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    multiprocessing.util.spawnv_passfds = _fork
    Path("/proc/self/comm").write_text(f"{NAME}{Path(command[0]).name}")
    sys.executable = str(Path(command[0]).with_name("python"))
    sys.argv = command
    outside = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:1] = [folder, *outside] if Path(command[0]).name == "python" else outside


def _fork(path: bytes, args: list[str], passed: list[int], spawn=multiprocessing.util.spawnv_passfds) -> int:
    """Replaces `spawnv_passfds`: fork multiprocessing's fork server and processes, which would import the libraries again."""
    option = args.index("-c")
    code = args[option + 1]
    if not re.search(r"multiprocessing\.(forkserver|spawn) import", code):
        return spawn(path, args, passed)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if child := os.fork():
        return child
    try:
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
            if int(name) > 2 and int(name) not in passed:
                with contextlib.suppress(OSError):  # the listing's own
                    os.close(int(name))
        torch = importlib.import_module("torch")
        threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(threads))  # its pool of threads is not copied
        torch.set_num_threads(threads)
        atexit._clear()  # what the parent does at its end
        sys.argv = ["-c", *args[option + 2 :]]
        exec(code, {})
    except BaseException as error:
        _finish(error)
    finally:
        os._exit(1)


def _work() -> None:
    """The work of a child: a module by its name, or a program."""
    name = Path(sys.argv[0]).name
    if name == "python":
        module, sys.argv = sys.argv[2], sys.argv[2:]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.exit(importlib.import_module(PROGRAMS[name]).main())


def _finish(error: BaseException | None) -> None:
    """End as the interpreter does, except for libraries' C++ destructors: some wait for threads that a fork does not copy."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    elif error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code & 255)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
    try:
        _work()
    except BaseException as error:
        _finish(error)
    _finish(None)
