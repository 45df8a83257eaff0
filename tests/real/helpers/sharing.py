"""A project shared through Azure Blob: its repository, its remote, and what is in it."""

import hashlib
import shutil
from pathlib import Path

from project import run
from tiny import ROOT


def git(project: Path, *command: str) -> None:
    """A Git command that must not fail."""
    done = run(project, "git", *command)
    assert done.returncode == 0, done.stdout


def remote(project: Path, *command: str):
    """tools/remote.py in a project."""
    return run(project, "python", "-m", "tools.remote", *command)


def contents(project: Path) -> dict[str, str]:
    """SHA-256 of everything that stages made, by path (`make` itself joins the report to one page)."""
    paths = [path for name in ("build", "results") for path in (project / name).rglob("*")]
    return {
        path.relative_to(project).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
        if path.is_file() and not path.name.startswith(".snakemake") and path.name != "report.html"
    }


def initialise(project: Path) -> None:
    """A Git and DVC repository with the project's own DVC settings."""
    git(project, "init", "-q", "-b", "main")
    git(project, "config", "user.email", "test@example.org")
    git(project, "config", "user.name", "test")
    shutil.copytree(ROOT / ".dvc", project / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
