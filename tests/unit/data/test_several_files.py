"""A split of several files: patterns and folders, on this disk and on a hub."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from prepared import WHOLE, write_rows
from tiny import make_rows, write_params

from slmake import params
from slmake.cli import Job
from slmake.plan import Plan
from slmake.sources.fetching import fetch_rows
from slmake.sources.local import row_files, several_splits
from slmake.sources.schemes import parse

ROWS = make_rows(24)


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three shards of one split as hubs name them, one of them compressed, and what is no file of rows beside them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_rows(folder / "train-00000-of-00003.parquet", ROWS[:8])
    write_rows(folder / "train-00001-of-00003.jsonl", ROWS[8:16])
    (folder / "train-00002-of-00003.json.gz").write_bytes(gzip.compress(json.dumps(ROWS[16:]).encode()))
    (folder / "README.md").write_text("About the data", encoding="utf-8")
    (folder / ".cache.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.mark.parametrize("pattern", ["", "/", "/train-*", "/train-0000[0-2]-of-*"])
def test_files_are_read_in_the_order_of_their_names(build, shards, pattern):
    """The same rows as in one file, with numbers that count through; the record names every file with its sum."""
    one = build(ROWS, name="one", **WHOLE)
    built = build(f"{shards}{pattern}", **WHOLE)
    assert (built.folder / "train.parquet").read_bytes() == (one.folder / "train.parquet").read_bytes()
    record = built.report["source"]["train"]
    assert record["source"] == f"{shards}{pattern}".rstrip("/")  # a folder is recorded by one name
    assert [Path(name).name for name in record["files"]] == [
        f"train-0000{i}-of-00003{end}" for i, end in enumerate((".parquet", ".jsonl", ".json.gz"))
    ]
    assert record["size_bytes"] == sum(Path(name).stat().st_size for name in record["files"])
    assert [path.name for path in built.folder.iterdir() if "content" in path.name] == []


def test_an_error_names_the_file_and_its_own_row(refused, shards):
    bad = [*ROWS[8:12], {"phrase": "x"}]
    write_rows(shards / "train-00001-of-00003.jsonl", bad)
    message = refused(f"{shards}/train-*", **WHOLE)
    assert f"{shards}/train-00001-of-00003.jsonl: row 5: field `tone` is missing" in message


def test_a_pattern_for_each_split(build, shards, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for i in range(2):
        write_rows(
            other / f"test-{i}.json",
            [{**row, "phrase": f"A new one, {row['phrase']} {i}"} for row in make_rows(4 + i)[4 * i :]],
        )
    built = build(
        {"train": f"{shards}/train-*", "test": f"{other}/test-*.json"}, eval_fraction=0.0, near_duplicate_threshold=1.0
    )
    assert built.report["rows"]["train"] == 24
    assert [row["row"] for row in built.test] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: f"{folder}/valid-*.json", "no such file"),
        (lambda folder: f"{folder}/empty", "a folder, not a dataset file"),
        (lambda folder: f"{folder}/train-*#sha256={'0' * 64}", "a pin goes with one file, and this names several"),
    ],
)
def test_what_names_no_files(refused, shards, make, reason):
    (shards / "empty").mkdir()
    assert reason in refused(make(shards), **WHOLE)


def test_a_folder_of_several_splits_is_refused(refused, shards):
    """Test rows would be trained on."""
    write_rows(shards / "test-00000-of-00001.parquet", ROWS[:4])
    message = refused(str(shards), **WHOLE)
    assert (
        f"{shards} names files of several splits. To keep them apart, write under prepare.source: "
        f"train: {shards}/train-0000*, test: {shards}/test-00000-of-00001.parquet. To read them as one: {shards}/*."
    ) in message


@pytest.mark.parametrize(
    ("names", "apart"),
    [
        (["train.csv", "test.csv"], "train: {}/train.csv, test: {}/test.csv"),
        (["Train.csv", "Valid.csv", "Test.csv"], "train: {}/Train.csv, eval: {}/Valid.csv, test: {}/Test.csv"),
        (["emotion_train.csv", "emotion_test2.csv"], "train: {}/emotion_train.csv, test: {}/emotion_test2.csv"),
        (["a/training.csv", "b/training.csv", "dev/b.csv"], "train: {}/*/training.csv, eval: {}/dev/b.csv"),
        (["a/train.csv", "b/train.csv", "a/test.csv"], "train: {}/*/train.csv, test: {}/a/test.csv"),
        (
            ["dev.csv", "train.csv", "valid.csv"],
            "train: {}/train.csv, eval: a pattern that fits {}/dev.csv and {}/valid.csv",
        ),
        (
            ["b/test.csv", "en/train-1.csv", "en/train-2.csv", "f/train-1.csv"],
            "train: a pattern that fits {}/en/train-1.csv and {}/en/train-2.csv, test: {}/b/test.csv",
        ),
        (["train-1.csv", "train-2.csv"], None),
        (["hr-training.csv", "qa-testing.csv"], None),
        (["contest.csv", "trainer.csv", "evals.csv", "latest-train.csv"], None),
    ],
)
def test_files_of_several_splits_are_known_by_their_names(names, apart):
    """Whatever the folder is called, which is named on purpose."""
    for source in ("x/test", "x/test/*.csv", "az://c/test/*"):
        folder = source.removesuffix("/*.csv").removesuffix("/*")
        told = several_splits(source, [f"{folder}/{name}" for name in names])
        assert told.endswith(f"write under prepare.source: {apart.replace('{}', folder)}" if apart else "")
        assert bool(told) == bool(apart)


def test_a_pattern_over_several_splits_gets_a_warning(shards, tmp_path, capsys):
    """It is named on purpose; but test rows may be trained on."""
    write_rows(shards / "test-00000-of-00001.jsonl", ROWS[:4])
    for pattern in ("*.jsonl", "train-*"):
        fetch_rows(parse(f"{shards}/{pattern}"), tmp_path, Job("prepare", sys.stderr, None))
    assert capsys.readouterr().err.count("warning: ") == 1


def test_the_plan_watches_every_file(shards, tmp_path):
    """A new shard is a new input, so prepare runs again; a pattern without a file is reported before anything runs."""

    def plan(source: str) -> Plan:
        return Plan(params.load(write_params(tmp_path / "params.yaml", prepare={"source": source})))

    before = plan(f"{shards}/train-*")
    assert before.data == row_files(f"{shards}/train-*")
    assert len(before.data) == 3
    assert before.missing() is None
    write_rows(shards / "train-00003-of-00003.json", ROWS[:1])
    after = plan(f"{shards}/train-*")
    assert len(after.data) == 4
    assert after.digest("prepare") != before.digest("prepare")
    assert f"{shards}/nothing-*: no such file" in plan(f"{shards}/nothing-*").missing()
    assert not any("prepare" in pattern for pattern in after.online)


def test_a_file_whose_name_looks_like_a_pattern(build, tmp_path):
    source = write_rows(tmp_path / "rows[1].json", ROWS)
    assert row_files(str(source)) == [str(source)]
    assert len(build(source, **WHOLE).train) == 24


def test_files_of_a_hub(build, refused, shards, monkeypatch):
    """Only what matches is asked for; the record has the commit and every file's sum."""
    commit = "0" * 40
    asked = []

    def snapshot(repo_id, revision, repo_type, allow_patterns, local_files_only=False):
        asked.append((repo_id, revision, repo_type, allow_patterns))
        target = shards.parent / "snapshots" / commit
        target.mkdir(parents=True, exist_ok=True)
        if not (target / "data").exists():
            (target / "data").symlink_to(shards)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "repo_info", lambda *_, **__: SimpleNamespace(sha="0" * 40)
    )  # the hub is there
    built = build(f"hf:org/rows@{commit}/data/train-*", **WHOLE)
    assert asked[0] == ("org/rows", commit, "dataset", ["data/train-*"])
    record = built.report["source"]["train"]
    assert (record["revision"], next(iter(record["files"]))) == (
        commit,
        f"hf:org/rows@{commit}/data/train-00000-of-00003.parquet",
    )
    assert len(built.train) == 24


def test_a_pattern_that_matches_nothing_on_a_hub(refused, tmp_path, monkeypatch):
    (tmp_path / "snapshots" / ("0" * 40)).mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **_: str(tmp_path / "snapshots" / ("0" * 40)))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "repo_info", lambda *_, **__: SimpleNamespace(sha="0" * 40)
    )  # the hub is there
    assert "no file matches. Check prepare.source." in refused(f"hf:org/rows@{'0' * 40}/data/test-*", **WHOLE)
