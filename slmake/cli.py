"""What every script's command line shares: arguments, the log, the terminal and the way errors are reported.

A script's `main` runs inside `job(...)`: library chatter on stdout and stderr (C++ libraries' too) goes to the log
file, the terminal gets the few lines meant for a person, and any failure ends in one clear message and exit code 1.
"""

import argparse
import atexit
import contextlib
import errno
import gc
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from slmake.errors import UserError, is_failure
from slmake.machine_errors import is_out_of_memory
from slmake.text import printable

PLANNED = "SLMAKE_PARAMS"  # environment variable: the sections of params.yaml that the running build was planned with
SOURCES = "SLMAKE_SOURCES"  # environment variable: a file with the code and files that it was planned with
ENGINE = "SLMAKE_ENGINE"  # environment variable: the process that started this one, as `engine` writes it
IMAGE = "SLMAKE_IMAGE"  # environment variable: the image that a rule runs in, as params.yaml names it
OUT_OF_MEMORY = "out of memory. Use smaller batches or a machine with more memory."
STARTED = time.time_ns()  # every script imports this module first
# Nothing phones home. Set before any library is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# bitsandbytes and Transformers let the package `kernels` download code from a hub and run it: here it is never there, nor asked for.
sys.modules["kernels"] = None
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# OpenMP's threads wait for each other in a loop of this many turns before they sleep (GNU's default: 300,000). With other work on
# the processor, the one that waits takes the time of the one that works: training was three times as fast with this. Alone, it is as fast.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
# A process that has loaded PyTorch and Transformers spends a second or two at its end looking for garbage among their objects.
atexit.register(gc.freeze)


def parser(module_doc: str) -> argparse.ArgumentParser:
    """An argument parser whose help is the module's docstring, with the two arguments that every rule's script has."""
    made = argparse.ArgumentParser(description=module_doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--params", default="params.yaml", help="parameter file (default: params.yaml)")
    made.add_argument("--log", type=Path, help="write library output and details here (default: the terminal)")
    return made


class Job:
    """A running script: `say` prints to the terminal and the log, `log` to the log only."""

    def __init__(self, name: str, terminal, log_path: Path | None):
        self.name, self.terminal, self.log_path = name, terminal, log_path
        self.started = time.monotonic()
        self.logger = logging.getLogger(name)

    def say(self, message: str) -> None:
        """One line on the terminal and in the log."""
        print(f"{self.name}: {printable(message)}", file=self.terminal, flush=True)
        if self.log_path:
            self.log(message)

    def log(self, message: str) -> None:
        """One line in the log only."""
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.name}: {printable(message)}", file=sys.stderr, flush=True)

    def seconds(self) -> float:
        """Wall time since the script's job began, in seconds."""
        return time.monotonic() - self.started

    @contextlib.contextmanager
    def progress(self, total: int | None, unit: str, initial: int = 0) -> Iterator["Progress"]:
        """A tqdm bar on a terminal; plain lines in the log (and on a terminal that is a file) otherwise.

        `total` is None where it is not known; the unit "B" counts bytes and shows megabytes.
        """
        bar = Progress(self, total, unit, initial)
        try:
            yield bar
        finally:
            bar.close()


class Progress:
    """Progress of long work, with optional figures such as the loss beside it."""

    def __init__(self, job: Job, total: int | None, unit: str, initial: int):
        from tqdm import tqdm

        self.job, self.total, self.unit, self.done = job, total, unit, initial
        self.live = job.terminal.isatty()
        self.last_line = time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=initial,
            unit=unit,
            unit_scale=unit == "B",
            desc=job.name,
            file=job.terminal,
            disable=not self.live,
            dynamic_ncols=True,
            leave=False,
        )

    def update(self, count: int = 1, **figures: str) -> None:
        """Advance by `count`; `figures` are shown beside the bar and in the log's lines."""
        self.done += count
        if figures:
            self.bar.set_postfix(figures, refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if now - self.last_line >= 10 or self.done == self.total:
            self.last_line = now
            rate = self.bar.format_dict["elapsed"] / max(1, self.done - self.bar.initial) if self.live else None
            left = f", {rate * (self.total - self.done):.0f} s left" if rate and self.total else ""
            text = ", ".join(f"{key} {value}" for key, value in figures.items())
            line = f"{self._counted()}{', ' + text if text else ''}{left}"
            (self.job.log if self.live or self.job.log_path is None else self.job.say)(line)

    def _counted(self) -> str:
        scale, digits, unit = (1e6, 1, "MB") if self.unit == "B" else (1, 0, self.unit)
        total = "" if self.total is None else f"/{self.total / scale:.{digits}f}"
        return f"{self.done / scale:.{digits}f}{total} {unit}"

    def close(self) -> None:
        self.bar.close()


FULL = "No space left on device"


class Interrupted(BaseException):
    """SIGTERM: the scheduler or the user asked the job to end."""


def _on_sigterm(signum, frame):
    raise Interrupted


def engine(pid: int | None = None) -> str:
    """A process, by default this one, as a value of ENGINE: this boot of the machine, the process namespace, and its id there."""
    if sys.platform != "linux":
        return ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')} {pid or os.getpid()}"  # noqa: PTH115 (Path.readlink takes it for a path)


def end_with(starter: str) -> None:
    """End this process as soon as another one has ended: a rule does not outlive a killed Snakemake and write beside the next.

    The kernel's signal to the children of a process (PR_SET_PDEATHSIG) is not enough: between Snakemake and a rule in a container
    there are shells and the container's runtime. Does nothing where the other process cannot be seen: outside of Linux, on another
    node, and in a container with processes of its own.

    Args:
        starter: the other process, as `engine` writes it.
    """
    namespace, _, pid = starter.rpartition(" ")
    if not pid or engine().rpartition(" ")[0] != namespace:
        return

    def wait() -> None:
        try:
            select.select([os.pidfd_open(int(pid))], [], [])
        except (OSError, AttributeError):  # it has ended, or the kernel (before 5.3) or Python lacks the call
            while _running(pid):
                time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _running(pid: str) -> bool:
    """Whether a process has not ended. One that has stays in state Z until its parent takes its exit code."""
    try:
        return Path("/proc", pid, "stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Interrupted in the block."""
    previous = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def job(name: str, log_path: Path | None = None, interactive: bool = False) -> Iterator[Job]:
    """Run a script's body: redirect chatter to the log, and turn every failure into one message and exit code 1.

    Args:
        name: the rule's name, shown before every line.
        log_path: where file descriptors 1 and 2 go meanwhile; None leaves them alone.
        interactive: a person answers on standard input.
    """
    end_with(os.environ.get(ENGINE, ""))
    with _redirected(name, log_path) as terminal:
        if not interactive:
            _close_stdin()
        current = Job(name, terminal, log_path)
        try:
            with terminable(), _warnings_shown(), _as_planned(name):
                yield current
        except UserError as error:
            _fail(current, str(error))
        except (KeyboardInterrupt, Interrupted):
            _fail(current, "interrupted. Run the same command again to resume.", code=130)
        except BaseException as error:
            if not is_failure(error):
                raise
            if log_path or not (_is_full(error) or _is_refused(error) or _is_path(error)):
                traceback.print_exc()
            if is_out_of_memory(error):
                _fail(current, OUT_OF_MEMORY)
            if _is_full(error) or isinstance(error, OSError):
                _fail(current, explain_os_error(error))
            text = str(error).strip().splitlines()
            where = f" Details: {log_path}" if log_path else ""
            _fail(current, f"{type(error).__name__}: {text[0] if text else 'no message'}.{where}")


def _as_planned(rule: str) -> contextlib.AbstractContextManager:
    """Where Snakemake runs a rule: let it load and read only what the build was planned with."""
    if SOURCES not in os.environ:
        return contextlib.nullcontext()
    from slmake.planned import watched

    return watched(rule, STARTED)


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """Show libraries' warnings on standard error until the block ends, and then what was shown before: Snakemake, say, has handlers of its own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, [handler]
    level = root.level
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


@contextlib.contextmanager
def _redirected(name: str, log_path: Path | None) -> Iterator[TextIO]:
    """Send file descriptors 1 and 2 to the log, if there is one; yields the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    if log_path is None:
        yield sys.stderr
        return
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        _fail(Job(name, sys.stderr, None), f"--log {log_path}: {explain_os_error(error)}")
    saved = (os.dup(1), os.dup(2))
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    try:
        with os.fdopen(os.dup(saved[1]), "w", encoding="utf-8", errors="replace") as terminal:
            yield terminal
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a full disk takes no log
                stream.flush()
        for number, original in enumerate(saved, 1):
            os.dup2(original, number)
            os.close(original)


def _close_stdin() -> None:
    """Make every read from standard input end at once: nobody sees, or may answer, the question of a library."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if null:
        os.close(null)


def _is_full(error: Exception) -> bool:
    """Whether a full disk is the reason, by the words of the system, of SQLite or of PyArrow."""
    return getattr(error, "errno", None) == errno.ENOSPC or FULL in str(error) or "disk is full" in str(error)


def _is_refused(error: Exception) -> bool:
    """Whether the system lets nobody, or not this user, write there."""
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT)


def _is_path(error: Exception) -> bool:
    """Whether a path that the user named cannot be what it is to be, such as a folder in the place of a file."""
    numbers = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
    return isinstance(error, OSError) and error.errno in numbers and error.filename is not None


def explain_os_error(error: Exception) -> str:
    """What the system refused, where, and what to do next, as a sentence or two."""
    where = f" ({error.filename})" if getattr(error, "filename", None) else ""
    if _is_full(error):
        return f"the disk is full{where}. Free some space and run the same command again; what was built before is untouched."
    if error.errno == errno.EDQUOT:
        return f"your disk quota is used up{where}. Free some space and run the same command again."
    if _is_refused(error):
        return f"cannot write here{where}: {error.strerror}. Check the folder's owner and permissions."
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if _is_path(error):
        return f"{error.filename}: {error.strerror}. Name another path."
    return f"{type(error).__name__}: {error}"


def _fail(current: Job, message: str, code: int = 1) -> None:
    message = printable(message)
    print(f"{current.name}: error: {message}", file=current.terminal, flush=True)
    if current.log_path:
        with contextlib.suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code) from None
