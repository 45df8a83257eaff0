"""Running what is measured: child processes with their time and memory, one after the other in turn, and the machine's description."""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
SCRATCH = ROOT / "build" / "bench"
PROJECT_FILES = (  # what Snakemake needs to plan a build, besides params.yaml
    *("Snakefile", "rules", "scripts", "slmake", "tools", "envs", "profiles"),
    *("report", "data", "containers", "LICENSE"),
)
PEERS = ROOT / ".venv-bench" / "bin" / "python"
QUIET = {  # nothing is fetched and nothing phones home, peers included
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OLIVE_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "PYTHONUNBUFFERED": "1",
}


class BenchError(Exception):
    """A benchmark cannot be run here, or what it ran failed: what, where, and what to do next."""


class ProcessUsage(NamedTuple):
    """What one child process took."""

    wall: float  # seconds
    cpu: float  # seconds, user and system, of it and its children
    peak: int  # bytes of resident memory, of the largest of it and its children
    output: str  # both streams


def run(command: list, cwd: Path = ROOT, env: dict[str, str] | None = None) -> ProcessUsage:
    """Run a command to its end.

    Args:
        env: variables besides the caller's own.

    Raises:
        BenchError: it failed; the end of its output is in the message.
    """
    words = [str(word) for word in command]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    handle, name = tempfile.mkstemp(prefix="slmake-bench-")
    os.close(handle)
    report = Path(name)
    launcher = subprocess.Popen(
        [sys.executable, "-I", "-S", ROOT / "bench" / "launch.py", report, *words],
        cwd=cwd,
        env=os.environ | QUIET | {"PATH": path} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = launcher.communicate()
        took = json.loads(report.read_text(encoding="utf-8") or "{}") or {"code": launcher.returncode or 1}
    except BaseException:
        os.killpg(launcher.pid, signal.SIGTERM)
        raise
    finally:
        report.unlink()
    if took["code"]:
        raise BenchError(f"`{' '.join(words)}` ended with code {took['code']}:\n{output[-3000:]}")
    return ProcessUsage(took["wall"], took["cpu"], took["peak"], output)


def last_json(output: str) -> dict:
    """The JSON object on the last line that is one: how the runners report."""
    for line in reversed(output.splitlines()):
        if line.startswith("{") and line.endswith("}"):
            return json.loads(line)
    raise BenchError(f"the runner reported nothing:\n{output[-2000:]}")


def script(name: str, *arguments: object, cwd: Path = ROOT) -> ProcessUsage:
    """Run one of the pipeline's scripts in this environment."""
    return run([sys.executable, "-m", f"scripts.{name}", *arguments], cwd)


def runner(name: str, *arguments: object) -> tuple[dict, ProcessUsage]:
    """Run a module of bench/ in this environment; what it reported, and what it took."""
    took = run([sys.executable, "-m", f"bench.{name}", *arguments])
    return last_json(took.output), took


def peer(name: str, *arguments: object) -> tuple[dict, ProcessUsage]:
    """Run a module of bench/peers/ in the peers' environment; what it reported, and what it took."""
    if not PEERS.exists():
        raise BenchError("the peers are not installed. Run `make peers`.")
    took = run([PEERS, ROOT / "bench" / "peers" / f"{name}.py", *arguments])
    return last_json(took.output), took


def interleaved(rounds: int, **contenders: Callable[[int], dict]) -> dict[str, list[dict]]:
    """Every contender once a round, the order reversed every other round, so that no one always runs on a warmer machine.

    Returns:
        For each contender, what it returned in each round.
    """
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders) if number % 2 == 0 else list(reversed(contenders))
        for name in names:
            say(f"round {number + 1} of {rounds}: {name}")
            runs[name].append(contenders[name](number))
    return runs


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} bench: {message}", file=sys.stderr, flush=True)


def fresh(path: Path) -> Path:
    """An empty folder at `path`."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def params(path: Path, source: Path = ROOT / "params.yaml", **changes: dict) -> Path:
    """A copy of params.yaml with `section={field: value}` replaced."""
    content = yaml.safe_load(source.read_text(encoding="utf-8"))
    for section, fields in changes.items():
        content[section].update(fields)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def need(path: Path) -> Path:
    """`path`, which the pipeline builds.

    Raises:
        BenchError: it is not there.
    """
    if not path.exists():
        raise BenchError(f"{path}: not there. Run `snakemake --cores all {path.relative_to(ROOT)}` first.")
    return path


def drop_cache(*folders: Path) -> None:
    """Write back and forget the cached pages of the files in some folders (Linux), so that they are read from the disk again."""
    for path in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush(folder: Path) -> float:
    """Seconds until the files of a folder are on the disk."""
    began = time.monotonic()
    for path in (file for file in folder.rglob("*") if file.is_file()):
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    return time.monotonic() - began


# What decides how fast products are, widest first: flags of /proc/cpuinfo, and how they are called.
VECTORS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 with bfloat16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "asimd": "NEON",
}


def machine() -> dict:
    """Processor and its widest vector instructions, cores, memory, GPU, kernel, load and date."""
    name = platform.processor() or platform.machine()
    memory, flags = 0, set()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
        flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = None
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or None
    return {
        "processor": name,
        "vectors": next((name for flag, name in VECTORS.items() if flag in flags), None),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
        "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


PACKAGES = ("torch", "transformers", "peft", "onnxruntime", "onnxruntime-genai", "trl", "olive-ai", "llama-cpp-python")


def versions() -> dict[str, dict[str, str]]:
    """Versions of the packages that matter, in the pipeline's environment (`ours`) and the peers' (`peers`)."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: have[n] for n in sys.argv[1:] if n in have}))"
    )
    ours = {package.metadata["Name"].lower(): package.version for package in importlib.metadata.distributions()}
    versions = {"ours": {name: ours[name] for name in PACKAGES if name in ours}}
    if PEERS.exists():
        asked = subprocess.run([PEERS, "-c", code, *PACKAGES], capture_output=True, text=True, check=True)
        versions["peers"] = json.loads(asked.stdout)
    return versions


def matmul_rate(dtype, size: int = 2048, repeats: int = 12) -> float:
    """The best rate of a large square matrix product of a torch dtype, FLOP/s, on the GPU if there is one."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        size *= 4
    a = torch.randn(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
