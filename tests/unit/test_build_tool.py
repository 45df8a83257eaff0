"""The tool behind `make`, without Snakemake."""

import getpass
import os
import pwd
from pathlib import Path

import pytest
from tiny import write_params

import tools
from slmake.errors import UserError
from tools import build, page


@pytest.fixture
def pages(tmp_path, monkeypatch) -> list[str]:
    """The pages that a build writes in a project with the figures of a former one."""
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path / "params.yaml")
    page.OVERVIEW.parent.mkdir(parents=True)
    page.OVERVIEW.touch()
    written = []
    monkeypatch.setattr(build, "run", lambda screen, targets: True)
    monkeypatch.setattr(build.dvc_yaml, "update", lambda: None)
    monkeypatch.setattr(page, "write", lambda: written.append("page"))
    return written


@pytest.mark.parametrize("target", ["results/rehearsal.json", "build/dataset", "finetune"])
def test_what_is_built_without_the_report_needs_no_page(pages, target):
    """`make rehearse` and `make preview`: figures that params.yaml now asks for are not there yet."""
    assert build.main([target]) == 0
    assert not pages


@pytest.mark.parametrize("target", ["build/report/overview.html", "./build/report/scores.svg", "report", "all"])
def test_the_report_comes_with_its_page(pages, target):
    assert build.main([target]) == 0
    assert pages == ["page"]


def test_a_build_of_everything_has_a_page_if_it_has_a_report():
    assert build.with_report([], ["finetune", "report"])
    assert not build.with_report([], ["finetune"])


def test_a_page_of_other_figures_is_removed(pages):
    """A build that failed behind new figures, and outputs that were restored, leave no page of the former ones."""
    said = []
    page.remove_stale(said.append)
    page.PAGE.touch()
    page.SHOWN.parent.mkdir()
    page.SHOWN.write_text(page.figures(), encoding="ascii")
    page.remove_stale(said.append)
    assert page.PAGE.exists()
    assert said == []
    page.OVERVIEW.write_text("new", encoding="utf-8")
    page.remove_stale(said.append)
    assert [line[:50] for line in said] == ["build/report.html was of another build and is remo"]
    assert not page.PAGE.exists()


def test_a_rule_that_nothing_would_record_is_refused_before_the_first_one(pages, tmp_path, monkeypatch, capsys):
    def refuse() -> None:
        raise build.dvc_yaml.UnknownRule("Snakefile: slmake does not know the rule summary")

    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(build.dvc_yaml, "update", refuse)
    assert build.main(["build/base"]) == 0  # of a single target nothing is recorded
    with pytest.raises(SystemExit):
        build.main([])
    assert "build: error: Snakefile: slmake does not know the rule summary" in capsys.readouterr().err


def test_a_folder_that_dvc_could_not_record_is_refused_before_the_first_rule(pages, tmp_path, monkeypatch, capsys):
    """Its own folder of DVC: the receipts and the cache's notes are in it."""
    (tmp_path / "project").mkdir()
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    with pytest.raises(SystemExit):
        build.main([])
    assert "build: error: DVC has no folder .dvc here" in capsys.readouterr().err
    (tmp_path / "project" / ".dvc").mkdir()
    with pytest.raises(SystemExit):  # as of a project that was downloaded as an archive
        build.main([])
    assert "build: error: this folder is no part of a Git repository" in (shown := capsys.readouterr().err)
    assert "`.venv/bin/dvc config core.no_scm true`" in shown
    (tmp_path / ".git").mkdir()
    build.refuse_unrecordable()
    (tmp_path / ".git").rmdir()
    config = tmp_path / "project" / ".dvc" / "config"
    config.write_text("[core]\n    no_scm = true\n", encoding="utf-8")
    build.refuse_unrecordable()
    (tmp_path / "disk").write_text("", encoding="utf-8")  # where another disk should be
    config.write_text("[core]\n    no_scm = true\n[cache]\n    dir = ../../disk/cache\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"disk/cache: DVC's cache cannot be there \(Not a directory\)"):
        build.refuse_unrecordable()
    config.write_text(
        '[core]\n    no_scm = true  # as DVC reads it\n[cache]\n    dir = "../../here"\n', encoding="utf-8"
    )
    build.refuse_unrecordable()
    assert (tmp_path / "here").is_dir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "here")
    with pytest.raises(UserError, match=r"here: DVC's cache cannot be there \(it may not be written\)"):
        build.refuse_unrecordable()
    config.write_text("<<<<<<< HEAD\n[core]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"\.dvc/config: .+ Correct it, or bring back what Git has"):
        build.refuse_unrecordable()


def test_a_user_whom_the_system_does_not_know_has_a_name_and_a_folder_for_caches(tmp_path, monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[f"uid not found: {uid}"])
    monkeypatch.setenv("HOME", str(tmp_path))
    tools.provide_home()
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert "XDG_CACHE_HOME" not in os.environ
    monkeypatch.setenv("HOME", str(tmp_path / "absent"))
    tools.provide_home()
    assert os.environ.pop("XDG_CACHE_HOME") == str(Path(".snakemake/cache").absolute())
    monkeypatch.delenv("HOME")
    tools.provide_home()
    assert os.environ.pop("XDG_CACHE_HOME") == str(Path(".snakemake/cache").absolute())
    del os.environ["LOGNAME"]
