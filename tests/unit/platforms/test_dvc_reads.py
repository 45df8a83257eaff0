"""A file of DVC's is read once as long as it is the same, and what was read is nobody else's."""

from types import SimpleNamespace

import pytest

from slmake.platforms import atomic_dvc


@pytest.fixture
def stages(tmp_path):
    """A file of stages as DVC knows it, without a repository."""
    path = tmp_path / "dvc.yaml"
    path.write_text("stages: {a: {cmd: first}}\n")
    file = object.__new__(atomic_dvc.FileMixin)
    file.path, file.verify = str(path), False
    file.repo = SimpleNamespace(fs=SimpleNamespace(protocol="local"))
    read = []

    def load(self, **options):
        read.append(options)
        return {"text": path.read_text()}, path.read_text()

    return path, file, read, atomic_dvc.load_once(load)


def test_it_is_read_once(stages):
    _, file, read, load = stages
    first, _ = load(file)
    first["text"] = "changed by DVC"
    assert load(file)[0]["text"] == "stages: {a: {cmd: first}}\n"
    assert len(read) == 1


@pytest.mark.parametrize("kept", [False, True], ids=["written", "replaced, same size and time"])
def test_another_content_is_read_anew(stages, kept):
    path, file, read, load = stages
    load(file)
    old = path.stat()
    new = path.with_name("new")
    new.write_text("stages: {a: {cmd: other}}\n")
    if kept:
        atomic_dvc.os.utime(new, ns=(old.st_atime_ns, old.st_mtime_ns))
        new.replace(path)
    else:
        path.write_text(new.read_text() + "# longer\n")
    assert "other" in load(file)[0]["text"]
    assert len(read) == 2


def test_comments_are_kept_and_commits_are_not_files(stages):
    """DVC reads with comments to edit a file, and of a commit there is no file."""
    _, file, read, load = stages
    load(file, round_trip=True)
    load(file, round_trip=True)
    file.repo.fs.protocol = "git"
    load(file)
    load(file)
    assert len(read) == 4


def test_dvc_reads_each_file_once_for_all_stages(tmp_path, monkeypatch):
    from dvc.utils import strictyaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_text("x")
    read, load = [], strictyaml.load
    monkeypatch.setattr(
        strictyaml, "load", lambda path, *rest, **named: read.append(path) or load(path, *rest, **named)
    )
    with atomic_dvc.Repo.init(no_scm=True) as repo:
        (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: first, deps: [data]}, b: {cmd: second, deps: [data]}}\n")
        assert set(repo.status(targets=["a", "b"])) == {"a", "b"}
    assert read == [str(tmp_path / "dvc.yaml")]
