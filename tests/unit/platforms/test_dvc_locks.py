"""DVC's list of the processes that read and write: a killed DVC may leave it cut, and a live one is respected."""

import inspect
import json
import os

import pytest
from dvc.fs import localfs
from dvc.lock import LockError

from slmake.platforms import atomic_dvc


def lock(folder):
    """DVC's lock of a command that writes build/adapter."""
    return atomic_dvc.rwlock.rwlock(str(folder), localfs, "commit", [], ["build/adapter"], False)


@pytest.mark.parametrize("content", ["", '{"write": {"build/ada', "[]", '{"write": 5}', "\x00" * 10])
def test_a_list_that_was_cut_stops_nobody(tmp_path, content):
    (tmp_path / "rwlock").write_text(content, encoding="utf-8")
    with lock(tmp_path):
        written = json.loads((tmp_path / "rwlock").read_text(encoding="utf-8"))
        assert written["write"] == {"build/adapter": {"pid": os.getpid(), "cmd": "commit"}}
    assert json.loads((tmp_path / "rwlock").read_text(encoding="utf-8")) == {"read": {}}


def test_a_process_that_runs_is_waited_for(tmp_path):
    running = {"write": {"build/adapter": {"pid": os.getppid(), "cmd": "repro"}}}
    (tmp_path / "rwlock").write_text(json.dumps(running), encoding="utf-8")
    with pytest.raises(LockError, match="'build/adapter' is busy"), lock(tmp_path):
        pass
    assert json.loads((tmp_path / "rwlock").read_text(encoding="utf-8")) == running


def test_the_list_is_never_cut(tmp_path, monkeypatch):
    def stop(*_) -> None:
        raise KeyboardInterrupt

    with lock(tmp_path):
        before = (tmp_path / "rwlock").read_bytes()
        monkeypatch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt), atomic_dvc.edit_rwlock(str(tmp_path), localfs, False) as content:
            content["read"]["data"].append({"pid": 1, "cmd": "status"})
        assert (tmp_path / "rwlock").read_bytes() == before
        monkeypatch.undo()


def test_dvc_still_calls_it_so():
    source = inspect.getsource(atomic_dvc.rwlock.rwlock)
    assert source.count("with _edit_rwlock(tmp_dir, fs, hardlink) as lock:") == 2
