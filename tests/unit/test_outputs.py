"""Outputs appear whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from pathlib import Path

import pytest

from slmake import outputs
from slmake.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    """Set the umask for one test."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


# written


def test_folder_and_files_appear_at_the_end(tmp_path):
    """Inside the block only hidden siblings exist; after it the outputs, with their content, and nothing else."""
    model, report = tmp_path / "build" / "model", tmp_path / "results" / "model.json"
    with outputs.written(model, [report]) as (folder, file):
        assert folder.is_dir()
        assert not file.exists()
        assert folder.parent == model.parent
        assert file.parent == report.parent
        (folder / "weights").write_bytes(b"123")
        file.write_text("{}")
        assert not model.exists()
        assert not report.exists()
    assert names(model.parent) == ["model"]
    assert names(report.parent) == ["model.json"]
    assert (model / "weights").read_bytes() == b"123"
    assert report.read_text() == "{}"


def test_temporary_siblings_are_ignored_by_git(tmp_path, root):
    with outputs.written(tmp_path / "model") as (folder,):
        assert re.fullmatch(r"\.model\.[0-9a-f]{8}\.partial", folder.name)
        assert outputs.scratch(folder).name == folder.name.replace(".partial", ".scratch.partial")
    assert ".*.partial" in (root / ".gitignore").read_text().splitlines()


def test_files_without_a_folder(tmp_path):
    with outputs.written(files=[tmp_path / "a", tmp_path / "b"]) as (first, second):
        first.write_text("1")
        second.write_text("2")
    assert [(tmp_path / name).read_text() for name in names(tmp_path)] == ["1", "2"]


def test_one_process_is_alone_with_a_file(tmp_path, monkeypatch):
    file = tmp_path / "folder" / "lock"
    with outputs.alone(file, wait=False) as first, outputs.alone(file, wait=False) as second:
        assert (first, second) == (True, False)
    with outputs.alone(file, wait=True) as again:
        assert again
    with outputs.alone(tmp_path / "no" / "folder" / "lock", wait=True) as known:  # nor one that cannot be written
        assert not known

    def without_locks(*_) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(outputs.fcntl, "flock", without_locks)
    with outputs.alone(file, wait=True) as known:
        assert not known


@pytest.mark.parametrize("problem", [KeyboardInterrupt, ValueError])
def test_what_ends_a_block_alone_is_passed_on(tmp_path, problem):
    with pytest.raises(problem), outputs.alone(tmp_path / "lock", wait=True):
        raise problem


@pytest.mark.parametrize("problem", [UserError, ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_any_exception_leaves_nothing(tmp_path, problem):
    def fail() -> None:
        with outputs.written(tmp_path / "model", [tmp_path / "report.json"]) as (folder, file):
            (folder / "deep").mkdir()
            (folder / "deep" / "weights").write_bytes(b"123")
            file.write_text("{}")
            raise problem

    with pytest.raises(problem):
        fail()
    assert names(tmp_path) == []


def test_forgotten_file_leaves_nothing(tmp_path):
    """A block that did not write one of its outputs fails as a whole: the folder does not appear alone."""

    def forget() -> None:
        with outputs.written(tmp_path / "model", [tmp_path / "report.json"]) as (folder, _):
            (folder / "weights").write_bytes(b"123")

    with pytest.raises(FileNotFoundError):
        forget()
    assert names(tmp_path) == []


@pytest.mark.parametrize("taken", ["model", "report.json"])
def test_refuses_to_overwrite(tmp_path, taken):
    """What is there stays as it is, and the block does not run."""
    (tmp_path / "model").mkdir()
    if taken == "model":
        (tmp_path / "model" / "weights").write_bytes(b"old")
    else:
        (tmp_path / "report.json").write_text("old")
    before = outputs.folder_digest(tmp_path)
    told = "already exists. Remove it first, or let `snakemake` decide whether to build it again."
    with (
        pytest.raises(UserError) as refused,
        outputs.written(tmp_path / "model", [tmp_path / "report.json"]),
    ):
        pytest.fail("the block ran")
    assert str(refused.value) == f"{tmp_path / taken} {told}"
    assert outputs.folder_digest(tmp_path) == before
    assert not [name for name in names(tmp_path) if name.endswith(".partial")]


def test_empty_folder_may_be_filled(tmp_path):
    """Snakemake and container engines make empty folders beforehand."""
    (tmp_path / "model").mkdir()
    with outputs.written(tmp_path / "model") as (folder,):
        (folder / "weights").write_bytes(b"123")
    assert names(tmp_path / "model") == ["weights"]


def test_leftovers_of_a_killed_run_are_wiped(tmp_path):
    for name in (".model.partial", ".model.0123abcd.partial", ".model.0123abcd.scratch.partial"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "stale").write_text("old")
    (tmp_path / ".report.json.89abcdef.partial").write_text("old")
    with outputs.written(tmp_path / "model", [tmp_path / "report.json"]) as (folder, file):
        assert names(folder) == []
        assert not file.exists()
        (folder / "weights").write_bytes(b"123")
        file.write_text("new")
    assert names(tmp_path) == ["model", "report.json"]
    assert names(tmp_path / "model") == ["weights"]


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])  # fmt: skip
def test_permissions_follow_the_umask(tmp_path, umask, mask, file_mode, folder_mode):
    """Even for files that a library wrote with 0600."""
    umask(mask)
    with outputs.written(tmp_path / "model", [tmp_path / "report.json"]) as (folder, file):
        (folder / "deep").mkdir()
        for path in (folder / "weights", folder / "deep" / "part", file):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    for path in ("model/weights", "model/deep/part", "report.json"):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == file_mode
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == folder_mode
    assert umask(mask) == mask  # unchanged by the block


def test_leftovers_of_another_output_stay(tmp_path):
    """Two candidates of a search are built side by side."""
    others = [".model-2.0123abcd.partial", ".model.json.0123abcd.partial", ".onnx.0123abcd.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    with outputs.written(tmp_path / "model") as (folder,):
        (folder / "weights").write_bytes(b"123")
    assert names(tmp_path) == sorted([*others, "model"])


def test_a_process_that_still_works_on_the_output_cannot_write_into_it(tmp_path):
    """As the child of a killed Snakemake does where nothing ends it: its folder is moved away, and its names are its own."""
    with contextlib.ExitStack() as stack:
        (former,) = stack.enter_context(outputs.written(tmp_path / "model"))
        (former / "weights").write_bytes(b"old")
        with outputs.written(tmp_path / "model") as (folder,):
            assert not former.exists()
            with pytest.raises(FileNotFoundError):
                (former / "more").write_bytes(b"old")
            (folder / "weights").write_bytes(b"new")
        with pytest.raises(FileNotFoundError):
            stack.close()
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "weights").read_bytes() == b"new"


def test_replace_leaves_the_old_content_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "dvc.lock"
    outputs.replace(path, b"old")
    monkeypatch.setattr(outputs.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        outputs.replace(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    outputs.replace(path, b"new")
    assert path.read_bytes() == b"new"


# remove


def test_remove_takes_files_folders_and_links(tmp_path):
    """A link is removed, not what it points to."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("1")
    (tmp_path / "file").write_text("1")
    for name in ("link", "folder", "file", "nothing"):
        outputs.remove(tmp_path / name)
    assert names(tmp_path) == ["kept"]
    assert names(tmp_path / "kept") == ["file"]


# JSON and digests


def test_write_json_is_readable_and_stable(tmp_path):
    outputs.write_json(tmp_path / "a.json", {"tone": "joy", "answer": "é", "count": 2})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "tone": "joy",\n  "answer": "é",\n  "count": 2\n}\n'.encode()
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"tone": "joy", "answer": "é", "count": 2}


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert outputs.sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_bytes(b"1")
    (folder / "deep" / "b").write_bytes(b"22")
    return folder


def test_folder_digest_is_over_names_and_contents(folder):
    lines = [f"{name}\0{hashlib.sha256(content).hexdigest()}\n" for name, content in (("a", b"1"), ("deep/b", b"22"))]
    assert outputs.folder_digest(folder) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_folder_digest_ignores_place_time_and_markers(folder, tmp_path):
    before = outputs.folder_digest(folder)
    (folder / ".snakemake_timestamp").touch()
    os.utime(folder / "a", (0, 0))
    (folder / "empty").mkdir()
    assert outputs.folder_digest(folder.rename(tmp_path / "moved")) == before


@pytest.mark.parametrize("change", ["content", "name", "folder", "added", "removed"])
def test_folder_digest_tells_every_change(folder, change):
    before = outputs.folder_digest(folder)
    if change == "content":
        (folder / "a").write_bytes(b"2")
    elif change == "name":
        (folder / "a").rename(folder / "c")
    elif change == "folder":
        (folder / "deep" / "b").rename(folder / "b")
    elif change == "added":
        (folder / "c").write_bytes(b"")
    else:
        (folder / "a").unlink()
    assert outputs.folder_digest(folder) != before


def test_folder_size(folder):
    (folder / ".snakemake_timestamp").write_text("marker")
    assert outputs.folder_size(folder) == 3
