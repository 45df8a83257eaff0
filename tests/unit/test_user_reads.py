"""A user's metric reads no file of the project that the build does not know as an input."""

import py_compile
import sys
import types
from pathlib import Path

import pytest

from slmake import user_reads
from slmake.errors import UserError
from slmake.params.metrics import parse
from slmake.scoring import answer_metrics

FILES = {
    "metrics/words.json": '["please"]',
    "metrics/helper_of_mine.py": "WORDS = ['please']\n",
    "build/dataset/rows.json": '["please"]',
    ".cache/words.json": '["please"]',
    "elsewhere.json": '["please"]',
}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project's folder, in which a metric's file and one folder are known."""
    folder = tmp_path / "project"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    (folder / "metrics/link.json").symlink_to("words.json")
    (tmp_path / "outside.json").write_text('["please"]')
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    user_reads.allow(["metrics/mine.py", "build/dataset"])
    yield folder
    user_reads.allow(None)
    sys.modules.pop("helper_of_mine", None)


def run(body: str, at_start: str = "") -> list[float]:
    """What a metric of the user's scores that consists of these lines."""
    text = f"import json, os, sys\n{at_start}\n\n\ndef polite(prompt, expected, answer):\n    {body}\n"
    Path("metrics/mine.py").write_text(text)
    answer_metrics.function_of.cache_clear()
    questions = types.SimpleNamespace(rows=[10], texts=[""], expected=[""])
    return answer_metrics.numbers_of(parse("metrics/mine.py:polite"), questions, ["please"]).tolist()


def count(file: str) -> str:
    return f"return float(answer in json.load(open({file!r})))"


@pytest.mark.parametrize("file", ["metrics/words.json", "metrics/../metrics/link.json", "{here}/elsewhere.json"])
def test_other_files_of_the_project_are_refused(project, file):
    with pytest.raises(UserError, match=r'INPUTS = \["(metrics/(words|link)|elsewhere).json"\]'):
        run(count(file.format(here=project)))


@pytest.mark.parametrize("compiled", [False, True])
def test_modules_from_elsewhere_are_refused(project, compiled):
    if compiled:
        py_compile.compile("metrics/helper_of_mine.py")
    with pytest.raises(UserError, match=r"metrics/helper_of_mine.py: a metric reads it"):
        run("return 1", "sys.path.insert(0, os.path.dirname(__file__))\nimport helper_of_mine")


@pytest.mark.parametrize(
    "read",
    [
        "os.chdir('build'); return float(answer in json.load(open('../elsewhere.json')))",
        "import sqlite3; return float(sqlite3.connect('elsewhere.json') is None)",
    ],
)
def test_other_ways_to_read_are_refused(project, read):
    with pytest.raises(UserError, match=r"elsewhere.json: a metric reads it"):
        run(read)


def test_a_metric_that_goes_on_without_the_file_is_refused(project):
    with pytest.raises(UserError, match=r"metrics/words.json: a metric reads it"):
        run(f"try: {count('metrics/words.json')}\n    except Exception: return 0.0")


@pytest.mark.parametrize(
    "file",
    ["build/dataset/rows.json", ".cache/words.json", "../outside.json", "metrics/words.json", "metrics/link.json"],
)
def test_known_files_and_those_outside_are_read(project, file):
    user_reads.allow(["metrics/mine.py", "build/dataset", *([file] if file.startswith("metrics") else [])])
    assert run(count(file)) == [1.0]


def test_what_a_metric_writes_and_what_packages_load_is_its_own_affair(project):
    Path("out.txt").touch()
    assert run("import colorsys\n    with open('out.txt', 'w') as file: return float(file.write('a'))") == [1.0]
    assert Path("out.txt").read_text() == "a"


def test_nothing_is_refused_outside_of_a_rule_and_of_metrics(project):
    assert Path("elsewhere.json").read_text()
    user_reads.allow(None)
    assert run(count("elsewhere.json")) == [1.0]
