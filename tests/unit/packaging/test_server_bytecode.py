"""A package's server runs the files that SHA256SUMS lists, and leaves the package as it is."""

import os
import py_compile
import shutil
import subprocess
import sys
from importlib.util import cache_from_source
from pathlib import Path

from slmake import serve
from slmake.packaging import checksums
from tools import verify


def ask_for_help(folder: Path) -> subprocess.CompletedProcess:
    """`python serve.py --help` as a user runs it: Python may write bytecode."""
    unset = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    variables = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, str(folder / "serve.py"), "--help"]
    return subprocess.run(command, capture_output=True, text=True, env=variables)


def test_serve_py_writes_no_bytecode_and_runs_none(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "package"))
    before = checksums.files_of(folder)
    clean = ask_for_help(folder)
    assert clean.returncode == 0, clean.stderr
    assert checksums.files_of(folder) == before
    verify.main([str(folder), "--package-only"])
    planted = tmp_path / "planted.py"
    planted.write_text("raise SystemExit('planted bytecode was run')\n")
    for file in serve.FILES.values():
        py_compile.compile(
            str(planted),
            cfile=cache_from_source(str(folder / file)),
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
    again = ask_for_help(folder)
    assert (again.returncode, again.stdout) == (0, clean.stdout)
