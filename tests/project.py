"""A tiny project, and ways to run Snakemake and DVC in it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import preloaded
from tiny import ROOT, make_rows, write_params

from bench.measure import PROJECT_FILES

TINY = {
    "prepare": {"source": "data/dataset.json", "eval_fraction": 0.1, "test_fraction": 0.25},
    "finetune": {"num_train_epochs": 1.0, "eval_steps": 4, "save_steps": 4, "logging_steps": 1, "learning_rate": 0.01},
    "quantize": {"int8_nodes": ["*/attn/*", "*/down_proj/*"]},  # it has two layers only
    "evaluate": {"bootstrap_samples": 200, "latency_rows": 2},
    "gates": {"min_accuracy": 0.0, "max_accuracy_drop": 1.0, "checks": []},
}


RULES = (
    "fetch_model",
    "prepare",
    "rehearse",
    "finetune",
    "merge",
    "quantize",
    "evaluate",
    "gates",
    "package",
    "report",
)


def environment() -> dict[str, str]:
    """The caller's environment with the tests' own programs first."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}


def run(project: Path, *command: str, fresh: bool = False, **options: object) -> subprocess.CompletedProcess:
    """Run a program in a project folder; output (both streams) as text in stdout.

    Args:
        fresh: as a new process, whose own processes are new, too; otherwise tests/preloaded.py spares it the imports.
    """
    variables = environment()
    program = command[0] if fresh or "--profile" in command else preloaded.program(command[0], variables)
    return subprocess.run(
        [program, *command[1:]], cwd=project, env=variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def type_block(project: Path, block: str, variables: dict[str, str] | None = None, options: str = "-euo") -> str:
    """Type a page's `sh` block in a terminal; returns what it shows.

    Args:
        variables: the terminal's environment; by default the tests' own.
        options: bash's; with `u` an unset variable is an error.
    """
    done = subprocess.run(
        ["bash", options, "pipefail", "-c", block],
        cwd=project,
        env=variables or environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}"
    return done.stdout


def build(project: Path) -> subprocess.CompletedProcess:
    """Run what `make` runs in a project folder."""
    return run(project, "python", "-m", "tools.build")


def record(project: Path) -> subprocess.CompletedProcess:
    """Record what was built with DVC."""
    return run(project, "python", "-m", "tools.record")


def edit(project: Path, name: str, old: str, new: str) -> None:
    """Replace a text that stands once in a file."""
    text = (project / name).read_text(encoding="utf-8")
    assert text.count(old) == 1
    (project / name).write_text(text.replace(old, new), encoding="utf-8")


def snakemake(project: Path, *arguments: str, **options: object) -> subprocess.CompletedProcess:
    """Run `snakemake --cores all` in a project folder."""
    return run(project, "snakemake", "--cores", "all", "--nocolor", *arguments, **options)


VARYING = {"benchmark.json", "cost.html", "estimate.json"}  # timings


def digests(project: Path) -> dict[str, str]:
    """SHA-256 of every built file whose bytes must not differ between builds."""
    found = {}
    for folder in ("build", "results"):
        for path in sorted((project / folder).rglob("*")):
            if path.is_file() and not path.name.startswith(".") and path.name not in VARYING:
                found[path.relative_to(project).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def elsewhere(found: dict[str, str]) -> dict[str, str]:
    """Of `digests`, what must be the same in a container too: all but the provenance, which names the container, and its sum."""
    named = ("build/package/provenance.intoto.json", "build/package/SHA256SUMS")
    return {name: digest for name, digest in found.items() if name not in named}


def planned(project: Path, *arguments: str) -> set[str]:
    """The rules that Snakemake would run now (without `all`)."""
    done = snakemake(project, "--dry-run", *arguments)
    assert done.returncode == 0, done.stdout
    if "Nothing to be done" in done.stdout:
        return set()
    lines = done.stdout.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("job "))
    names = set()
    for line in lines[start + 2 :]:
        if not line.strip() or line.startswith("total"):
            break
        names.add(line.split()[0])
    return names - {"all"}


def change(project: Path, section: str, **fields: object) -> None:
    """Change fields of one section of the project's params.yaml."""
    import yaml

    path = project / "params.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content[section].update(fields)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def new_project(folder: Path, base: Path) -> Path:
    """The pipeline's own files with tiny data and a tiny base model; nothing built."""
    folder.mkdir()
    for name in (
        *(name for name in PROJECT_FILES if name not in ("data", "containers")),
        *("dvc.yaml", ".dvcignore", ".gitignore", "pyproject.toml"),
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    for name in ("containers", "data"):
        (folder / name).mkdir()
    shutil.copy2(ROOT / "containers" / "Containerfile", folder / "containers")
    (folder / "data" / "dataset.json").write_text(json.dumps(make_rows(96), indent=0), encoding="utf-8")
    shutil.copytree(base, folder / "data" / "base")
    write_params(folder / "params.yaml", fetch_model={"source": "data/base", "sha256": None}, **TINY)
    return folder


def edit_in(project, rule: str, when: str, code: str) -> None:
    """Let a rule's script run Python code of the test before or after its own work."""
    script = project / "scripts" / f"{rule}.py"
    text = script.read_text(encoding="utf-8")
    before, after = (code, "pass") if when == "before" else ("pass", code)
    text = text.replace('if __name__ == "__main__":\n    main()', f'if __name__ == "__main__":\n    {before}\n    main()\n    {after}')  # fmt: skip
    script.write_text(text, encoding="utf-8")
