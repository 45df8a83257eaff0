"""Sizes, times and inodes say that nothing moved since the last record, or that something did."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from tiny import write_params

from slmake import outputs
from slmake.platforms import unmoved

SETTLED = time.time_ns() - 10**12


@pytest.fixture(autouse=True)
def seen(tmp_path, monkeypatch) -> None:
    """A folder, two files and an object of the cache, all seen; a file that is not here."""
    monkeypatch.chdir(tmp_path)
    for name in ("build/adapter/weights", "build/adapter/more/config", "params.yaml", "cache/object", ".dvc/tmp/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name, encoding="utf-8")
        os.utime(name, ns=(SETTLED, SETTLED))
    write_params(Path("params.yaml"), prepare={"source": "data/*.json"}, all={"stages": ["finetune"]})
    for name in ("params.yaml", *more_rows("first.json")):
        os.utime(name, ns=(SETTLED, SETTLED))
    paths = ["params.yaml", "build/adapter", "no/such/file", "data/base", "data/first.json", "LICENSE"]
    content = {"paths": paths, "marks": outputs.marks(paths), "objects": ["cache/object"]}
    unmoved.SEEN.write_text(json.dumps(content), encoding="utf-8")


def more_rows(name: str) -> list[str]:
    path = Path("data", name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("[]", encoding="utf-8")
    return [str(path)]


def test_a_pattern_of_data_has_a_file_more():
    more_rows("rows.txt")
    assert unmoved.unmoved()
    more_rows("second.json")
    assert not unmoved.unmoved()


def test_parameters_that_cannot_be_read():
    content = json.loads(unmoved.SEEN.read_text(encoding="utf-8"))
    Path("params.yaml").write_text("finetune: [", encoding="utf-8")
    content["marks"] = outputs.marks(content["paths"])
    unmoved.SEEN.write_text(json.dumps(content), encoding="utf-8")
    assert not unmoved.unmoved()


def edit_in_place(path: Path) -> None:
    """The same size and the same time as before."""
    with open(path, "r+", encoding="utf-8") as file:
        file.write("X")
    os.utime(path, ns=(SETTLED, SETTLED))


def replace_by_copy(path: Path) -> None:
    """As `cp -p`, `tar x` and `rsync -a` do."""
    shutil.copy2(path, "other")
    os.replace("other", path)


def test_nothing_moved():
    assert unmoved.unmoved()
    Path("build/adapter/weights").read_bytes()
    Path("build/adapter/__pycache__").mkdir()
    Path("build/adapter/__pycache__/x.pyc").touch()
    Path("build/other").touch()
    assert unmoved.unmoved()


@pytest.mark.parametrize("name", ["params.yaml", "build/adapter/weights", "build/adapter/more/config"])
@pytest.mark.parametrize("change", [edit_in_place, replace_by_copy, Path.touch, Path.unlink, os.truncate])
def test_a_file_moved(name, change):
    change(Path(name), *[3] * (change is os.truncate))
    assert not unmoved.unmoved()


@pytest.mark.parametrize("name", ["build/adapter/more/new", "build/adapter/.hidden", "no/such/file"])
def test_a_file_was_added(name):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).touch()
    assert not unmoved.unmoved()


def test_an_output_was_replaced_by_a_file():
    shutil.rmtree("build/adapter")
    Path("build/adapter").touch()
    assert not unmoved.unmoved()


def test_the_cache_lost_an_object():
    Path("cache/object").unlink()
    assert not unmoved.unmoved()


@pytest.mark.parametrize("content", ["", "{", None])
def test_without_a_whole_note_nothing_is_known(content):
    unmoved.SEEN.unlink() if content is None else unmoved.SEEN.write_text(content, encoding="utf-8")
    assert not unmoved.unmoved()
