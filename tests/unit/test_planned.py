"""What a rule may load and read: what its build was planned with."""

import importlib
import json
import os
import py_compile
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from slmake import cli, planned, user_reads
from slmake.code_inputs import code
from slmake.errors import UserError
from slmake.plan import FIGURES


@pytest.fixture
def plan(tmp_path, monkeypatch) -> Path:
    """A plan of the rule `gates` with one file, seen from the project's folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(planned, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gates"])
    file = tmp_path / "published.json"
    file.write_text("{}", encoding="utf-8")
    monkeypatch.setenv(cli.SOURCES, planned.write({"gates": [str(file)]}))
    return file


def test_what_did_not_change_may_be_read(plan):
    """Whatever the clock says: one that was set back makes all files younger than the process."""
    with planned.watched("gates", 0):
        planned.refuse_unplanned([str(plan)])
    planned.refuse_unplanned(["another"])  # outside of a rule


def test_a_metric_reads_the_rules_files_alone(plan):
    def read(name: str | Path) -> str:
        with user_reads.inputs_only():
            return Path(name).read_text(encoding="utf-8")

    with planned.watched("gates", 0):
        assert read(plan) == "{}"
        with pytest.raises(UserError, match=r"LICENSE: a metric reads it"):
            read("LICENSE")
    assert read("LICENSE")  # outside of a rule


def test_code_that_was_touched_since_the_process_started_may_have_been_another(plan, monkeypatch):
    path = Path(os.environ[cli.SOURCES])
    whole = json.loads(path.read_text())
    whole["gates"]["code"]["slmake/scoring/gates.py"]["mark"][2] -= 1
    path.write_text(json.dumps(whole), encoding="utf-8")
    with (
        pytest.raises(UserError, match=r"slmake/scoring/gates.py changed after this build was planned"),
        planned.watched("gates", 0),
    ):
        pass
    with planned.watched("gates", 2**63):  # touched before
        pass


def test_a_file_that_is_another_stops_the_rule(plan):
    plan.write_text("[]", encoding="utf-8")
    with (
        pytest.raises(UserError, match=r"published.json changed after this build was planned"),
        planned.watched("gates", 0),
    ):
        pass


def test_a_file_that_changes_meanwhile_is_found_at_the_end(plan):
    def swap() -> None:
        with planned.watched("gates", 0):
            plan.write_text("[]", encoding="utf-8")
            plan.write_text("{}", encoding="utf-8")

    with pytest.raises(UserError, match=r"published.json was changed while gates read it"):
        swap()


def test_a_plan_that_is_gone_is_said(plan, monkeypatch):
    monkeypatch.setenv(cli.SOURCES, "nowhere")
    with pytest.raises(UserError, match="nowhere of this build is gone"), planned.watched("gates", 0):
        pass


def test_nothing_watches_after_the_rule(plan):
    before = list(sys.meta_path)

    def fail() -> None:
        with planned.watched("gates", 0):
            assert len(sys.meta_path) == len(before) + 1
            importlib.import_module("slmake.text")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert sys.meta_path == before


@pytest.mark.parametrize("edited", [True, False], ids=["edited", "as it was"])
def test_a_metric_of_the_same_size_and_time_is_compiled_again(plan, edited):
    """`cp -p` and `rsync -t` keep a file's time, so Python would load the bytecode of the file's former content."""
    file = plan.with_name("mine.py")
    file.write_text("VALUE = 1\n", encoding="utf-8")
    os.utime(file, (1e9, 1e9))
    compiled = Path(py_compile.compile(str(file)))
    later = file.stat().st_ctime_ns + (0 if edited else 1)
    os.utime(compiled, ns=(later, later))
    planned.write({"evaluate": [str(file)]})
    assert compiled.exists() != edited


def test_names_of_figures_and_metrics_are_code():
    assert "slmake/params/metrics.py" in code("evaluate")


@pytest.mark.parametrize("figure", [name for name, *_ in FIGURES])
def test_every_figure_has_its_caption(figure):
    assert (ROOT / "report" / f"{Path(figure).stem}.rst").stat().st_size
