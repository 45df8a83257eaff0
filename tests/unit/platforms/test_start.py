"""`make` starts Snakemake without libraries that a build on this disk does not need."""

import subprocess
import sys

from tiny import ROOT

CODE = """
import sys
from slmake.platforms.screen import Screen, run
built = run(Screen(sys.stderr), [])
print(built, "snakemake.workflow" in sys.modules, "azure.storage.blob" in sys.modules)
"""


def test_a_start_imports_no_azure(tmp_path):
    (tmp_path / "Snakefile").write_text("rule all:\n    input:\n        [],\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "True True False", done.stdout + done.stderr
