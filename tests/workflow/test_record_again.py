"""A record where nothing moved since the last one hashes nothing; in all other cases content decides."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from project import TINY, change, environment, run
from tiny import ROOT

from slmake import outputs
from slmake.errors import UserError
from slmake.platforms import atomic_dvc, dvc, unmoved
from tools import build, record


@pytest.fixture
def recorded(repository, monkeypatch) -> Path:
    """A recorded project, the present folder; DVC may not be called again."""
    monkeypatch.chdir(repository)
    dvc.cache.cache_clear()
    record.main([])
    assert unmoved.unmoved()

    def refuse(*arguments, **options) -> None:
        raise UserError(f"dvc was called: {arguments}")

    monkeypatch.setattr(record, "dvc", refuse)
    monkeypatch.setattr(dvc, "dvc", refuse)
    monkeypatch.setattr(atomic_dvc.Repo, "status", refuse)
    yield repository
    dvc.cache.cache_clear()


@pytest.fixture
def compared(repository, monkeypatch) -> Path:
    """A recorded project, the present folder, that a record compares by content although nothing has moved."""
    monkeypatch.chdir(repository)
    monkeypatch.setattr(unmoved, "unmoved", bool)
    dvc.cache.cache_clear()
    yield repository
    dvc.cache.cache_clear()


def test_nothing_moved(recorded):
    before = Path("dvc.lock").stat()
    record.main([])
    assert run(recorded, "snakemake", "--cores", "all").returncode == 0
    record.main([])
    assert Path("dvc.lock").stat() == before
    assert not [path for path in Path("results").iterdir() if not path.stat().st_mode & 0o200]


def test_an_output_that_is_replaced_while_it_is_recorded_is_in_no_receipt(compared, monkeypatch, refused):
    before = Path("dvc.lock").read_bytes()

    def commit_another(*arguments, **options):
        shutil.copy2("build/adapter/adapter_config.json", "copy")
        Path("copy").write_text(Path("copy").read_text().replace("{", "{ ", 1))
        Path("copy").replace("build/adapter/adapter_config.json")
        return dvc.dvc(*arguments, **options)

    monkeypatch.setattr(record, "dvc", commit_another)
    assert "build/adapter was replaced while it was recorded" in refused(record.main, [])
    assert Path("dvc.lock").read_bytes() == before


KILLED = """
import os, runpy, signal
from dvc_data.hashfile import checkout

links, moment = [], {moment}

def link(self, cache, from_path, to_fs, to_path):
    links.append(to_path)
    if len(links) == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    return linked(self, cache, from_path, to_fs, to_path)

linked, checkout.Link.__call__ = checkout.Link.__call__, link
runpy.run_module("slmake.platforms.atomic_dvc", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("moment", [1, 4, 7])
def test_a_kill_while_dvc_links_an_output_loses_none(compared, monkeypatch, moment):
    right = dvc.LOCK.read_bytes()
    before = {path: path.read_bytes() for path in outputs.single_files()}
    dvc.LOCK.unlink()

    def killed(*arguments, **options):
        program = [sys.executable, "-c", KILLED.format(moment=moment), *arguments]
        assert subprocess.run(program, env=environment() | {"PYTHONPATH": str(ROOT)}).returncode == -signal.SIGKILL
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "dvc", killed)
    with pytest.raises(SystemExit):
        record.main([])
    assert {path: path.read_bytes() for path in outputs.single_files()} == before
    monkeypatch.setattr(record, "dvc", dvc.dvc)
    record.main([])
    assert dvc.LOCK.read_bytes() == right
    assert {path: path.read_bytes() for path in outputs.single_files()} == before


def test_what_is_no_rules_output_may_change(compared):
    """build/code, which a record writes itself; an earlier version noted it as built."""
    Path("build/code/more").touch()
    outputs.note_built(["build/code"])
    Path("build/code/more").unlink()
    assert not outputs.as_built("build/code")
    record.main([])


@pytest.mark.parametrize("killed", [False, True])
def test_an_edit_while_receipts_are_written_is_in_no_receipt(compared, monkeypatch, refused, killed):
    before = Path("dvc.lock").read_bytes()

    def commit_an_edit(*arguments, **options):
        change(compared, "finetune", learning_rate=0.5)
        done = dvc.dvc(*arguments, **options)
        assert "learning_rate: 0.5" in dvc.PENDING.read_text()
        if killed:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(record, "dvc", commit_an_edit)
    if killed:
        with pytest.raises(SystemExit):
            record.main([])
    else:
        assert "was built from other parameters, code or data" in refused(record.main, [])
    assert Path("dvc.lock").read_bytes() == before
    monkeypatch.setattr(record, "dvc", dvc.dvc)
    assert "was built from other parameters, code or data" in refused(record.main, [])
    change(compared, "finetune", learning_rate=TINY["finetune"]["learning_rate"])
    record.main([])
    assert Path("dvc.lock").read_bytes() == before


@pytest.mark.parametrize("edited", ["params.yaml", "data/dataset.json"])
def test_what_is_edited_and_put_back_while_it_is_hashed_is_in_no_receipt(compared, monkeypatch, refused, edited):
    before, file = Path("dvc.lock").read_bytes(), Path(edited)
    content = file.read_bytes()

    def commit_another(*arguments, **options):
        file.write_bytes(
            content.replace(b"joy", b"joys", 1) if "data" in edited else content.replace(b": 0.01", b": 0.5")
        )
        done = dvc.dvc(*arguments, **options)
        assert done.returncode == 0
        assert dvc.PENDING.read_bytes() != before
        file.write_bytes(content)
        return done

    assert b": 0.01" in content or b"joy" in content
    monkeypatch.setattr(record, "dvc", commit_another)
    assert "was edited while they were recorded; nothing was recorded" in refused(record.main, [])
    assert Path("dvc.lock").read_bytes() == before
    monkeypatch.setattr(record, "dvc", dvc.dvc)
    record.main([])
    assert Path("dvc.lock").read_bytes() == before


def test_make_asks_snakemake_only_if_a_file_moved(recorded, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(build, "run", lambda screen, targets: asked.append(targets))
    assert build.main([]) == 0
    assert not asked
    assert "build: nothing to do: " in capsys.readouterr().out
    inputs = {
        "Snakefile",
        "rules/common.smk",
        "params.yaml",
        "scripts",
        "slmake",
        "envs/cpu.lock",
        "data/dataset.json",
        "data/base",
    }
    outs = {"build/dataset", "build/adapter", "build/package", "results/metrics.json", "build/report/overview.html"}
    assert inputs | outs <= set(json.loads(unmoved.SEEN.read_text())["paths"])
    os.utime("Snakefile")
    assert build.main([]) == 1
    assert asked == [[]]


def test_what_moved_is_compared_and_what_is_right_is_noted_again(recorded, monkeypatch, refused):
    shutil.copy2("build/adapter/adapter_config.json", "copy")
    Path("copy").replace("build/adapter/adapter_config.json")
    assert "dvc was called: (" in refused(record.main, [])
    monkeypatch.undo()
    monkeypatch.chdir(recorded)
    record.main([])
    assert unmoved.unmoved()


def test_an_object_that_the_cache_lost_is_kept_again(recorded, monkeypatch):
    """As in a fresh clone that was built: the receipts are right, but nothing could be shared."""
    monkeypatch.undo()
    monkeypatch.chdir(recorded)
    shutil.rmtree(".dvc/cache/files")
    record.main([])
    assert json.loads(run(recorded, "dvc", "status", "--json").stdout) == {}
    assert all(Path(name).exists() for name in json.loads(unmoved.SEEN.read_text())["objects"])
    assert len(dvc.recorded()) > 20


def test_damage_that_the_cache_lost_too_is_not_recorded(recorded, monkeypatch, refused):
    monkeypatch.undo()
    monkeypatch.chdir(recorded)
    shutil.rmtree(".dvc/cache/files")
    before = Path("dvc.lock").read_bytes()
    damaged = Path("build/adapter/adapter_config.json")
    damaged.unlink()
    damaged.write_text("{}", encoding="utf-8")
    assert "build/adapter was modified since finetune built it; nothing was recorded." in refused(record.main, [])
    assert Path("dvc.lock").read_bytes() == before


@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_moves_while_it_is_compared_is_not_noted(recorded, monkeypatch, moment):
    """An edit between the record and the comparison is found by its content; one after it by its time."""
    monkeypatch.undo()
    monkeypatch.chdir(recorded)
    status, remember = atomic_dvc.Repo.status, unmoved.remember

    def edited(repo, **options):
        found = status(repo, **options) if moment == "after" else None
        Path("build/adapter/adapter_config.json").write_text("{}", encoding="utf-8")
        return status(repo, **options) if found is None else found

    def remember_edited(wanted):
        monkeypatch.setattr(atomic_dvc.Repo, "status", edited)
        remember(wanted)

    Path("params.yaml").touch()
    monkeypatch.setattr(unmoved, "remember", remember_edited)
    record.main([])
    assert Path("build/adapter/adapter_config.json").read_text(encoding="utf-8") == "{}"
    assert not unmoved.unmoved()
    monkeypatch.undo()
    monkeypatch.chdir(recorded)
    with pytest.raises(SystemExit):
        record.main([])


def test_another_parameter_is_refused_as_before(recorded, monkeypatch, refused):
    monkeypatch.undo()
    monkeypatch.chdir(recorded)
    change(recorded, "finetune", learning_rate=0.5)
    assert "was built from other parameters" in refused(record.main, [])
