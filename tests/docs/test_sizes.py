"""Files under 450 lines, functions under 60: a reader sees a whole one on a screen or two."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import ROOT

FILES = [
    *(ROOT / "Snakefile", ROOT / "rules" / "common.smk"),
    *(path for folder in ("slmake", "scripts", "tools", "bench", "tests") for path in (ROOT / folder).rglob("*.py")),
]
LINES, FUNCTION = 450, 60
# Functions of one flat list of cases, in tests only: the fake service's answers by route, and one story of faults.
LONG = {("tests/real/helpers/aml_server.py", "handler"), ("tests/real/test_faults.py", "test_nothing_is_lost")}


def too_long(name: str, text: str) -> Iterator[str]:
    """What is too long in a file: the file itself, and its functions."""
    if len(text.splitlines()) > LINES:
        yield f"{name}: {len(text.splitlines())} lines"
    for node in ast.walk(ast.parse(text)) if name.endswith(".py") else ():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (name, node.name) not in LONG:
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION:
                yield f"{name}: {node.name}: {lines} lines"


def read(path: Path) -> tuple[str, str]:
    return path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def test_no_file_and_no_function_is_too_long():
    own = [path for path in FILES if "node_modules" not in path.parts]
    assert len(own) > 200
    assert [problem for path in own for problem in too_long(*read(path))] == []


def test_every_exemption_is_still_needed():
    for name, function in LONG:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        lines = [n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if getattr(n, "name", "") == function]
        assert max(lines, default=0) > FUNCTION, f"{name}: {function}"


@pytest.mark.parametrize(("body", "problems"), [(59, []), (60, ["a.py: f: 61 lines"])])
def test_a_long_function_is_seen(body, problems):
    assert list(too_long("a.py", "def f():\n" + "    pass\n" * body)) == problems


@pytest.mark.parametrize(("lines", "problems"), [(450, []), (451, ["Snakefile: 451 lines"])])
def test_a_long_file_is_seen(lines, problems):
    assert list(too_long("Snakefile", "#\n" * lines)) == problems
