"""What a person sees of `make`: the build's own lines, on a terminal and elsewhere, and how it ends."""

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from project import change, environment, new_project, run

BUILD = ("python", "-m", "tools.build")
SCORES = "accuracy on 24 test rows: base 0.0%, adapter 0.0%, merged 0.0%, int4 0.0%; 3 gates passed"
NEXT = """
Next:
  make ask TEXT="your text"    ask the exported model
  make verify                  check the package: checksums, provenance, and that it generates
  edit params.yaml, then make  build what depends on the change, and nothing else
  make help                    list all commands
"""


def under_dvc(project: Path) -> Path:
    """The project as a Git and DVC repository, as a clone is."""
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "config", "core.analytics", "false"]):
        done = run(project, *command)
        assert done.returncode == 0, done.stdout
    return project


@pytest.fixture(scope="module")
def project(built, tmp_path_factory) -> Path:
    """The built project under DVC, its report on one page; the tests of this file change it in turn."""
    project = tmp_path_factory.mktemp("build") / "project"
    subprocess.run(["cp", "-a", built, project], check=True)
    done = run(under_dvc(project), *BUILD)
    assert done.returncode == 0, done.stdout
    return project


def plain(text: str) -> str:
    """Without what differs between runs: durations, sizes."""
    return re.sub(r"\d+ s\b", "N s", text)


def test_nothing_to_do_is_two_lines(project):
    page = (project / "build" / "report.html").stat().st_mtime_ns
    done = run(project, *BUILD)
    assert done.returncode == 0
    assert done.stdout == f"build: nothing to do: build/report.html and build/package are up to date\n{SCORES}\n"
    assert (project / "build" / "report.html").stat().st_mtime_ns == page
    done = run(project, *BUILD, "build/adapter")
    assert (done.returncode, done.stdout) == (0, "build: build/adapter: nothing to do\n")


def test_a_page_that_was_changed_is_written_again(project):
    page = project / "build" / "report.html"
    page.write_text("edited", encoding="utf-8")
    assert run(project, *BUILD).returncode == 0
    assert "edited" not in page.read_text(encoding="utf-8")[:100]
    assert page.stat().st_size > 10000


def test_a_build_shows_each_rule_its_result_and_what_comes_next(project):
    page = (project / "build" / "report.html").stat().st_mtime_ns
    change(project, "report", wrong_answers=3)
    done = run(project, *BUILD)
    assert done.returncode == 0, done.stdout
    assert plain(done.stdout) == (
        "[1/1] report → build/report (wrong_answers changed)\n"
        "report: 10 figures and tables in build/report (N s). One page of them: make report\n"
        f"\n{SCORES}\nreport:  build/report.html\npackage: build/package\n{NEXT}"
    )
    assert (project / "build" / "report.html").stat().st_mtime_ns > page
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "up to date" in run(project, "dvc", "status").stdout


def test_verbose_shows_what_snakemake_prints(project):
    change(project, "report", wrong_answers=4)
    done = run(project, *BUILD, "--verbose")
    assert done.returncode == 0, done.stdout
    assert "reason: Params have changed since last execution" in done.stdout
    assert "Shell command: python -m scripts.report --params params.yaml" in done.stdout
    assert "1 of 2 steps (50%) done" in done.stdout
    assert "[1/1]" not in done.stdout
    assert done.stdout.endswith(f"{SCORES}\nreport:  build/report.html\npackage: build/package\n{NEXT}")


def test_a_failure_ends_with_its_message_and_its_log(project):
    receipts, parameters = (project / "dvc.lock").read_bytes(), (project / "params.yaml").read_bytes()
    change(project, "gates", min_accuracy=1.0)
    done = run(project, *BUILD)
    assert done.returncode == 1
    stale = (
        "build/report.html was of another build and is removed: `make report` writes it of the figures that are here\n"
    )
    assert (stale in done.stdout) != (
        project / "build" / "report.html"
    ).exists()  # the report may have been written by then
    assert done.stdout.removesuffix(stale).endswith(
        "  min_accuracy is missed by 1.0000: train longer (finetune.num_train_epochs), raise finetune.lora_r, or add training rows.\n"
        "results/metrics.json stays as it is.\n"
        "build: gates failed; its log: logs/gates.log\n"
    )
    assert re.search(r"\[[23]/4\] gates → results/gates.json \(min_accuracy changed\)\n", done.stdout)
    assert "CalledProcessError" not in done.stdout
    assert (project / "dvc.lock").read_bytes() == receipts
    change(project, "gates", min_accurracy=0.0)
    done = run(project, *BUILD)
    assert done.returncode == 1
    assert done.stdout == (
        "build: error: params.yaml: 1 error; nothing was run. See docs/params.md.\n"
        "  gates.min_accurracy: unknown name. Did you mean `min_accuracy`?\n"
    )
    (project / "params.yaml").write_bytes(parameters)
    assert run(project, *BUILD).stdout.endswith(NEXT)


class Terminal:
    """A program on a terminal of 100 columns, and all that it wrote there."""

    def __init__(self, project: Path, *command: str):
        pid, self.file = pty.fork()
        if pid == 0:
            os.chdir(project)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            termios.tcsetwinsize(0, (40, 100))
            os.execvpe(command[0], command, environment())
        self.pid, self.text = pid, ""

    def wait_for(self, pattern: str, seconds: float = 300) -> None:
        """Read until the pattern was written; None: until the program ends."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, self.text
            assert self.read(), self.text

    def read(self) -> bool:
        """Read what was written; False at the end."""
        if select.select([self.file], [], [], 1)[0]:
            try:
                data = os.read(self.file, 65536)
            except OSError:  # the program ended
                return False
            self.text += data.decode(errors="replace")
        return True

    def exit_code(self) -> int:
        """Read to the end."""
        while self.read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_terminal_shows_progress_bars_and_control_c_ends_it(base, tmp_path):
    project = under_dvc(new_project(tmp_path / "project", base))
    change(project, "all", stages=["finetune"])
    terminal = Terminal(project, *BUILD)
    terminal.wait_for(r"\[3/3\] finetune → build/adapter \(first build\)")
    assert re.search(r"\[1/3\] fetch_model → build/base \(first build\)\r\nfetch_model: data/base is in", terminal.text)
    assert re.search(r"\rprepare: +0%\|", terminal.text)
    terminal.wait_for(r"\rfinetune: +\d+%\|")
    os.write(terminal.file, b"\x03")
    assert terminal.exit_code() == 130
    lines = terminal.text.splitlines()
    assert "finetune: error: interrupted." in terminal.text
    assert lines[-1] == "build: interrupted. Run the same command again: it resumes after the last finished rule."
    assert not (project / "build" / "adapter").exists()
    change(project, "all", stages=[])
    done = run(project, *BUILD)  # no lock is left
    assert (done.returncode, done.stdout) == (0, "build: nothing to do: everything is up to date\n")
