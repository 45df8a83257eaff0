"""A dataset of the hub: its configurations, splits, slices and values of columns, from a folder in the hub's layout."""

import gzip
import json
import subprocess
import sys
from itertools import pairwise

import pyarrow.parquet
import pytest
import yaml
from tiny import ROOT, make_rows, write_params

from scripts import prepare
from slmake import params
from slmake.data import hub_rows
from slmake.data.rows import read_rows
from slmake.errors import UserError
from slmake.sources import hub
from slmake.sources.download import digest_of
from slmake.sources.fetching import sums_of

COMMIT = "c" * 40
CARD = """---
configs:
- config_name: english
  data_files:
  - {split: train, path: english/train-*.parquet}
  - {split: held, path: english/held.parquet}
- config_name: short
  data_files:
  - {split: train, path: short.parquet}
---
# A dataset
"""


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """A dataset in the hub's layout: two configurations, a split in two files, a ClassLabel, and code that must not run."""
    import datasets

    folder = tmp_path_factory.mktemp("hub") / "snapshots" / COMMIT
    (folder / "english").mkdir(parents=True)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "dataset.py").write_text("raise SystemExit('code of a dataset ran')\n", encoding="utf-8")
    rows = [row | {"lang": "en" if i % 3 else "de", "part": i} for i, row in enumerate(make_rows(96))]
    tones = datasets.ClassLabel(names=["sadness", "joy", "fear", "surprise"])
    table = datasets.Dataset.from_list(rows).cast_column("tone", tones)
    table.select(range(40)).to_parquet(folder / "english" / "train-0.parquet")
    table.select(range(40, 80)).to_parquet(folder / "english" / "train-1.parquet")
    table.select(range(80, 96)).to_parquet(folder / "english" / "held.parquet")
    table.select(range(12)).to_parquet(folder / "short.parquet")
    return folder


@pytest.fixture
def read(tmp_path, base, snapshot, monkeypatch):
    """Run prepare on rows of the dataset, which is on a hub that is not asked; returns its splits and its report."""
    monkeypatch.setattr(hub, "commit_of", lambda source, kind: COMMIT)
    monkeypatch.setattr(hub, "from_hub", lambda source, patterns, repo_type: (snapshot, COMMIT))

    def run(**fields):
        section = {"source": "hf:org/tones@v1", "eval_fraction": 0.0, "test_fraction": 0.0, "duplicates": "remove"}
        path = write_params(tmp_path / "params.yaml", prepare=section | fields, all={"stages": ["finetune"]})
        target, report = tmp_path / "dataset", tmp_path / "dataset.json"
        arguments = ("--params", path, "--base", base, "--output", target, "--report", report)
        prepare.main([str(argument) for argument in arguments])
        splits = {name: pyarrow.parquet.read_table(target / f"{name}.parquet") for name in ("train", "eval", "test")}
        return {name: table.to_pylist() for name, table in splits.items()}, json.loads(report.read_text())

    return run


def numbers(rows: list[dict]) -> list[int]:
    """The numbers that `make_rows` put into the phrases."""
    return [int(row["prompt"].partition("number ")[2].split()[0]) for row in rows]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"config": "english"}, list(range(80))),
        ({"config": "english", "split": "train[:25%]"}, list(range(20))),
        ({"config": "english", "split": "train[-8:]"}, list(range(72, 80))),
        ({"config": "english", "split": "held"}, list(range(80, 96))),
        ({"config": "english", "split": "train[10:13]+held[:2]"}, [10, 11, 12, 80, 81]),
        ({"config": "english", "where": {"lang": "de"}}, list(range(0, 80, 3))),
        ({"config": "english", "where": {"tone": "joy", "lang": "en"}}, [i for i in range(80) if i % 4 == 1 and i % 3]),
        ({"config": "english", "where": {"part": 7}}, [7]),
        ({"config": "short"}, list(range(12))),
    ],
)
def test_rows_that_are_chosen(read, fields, expected):
    splits, report = read(**fields)
    assert numbers(splits["train"]) == expected
    record = report["source"]["train"]
    assert (record["source"], record["revision"]) == ("hf:org/tones@v1", COMMIT)
    chosen = {"config": None, "split": "train", "where": {}} | fields
    assert {key: record[key] for key in chosen} == chosen
    assert {row["answer"] for row in splits["train"]} <= {"sadness", "joy", "fear", "surprise"}


def test_splits_of_the_dataset_are_ours(read):
    splits, report = read(config="english", split={"train": "train[:90%]", "eval": "train[90%:]", "test": "held"})
    assert numbers(splits["train"]) == list(range(72))
    assert numbers(splits["eval"]) == list(range(72, 80))
    assert numbers(splits["test"]) == list(range(80, 96))
    assert [report["source"][name]["split"] for name in ("train", "eval", "test")] == [
        "train[:90%]",
        "train[90%:]",
        "held",
    ]


def test_a_sample_of_the_chosen_rows(read):
    splits, _ = read(config="english", where={"lang": "en"}, max_samples=10)
    assert len(splits["train"]) == 10
    assert all(number % 3 for number in numbers(splits["train"]))
    assert all(a < b for a, b in pairwise(numbers(splits["train"])))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "config none, split train cannot be read: Config name is missing"),
        ({"config": "german"}, "BuilderConfig 'german' not found"),
        ({"config": "english", "split": "dev"}, 'Unknown split "dev"'),
        ({"config": "english", "split": "train[:x]"}, "split train[:x] cannot be read"),
        ({"config": "english", "where": {"language": "en"}}, "has no column `language`. Did you mean `lang`?"),
        (
            {"config": "english", "where": {"lang": "fr"}},
            "prepare.where: no row of hf:org/tones@v1 (train) has lang 'fr'.",
        ),
    ],
)
def test_choices_that_the_dataset_does_not_have(read, capsys, fields, message):
    with pytest.raises(SystemExit):
        read(**fields)
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count(": error: ") == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "data/rows.json", "split": "train"}, "config, split and where choose rows of hf:ORG/NAME@REVISION"),
        ({"source": "hf:org/tones@v1/a.json", "where": {"lang": "en"}}, "not of the file `hf:org/tones@v1/a.json`"),
        ({"source": {"train": "hf:a/b@v1", "test": "hf:a/b@v1"}}, "say in split which of its rows are for test"),
        ({"source": "hf:org/tones", "config": "english"}, "a hub source needs a revision"),
        ({"split": {"eval": "held"}}, "prepare.split.train: missing"),
        ({"where": {"lang": None}}, "prepare.where.lang: null is not allowed"),
    ],
)
def test_choices_that_say_nothing(tmp_path, fields, message):
    section = {"source": "hf:org/tones@v1"} | fields
    path = write_params(tmp_path / "params.yaml", prepare=section)
    with pytest.raises(UserError) as stopped:
        params.load(path)
    assert message in str(stopped.value)


def test_a_snapshot_that_may_lack_files_is_taken_by_its_sum_only(tmp_path, snapshot):
    """Without a network: what is cached may be a part of the dataset, unless its SHA-256 is known."""
    cache = tmp_path / "hub" / "datasets--org--tones"
    (cache / "refs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / COMMIT).symlink_to(snapshot)
    code = (
        "import sys; from pathlib import Path; from slmake import cli; from slmake.errors import UserError\n"
        "from slmake.sources import fetching, schemes\n"
        "try: print(fetching.fetch(schemes.parse(sys.argv[1]), 'dataset', Path('.'), None).record['sha256'])\n"
        "except UserError as error: sys.exit(str(error))"
    )
    sums = sums_of(snapshot, "dataset")
    assert "dataset.py" not in sums
    total = digest_of(sums)
    environment = {
        "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    for pin, expected in (("", "the hub cannot be reached"), (f"#sha256={total}", total)):
        command = [sys.executable, "-c", code, f"hf:org/tones@{COMMIT}{pin}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert expected in done.stdout + done.stderr


def test_the_commit_of_a_branch_cannot_be_had_without_a_network():
    code = "from slmake.sources import hub, schemes; hub.commit_of(schemes.parse('hf:org/tones@main'))"
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "slmake.errors.UserError: hf:org/tones@main: the hub cannot be reached" in done.stderr


def test_a_number_of_rows_for_eval(read):
    splits, _ = read(config="english", eval_samples=12)
    assert (len(splits["eval"]), len(splits["train"])) == (12, 68)


def test_a_number_of_rows_for_eval_that_leaves_none_to_train_on(read, capsys):
    with pytest.raises(SystemExit):
        read(config="english", eval_samples=79)
    assert "prepare.eval_samples: 79 of 80 rows leave less than a tenth" in capsys.readouterr().err


def test_the_pipeline_of_the_shipped_file_names_every_field():
    section = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["prepare"]
    assert {"config": None, "split": None, "where": {}, "eval_samples": None}.items() <= section.items()


def test_fields_that_arrow_adds_are_no_fields(tmp_path):
    """Arrow gives every object the fields of all; the file reader and the hub's leave out what a row does not have."""
    rows = [{"call": {"city": "Oslo"}}, {"call": {"day": "May"}}]
    folder = tmp_path / "snapshot"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    section = params.Prepare(source=f"hf:org/rows@{COMMIT}", text_template="Call: {call}")
    assert list(hub_rows.read_hub_rows(folder, "rows", section, "train", tmp_path / "scratch")) == rows
    assert list(read_rows(folder / "train.parquet", "train.parquet")) == rows


NAMED = """---
dataset_info:
  features:
  - {name: text, dtype: string}
  - name: tone
    dtype: {class_label: {names: {"0": fear, "1": joy}}}
---
"""


@pytest.fixture
def read_text(tmp_path):
    """Write a dataset's files of text, by name, and read the rows that some fields of prepare choose."""

    def run(files: dict[str, str], split: str = "train", **fields) -> list[dict]:
        folder = tmp_path / "snapshot"
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            packed = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
            (tmp_path / path.name).write_bytes(packed)
            path.symlink_to(tmp_path / path.name)  # as in the hub's cache
        section = params.Prepare(source=f"hf:org/rows@{COMMIT}", text_template="{text}: {tone}", split=split, **fields)
        return list(hub_rows.read_hub_rows(folder, "hf:org/rows", section, "train", tmp_path / "scratch"))

    return run


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("train.csv", "text,tone\na,0110\nb,1.10\nc,True\nd,NA\n", ["0110", "1.10", "True", "NA"]),
        ("train.csv", "text;tone\nhello, you;joy\n", ["joy"]),
        ("train.csv.gz", "text,tone\na,0110\n", ["0110"]),
        ("train.tsv", 'text\ttone\na\t2024-05-01\nb\t"x ""y"""\n', ["2024-05-01", 'x "y"']),
        ("train.jsonl", '{"text": "a", "tone": "2024-05-01"}\n{"text": "b", "tone": 1.10}\n', ["2024-05-01", 1.1]),
        ("train.json", '[{"text": "a", "tone": {"day": "2024-05-01"}}]', [{"day": "2024-05-01"}]),
    ],
)
def test_values_of_text_files_are_what_the_file_says(read_text, name, text, rows):
    assert [row["tone"] for row in read_text({name: text})] == rows


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.csv": "text,tone\nhello,x,joy\n"}, "hf:org/rows/train.csv: row 1 .* 3 values for 2 columns"),
        ({"train.csv": "text,text\nhello,joy\n"}, "repeated column names: text"),
        ({"train.tsv": 'text\ttone\n"Oh no\tfear\nlast"\tjoy\n'}, "opens a quote"),
        ({"train.jsonl": '{"text": "a", "tone": NaN}\n'}, "NaN is not JSON"),
        ({"train.jsonl": '{"text": "a", "text": "b"}\n'}, "has the key `text` twice"),
        ({"train.csv": "text,tone\na,0\n", "README.md": "---\nconfigs:\n- {config_name: default, data_files: train.csv, "
          "skiprows: 1}\n---\n"}, "its card has the files read with skiprows: 1"),
        ({"train.csv": "text,tone\na,sad\n", "README.md": NAMED}, "row 1: `tone` is none of the names in the dataset's card"),
    ],
)  # fmt: skip
def test_text_files_are_refused_as_local_ones_are(read_text, files, message):
    with pytest.raises(UserError, match=message):
        read_text(files)


LINES = {
    "data/train-0.jsonl": "".join(f'{{"text": "t{i}", "tone": {i % 2}}}\n' for i in range(6)),
    "data/train-1.jsonl": "".join(f'{{"text": "t{i}", "tone": {i % 2}}}\n' for i in range(6, 10)),
    "data/test-0.jsonl": '{"text": "t10", "tone": 1}\n',
}


@pytest.mark.parametrize(
    ("files", "fields", "chosen"),
    [
        (LINES, {}, list(range(10))),
        (LINES, {"split": "train[:20%]+test"}, [0, 1, 10]),
        (LINES, {"split": "train[5:7] + train[-1:]"}, [5, 6, 9]),
        (LINES, {"split": "all"}, list(range(11))),
        (LINES, {"where": {"tone": 1}, "split": "train[:5]"}, [1, 3]),
        (LINES | {"README.md": NAMED}, {"where": {"tone": "joy"}}, [1, 3, 5, 7, 9]),
        ({"train.csv": "text,tone,n\nt1,x,7\nt2,True,8\n"}, {"where": {"n": 7}}, [1]),
        ({"train.csv": "text,tone,n\nt1,x,7\nt2,True,8\n"}, {"where": {"tone": True}}, [2]),
        ({"train.csv": "text|tone\nt1|a,b\n", "README.md": "---\nconfigs:\n- {config_name: default, data_files: train.csv, "
          "sep: '|'}\n---\n"}, {}, [1]),
        ({"train.csv": "text,tone\nt1,1\nt2,fear\n", "README.md": NAMED}, {"where": {"tone": "joy"}}, [1]),
    ],
)  # fmt: skip
def test_rows_of_text_files_that_are_chosen(read_text, files, fields, chosen):
    assert [int(row["text"][1:]) for row in read_text(files, **fields)] == chosen


def test_a_card_names_no_files_outside_the_dataset(read_text, tmp_path):
    (tmp_path / "private.csv").write_text("text,tone\na,b\n", encoding="utf-8")
    card = "---\nconfigs:\n- {config_name: default, data_files: ../private.csv}\n---\n"
    with pytest.raises(UserError, match="which is no file of the dataset"):
        read_text({"README.md": card})
