"""The Makefile: what its targets call exists, every target is listed by `make help`, and the list fits a terminal."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
from tiny import ROOT

TEXT = (ROOT / "Makefile").read_text(encoding="utf-8")
LISTED = re.findall(r"^([a-z-]+):.*## \S", TEXT, re.M)


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    # As from a terminal: `make test` would have it say which directory it enters.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS")}
    return subprocess.run(
        ["make", "-f", ROOT / "Makefile", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_modules_and_scripts_exist():
    modules = set(re.findall(r"python -m ([\w.]+)", TEXT))
    assert {"tools.build", "tools.ask", "tools.verify", "pytest", "pip"} <= modules
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    files = set(re.findall(r"\b(?:tools|tests)/[\w/]+\.\w+", TEXT))
    assert {"tools/image.sh", "tools/sif.sh", "tools/lock.sh"} <= files
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert [name for name in files if name.endswith(".sh") and not os.access(ROOT / name, os.X_OK)] == []


def test_every_target_is_listed_and_can_be_planned():
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", TEXT, re.M).group(1).replace("\\\n", " ").split()
    assert sorted(phony) == sorted(LISTED)
    done = make("--dry-run", "TEXT=Hello", "URL=azure://container/path", *LISTED)
    assert done.returncode == 0, done.stderr
    for module in re.findall(r"python -m (tools\.\w+|bench)", TEXT):
        assert f"python -m {module}" in done.stdout
    assert "--verbose" not in done.stdout
    assert "python -m tools.build --verbose" in make("--dry-run", "VERBOSE=1").stdout


def test_help_lists_every_target_in_groups_on_100_columns():
    done = make("help")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("  make ")] == LISTED
    assert lines[1] == "Build"
    assert lines[2].startswith("  make build ")
    assert len([line for line in lines if line and not line.startswith(" ")]) == 5
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    "text", ["It cost $500 & $x and 100$", "$(shell echo run)", "${HOME} $$ `id`", "a \"b\" 'c' #d", ""]
)
@pytest.mark.parametrize("given", ["argument", "environment"])
def test_a_text_is_asked_as_it_was_typed(tmp_path, monkeypatch, text, given):
    """A dollar is make's own sign, and what a user classifies may come from anyone."""
    shown = tmp_path / ".venv" / "bin" / "python"
    shown.parent.mkdir(parents=True)
    shown.write_text('#!/bin/sh\nshift 3\nprintf "%s" "$1" > shown\n')
    shown.chmod(0o755)
    for mark in (".ready-cpu", ".ready-cuda"):
        (tmp_path / ".venv" / mark).touch()
    if given == "environment":
        monkeypatch.setenv("TEXT", text)
    arguments = [f"TEXT={text}"] if given == "argument" else []
    done = make("--old-file=.venv/.ready-cpu", "--old-file=.venv/.ready-cuda", "ask", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shown").read_text() == text


def test_an_old_python_is_refused_before_anything_is_installed():
    """By the Python that would make the environment; the sentence in the README is this check's."""
    check = re.search(r"-c '(import sys; .*3, 11.*)'$", TEXT, re.M).group(1)
    for version, code in (((3, 10, 14), 1), ((3, 11, 0), 0), ((3, 13, 5), 0)):
        done = subprocess.run(
            ["python3", "-c", f"import sys; sys.version_info = {version}; {check}"], capture_output=True, text=True
        )
        assert done.returncode == code
        assert ("name one: make PYTHON=python3.12" in done.stderr) == bool(code)


def test_clean_leaves_what_no_rule_builds_again(tmp_path):
    """And Git keeps it, so that a clone has it."""
    for name in ("build/base/x", "results/seeds.json", "results/seeds.svg", "results/metrics.json", "results/more/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for _ in range(2):
        done = make("clean", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        assert left == {"results/seeds.json", "results/seeds.svg"}
    assert make("clean", folder=tmp_path / "results").returncode == 0  # without results/
    assert (tmp_path / "results" / "seeds.json").exists()


@pytest.mark.parametrize(("name", "ignored"), [("seeds.json", False), ("metrics.json", False), ("gates.json", True)])
def test_git_keeps_what_no_rule_builds_again(name, ignored):
    done = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", f"results/{name}"], cwd=ROOT)
    assert (done.returncode == 0) == ignored


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("https://me:p@SECRETword@host/x.git", "https://host/x.git"),
        ("https://token@host/x@1.git", "https://host/x@1.git"),
        ("git@host:org/x.git", "git@host:org/x.git"),
        ("https://host/x.git", "https://host/x.git"),
    ],
)
def test_an_image_s_label_has_no_password(address, named):
    """Git and curl take the last `@` for the end of a password."""
    command = re.search(r"sed -E '[^']+'", (ROOT / "tools" / "image.sh").read_text(encoding="utf-8"))[0]
    done = subprocess.run(["bash", "-c", command], input=address, capture_output=True, text=True)
    assert done.stdout.strip() == named
