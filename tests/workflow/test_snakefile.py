"""The Snakefile's form: lint, format, and the names that must be one everywhere."""

import re

from project import run
from tiny import ROOT


def test_lint_finds_nothing():
    """`snakemake --lint`, no finding."""
    done = run(ROOT, "snakemake", "--lint")
    assert done.returncode == 0, done.stdout
    assert "Congratulations, your workflow is in a good condition!" in done.stdout


def test_format():
    for command in (["snakefmt", "--check", "Snakefile"], ["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        done = run(ROOT, *command)
        assert done.returncode == 0, done.stdout


def test_one_name_everywhere():
    """rule = script = params section = log file = benchmark file, and every rule uses `shell:`."""
    text = (ROOT / "Snakefile").read_text(encoding="utf-8")
    rules = [name for name in re.findall(r"^rule (\w+):", text, re.M) if name != "all"]
    assert rules == [
        *("fetch_model", "prepare", "rehearse", "finetune", "adapter", "merge", "candidate", "search", "quantize"),
        *("evaluate", "gates", "package", "report", "publish"),
    ]
    for name in rules:
        body = text.split(f"rule {name}:")[1].split("\nrule ")[0]
        assert f'code=code_of("{name}"),' in body
        assert f'**built_from("{name}"),' in body
        assert f'"python -m scripts.{name}"' in body
        file = "candidate-{candidate}" if name == "candidate" else name
        assert f'"logs/{file}.log"' in body
        assert f'"benchmarks/{file}.tsv"' in body
        assert (ROOT / "scripts" / f"{name}.py").exists()
    assert not re.search(r"^\s+(script|run|notebook):\s*$", text, re.M)


def test_help_loads_no_heavy_library():
    """`--help` of every rule's script is quick and never imports torch."""
    for name in (
        "fetch_model",
        "prepare",
        "rehearse",
        "finetune",
        "adapter",
        "merge",
        "quantize",
        "evaluate",
        "gates",
        "candidate",
        "search",
        "package",
        "verify",
        "report",
        "ask",
    ):
        module = f"{'tools' if name in ('ask', 'verify') else 'scripts'}.{name}"
        code = f"import sys, runpy; sys.argv = ['{name}', '--help']\ntry: runpy.run_module('{module}', run_name='__main__')\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        done = run(ROOT, "python", "-c", code)
        assert done.returncode == 0, f"{name}: {done.stdout}"
        assert "--params" in done.stdout
