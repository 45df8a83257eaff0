"""What every script's command line shares: arguments, the log, the terminal, and the way errors are reported."""

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tiny import ROOT

from slmake import cli
from slmake.errors import UserError

SCRIPT = """
    import errno, os, subprocess, sys, time, warnings
    from pathlib import Path
    from slmake import cli, outputs
    from slmake.errors import UserError

    with cli.job("merge", Path("logs/merge.log") if "--log" in sys.argv else None) as job:
"""


@pytest.fixture
def script(tmp_path):
    """Run a body inside job("merge"), in a process of its own, and `after` behind it; `log=False`: without a log file."""

    def command(body: str, after: str, log: bool) -> list[str]:
        file = tmp_path / "merge.py"
        inside = textwrap.indent(textwrap.dedent(body), "    ")
        file.write_text(f"{textwrap.dedent(SCRIPT)}{inside}\n{after}\n", encoding="utf-8")
        return [sys.executable, str(file), *(["--log"] if log else [])]

    def run(body: str, after: str = "", log: bool = True, start: bool = False):
        options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
        if start:
            pipe = subprocess.PIPE
            return subprocess.Popen(command(body, after, log), stdout=pipe, stderr=pipe, **options)
        return subprocess.run(command(body, after, log), capture_output=True, timeout=60, **options)

    return run


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "logs" / "merge.log"


# The terminal and the log


def test_library_output_goes_to_the_log(script, log):
    """Python's, the C library's and a child's, on stdout and stderr; the terminal gets what is said to a person."""
    done = script("""
        print("print")
        print("stderr", file=sys.stderr)
        os.write(1, b"C stdout\\n")
        os.write(2, b"C stderr\\n")
        subprocess.run(["sh", "-c", "echo child; echo child error >&2"])
        warnings.warn("a warning")
        import logging
        logging.getLogger("library").warning("a logged warning")
        job.log("a detail")
        job.say("halfway")
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "merge: halfway\n")
    lines = log.read_text(encoding="utf-8")
    wanted = ["print", "stderr", "C stdout", "C stderr", "child", "child error", "merge: a detail", "merge: halfway"]
    for text in wanted:
        assert re.search(rf"{text}$", lines, re.MULTILINE), text
    assert "UserWarning: a warning" in lines
    assert "library: a logged warning" in lines


def test_output_after_the_job_is_the_terminals_again(script, log):
    done = script('print("inside")', after='print("after"); print("after too", file=sys.stderr)')
    assert (done.stdout, done.stderr) == ("after\n", "after too\n")
    assert log.read_text() == "inside\n"


def test_a_new_run_starts_a_new_log(script, log):
    script('print("first, and longer")')
    script('print("second")')
    assert log.read_text() == "second\n"


def test_without_a_log_everything_is_on_the_terminal(script):
    done = script('print("library"); job.say("done"); job.log("detail")', log=False)
    assert (done.returncode, done.stdout) == (0, "library\n")
    assert done.stderr.splitlines()[0] == "merge: done"
    assert done.stderr.endswith("merge: detail\n")


def test_text_that_the_terminal_cannot_show(script, log):
    """Any text can be said, in any locale: it does not fail the job."""
    done = script('job.say("caf\\u00e9 \\U0001f642")')
    assert done.returncode == 0
    assert "café 🙂" in log.read_text(encoding="utf-8")


def test_progress_on_a_terminal_that_is_a_file(script, log):
    """No bar: a line at the end, with the figures, on the terminal and in the log."""
    done = script("""
        with job.progress(3, "steps") as bar:
            for i in range(3):
                bar.update(loss=f"{3 - i}.5")
    """)
    assert done.stderr == "merge: 3/3 steps, loss 1.5\n"
    assert log.read_text().endswith("merge: 3/3 steps, loss 1.5\n")


# Failures


def test_user_error_is_one_message(script, log):
    """Exit code 1; the message on stderr and in the log; no traceback anywhere."""
    done = script('raise UserError("build/base: no such folder. Build it.\\n  second line")')
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "merge: error: build/base: no such folder. Build it.\n  second line\n"
    assert log.read_text() == "error: build/base: no such folder. Build it.\n  second line\n"


def test_user_error_without_a_log(script):
    done = script('raise UserError("mend it")', log=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "merge: error: mend it\n")


def test_unexpected_exception(script, log):
    """One line on the terminal with the log's path; the traceback in the log only."""
    done = script('raise RuntimeError("shapes differ\\nlong explanation")')
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "merge: error: RuntimeError: shapes differ. Details: logs/merge.log\n"
    lines = log.read_text()
    assert lines.startswith("Traceback (most recent call last):\n")
    assert "RuntimeError: shapes differ\nlong explanation\n" in lines
    assert "merge.py" in lines


def test_exception_without_a_message(script):
    assert script("assert False").stderr == "merge: error: AssertionError: no message. Details: logs/merge.log\n"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            'OSError(errno.ENOSPC, "No space left on device", "build/x")',
            "the disk is full (build/x). Free some space and run the same command again; what was built before is untouched.",
        ),
        (
            'OSError("[Errno 28] No space left on device")',
            "the disk is full. Free some space and run the same command again; what was built before is untouched.",
        ),
        (
            '__import__("sqlite3").OperationalError("database or disk is full")',
            "the disk is full. Free some space and run the same command again; what was built before is untouched.",
        ),
        (
            'OSError(errno.EDQUOT, "Disk quota exceeded", "build/x")',
            "your disk quota is used up (build/x). Free some space and run the same command again.",
        ),
        (
            'PermissionError(errno.EACCES, "Permission denied", "build/x")',
            "cannot write here (build/x): Permission denied. Check the folder's owner and permissions.",
        ),
        (
            'OSError(errno.EROFS, "Read-only file system", "build/x")',
            "cannot write here (build/x): Read-only file system. Check the folder's owner and permissions.",
        ),
        ("MemoryError()", "out of memory. Use smaller batches or a machine with more memory."),
        (
            'OSError(errno.ENOMEM, "Cannot allocate memory")',
            "out of memory. Use smaller batches or a machine with more memory.",
        ),
        (
            'FileNotFoundError(errno.ENOENT, "No such file or directory", "x.json")',
            "FileNotFoundError: [Errno 2] No such file or directory: 'x.json'",
        ),
    ],
    ids=["full", "full-by-text", "full-sqlite", "quota", "permission", "read-only", "memory", "no-memory", "other"],
)
def test_troubles_of_the_machine(script, log, error, reason):
    """One line that says what to do; the traceback is in the log."""
    done = script(f"raise {error}")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"merge: error: {reason}\n")
    assert log.read_text().startswith("Traceback (most recent call last):\n")


def test_full_disk_without_a_log_shows_no_traceback(script):
    for error in (
        'OSError(errno.ENOSPC, "No space left on device")',
        '__import__("sqlite3").OperationalError("database or disk is full")',
    ):
        done = script(f"raise {error}", log=False)
        assert done.stderr == (
            "merge: error: the disk is full. Free some space and run the same command again; what was built before is untouched.\n"
        )


def test_disk_that_is_really_full(script, tmp_path):
    """Writing to a full device inside written() leaves no output."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    done = script("""
        with outputs.written(Path("model")) as (folder,):
            (folder / "weights").symlink_to("/dev/full")
            (folder / "weights").write_bytes(b"x" * 100)
    """)
    assert done.returncode == 1
    assert done.stderr.startswith("merge: error: the disk is full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "merge.py"]


def test_folder_without_write_permission(script, tmp_path):
    """The real thing; root, who may write everywhere, becomes nobody first."""
    (tmp_path / "build").mkdir(mode=0o555)
    done = script("""
        if os.geteuid() == 0:
            os.seteuid(65534)
        with outputs.written(Path("build/model")):
            pass
    """)
    assert done.returncode == 1
    assert done.stderr.startswith("merge: error: cannot write here (")
    assert done.stderr.endswith("): Permission denied. Check the folder's owner and permissions.\n")


def test_log_that_cannot_be_written(script, tmp_path):
    """A bad --log is reported as any other error: one line, exit code 1, no traceback."""
    (tmp_path / "logs").write_text("a file, not a folder")
    done = script('job.say("not reached")')
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("merge: error: ")
    assert "logs" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_sys_exit_passes_through(script):
    done = script("sys.exit(3)")
    assert (done.returncode, done.stderr) == (3, "")


# Interruptions


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_removes_outputs(script, log, tmp_path, number):
    """The scheduler's or the user's signal: exit code 130, one line, no output and no leftovers."""
    process = script(
        """
        with outputs.written(Path("build/model"), [Path("results/model.json")]) as (folder, report):
            (folder / "weights").write_bytes(b"half")
            report.write_text("{}")
            Path("started").touch()
            time.sleep(60)
        """,
        start=True,
    )
    limit = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(number)
    output, message = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "")
    assert message == "merge: error: interrupted. Run the same command again to resume.\n"
    assert list((tmp_path / "build").iterdir()) == []
    assert list((tmp_path / "results").iterdir()) == []
    assert "Traceback" not in log.read_text()


def test_sigterm_is_handled_inside_the_job_only():
    before = signal.getsignal(signal.SIGTERM)
    with cli.job("merge"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


# In this process


def test_what_logs_are_shown_is_as_before_afterwards():
    """Snakemake, in the same process, has handlers of its own."""
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    with cli.job("build"):
        assert root.handlers != before[0]
    assert (list(root.handlers), root.level) == before
    with pytest.raises(SystemExit), cli.job("build"):
        raise UserError("no")
    assert (list(root.handlers), root.level) == before


def test_exit_code_and_message(capsys):
    with pytest.raises(SystemExit) as stopped, cli.job("merge"):
        raise UserError("mend it")
    assert stopped.value.code == 1
    assert stopped.value.__suppress_context__
    assert capsys.readouterr().err == "merge: error: mend it\n"


def test_seconds_count_from_the_start():
    with cli.job("merge") as job:
        first = job.seconds()
        time.sleep(0.05)
        assert 0.05 <= job.seconds() - first < 5


def test_disk_full_is_known_by_its_number():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "build/base/model.safetensors")
    assert cli.explain_os_error(error).startswith("the disk is full (build/base/model.safetensors).")


def test_parser_has_the_manual_and_the_common_arguments(capsys):
    parser = cli.parser("Merge it.\n\n    python -m scripts.merge --base build/base\n")
    given = parser.parse_args([])
    assert (given.params, given.log) == ("params.yaml", None)
    given = parser.parse_args(["--params", "other.yaml", "--log", "logs/x.log"])
    assert (given.params, given.log) == ("other.yaml", Path("logs/x.log"))
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--help"])
    assert stopped.value.code == 0
    assert "\n    python -m scripts.merge --base build/base\n" in capsys.readouterr().out


def test_wrong_arguments_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parser("Merge it.").parse_args(["--oops"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --oops" in capsys.readouterr().err


def test_nothing_phones_home():
    """Set before any library is imported, unless the user decided otherwise."""
    code = "import os, slmake.cli; print(os.environ['HF_HUB_DISABLE_TELEMETRY'], os.environ['DO_NOT_TRACK'])"
    plain = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")}
    plain["PYTHONPATH"] = str(ROOT)
    for given, printed in (({}, "1 1\n"), ({"DO_NOT_TRACK": "0"}, "1 0\n")):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**plain, **given})
        assert done.stdout == printed


@pytest.mark.parametrize(
    ("given", "printed"),
    [({}, "30000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_soon_sleep_where_they_wait(given, printed):
    """A waiting thread that spins slows down the one that it waits for. The user's own setting stays."""
    code = "import os, slmake.cli; print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    plain["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**plain, **given})
    assert done.stdout.strip() == printed
