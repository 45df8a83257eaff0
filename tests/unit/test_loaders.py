"""No code of a model is run: every loader says so, and no question of a library can be answered with yes."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from slmake import cli

FILES = [path for folder in ("slmake", "scripts", "tools", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]


def loaders(text: str) -> list[tuple[int, bool]]:
    """Line of every call that loads by transformers' Auto classes or a pipeline, and whether it forbids remote code."""
    calls = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        owner, name = getattr(node.func, "value", None), getattr(node.func, "attr", getattr(node.func, "id", ""))
        auto = getattr(owner, "id", getattr(owner, "attr", "")).startswith("Auto")
        if (auto and name in ("from_pretrained", "from_config")) or name == "pipeline":
            forbids = any(
                word.arg == "trust_remote_code" and getattr(word.value, "value", None) is False
                for word in node.keywords
            )
            calls.append((node.lineno, forbids))
    return calls


def test_every_loader_forbids_remote_code():
    calls = [(path, *call) for path in FILES for call in loaders(path.read_text(encoding="utf-8"))]
    assert len(calls) > 12
    assert [f"{path}:{line}" for path, line, forbids in calls if not forbids] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AutoConfig.from_pretrained(a, trust_remote_code=False)", [(1, True)]),
        ("AutoConfig.from_pretrained(a, trust_remote_code=True)", [(1, False)]),
        ("transformers.AutoTokenizer.from_pretrained(a)", [(1, False)]),
        ("AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(a))", [(1, False), (1, False)]),
        ("pipeline('text-generation')", [(1, False)]),
        ("MLClient.from_config(a)", []),
    ],
)
def test_a_loader_without_it_would_be_found(text, expected):
    assert loaders(text) == expected


def test_the_package_that_downloads_kernels_is_not_there(tmp_path):
    (tmp_path / "kernels.py").write_text("raise SystemExit('foreign code')", encoding="utf-8")
    shown = "import importlib.util; from slmake import cli; print(importlib.util.find_spec('kernels'))"
    told = "try:\n    import kernels\nexcept ImportError:\n    print('no kernels')"
    run = [sys.executable, "-c", f"{shown}\n{told}"]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["None", "no kernels"], done.stderr


def test_a_question_of_a_library_gets_no_answer(tmp_path):
    reader, writer = os.pipe()
    saved = os.dup(0)
    os.dup2(reader, 0)
    try:
        os.write(writer, b"y\n")
        with cli.job("merge", Path(tmp_path / "log")):
            assert os.read(0, 1) == b""
    finally:
        os.dup2(saved, 0)
        for number in (reader, writer, saved):
            os.close(number)
