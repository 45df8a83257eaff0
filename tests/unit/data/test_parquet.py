"""Parquet files that were made to open something, or to fill the memory."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from slmake import params
from slmake.data import parquet
from slmake.data.hub_rows import read_hub_rows
from slmake.data.rows import read_rows
from slmake.errors import UserError


@pytest.fixture
def picture(tmp_path):
    """A private file of this machine, and the media columns of a row that name it."""
    Image.new("RGB", (2, 2)).save(tmp_path / "private.png")
    return {"bytes": None, "path": str(tmp_path / "private.png")}


@pytest.mark.parametrize("hub", [False, True])
def test_media_are_not_decoded(tmp_path, picture, hub):
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "image": datasets.Image(),
            "sounds": datasets.List(datasets.Audio()),
            "deep": {"images": [datasets.Image()], "tone": datasets.Value("string")},
            "call": datasets.Json(),
        }
    )
    row = {"text": "a", "image": picture, "sounds": [picture], "deep": {"images": [picture], "tone": "joy"}}
    table = pa.Table.from_pylist([row | {"call": '{"city": "Oslo"}'}], features.arrow_schema)
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "data" / "train.parquet")
    if hub:
        section = params.Prepare(source=f"hf:org/rows@{'a' * 40}", text_template="Call: {text}")
        read = read_hub_rows(tmp_path / "data", "rows", section, "train", tmp_path / "scratch")
    else:
        read = read_rows(tmp_path / "data" / "train.parquet")
    named = {"path": picture["path"]}
    assert list(read) == [
        {
            "text": "a",
            "image": named,
            "sounds": [named],
            "deep": {"images": [named], "tone": "joy"},
            "call": {"city": "Oslo"},
        }
    ]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("length", "refused"), [(1, False), (4000, True)])
def test_what_a_parquet_file_unpacks_to_is_bounded(tmp_path, monkeypatch, nested, length, refused):
    """A dictionary gives all rows of one row group the same value."""
    monkeypatch.setattr(parquet, "SMALL", 2**20)
    value = ["x" * length] if nested else "x" * length
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.table({"text": pa.array([value] * 3000)}), path, compression="zstd")
    if refused:
        with pytest.raises(UserError, match="it unpacks to more than 100 times its size"):
            list(read_rows(path))
    else:
        assert list(read_rows(path)) == [{"text": value}] * 3000


def test_a_long_value_is_not_written_out_for_many_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "SMALL", 2**20)
    path, sizes = tmp_path / "rows.parquet", []
    pyarrow.parquet.write_table(pa.table({"text": ["x" * 2**18] * 3000}), path, compression="zstd")
    read = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "iter_batches", lambda file, size: sizes.append(size) or read(file, size)
    )
    with pytest.raises(UserError, match="it unpacks to more than 100 times its size"):
        list(read_rows(path))
    assert 1 <= sizes[0] <= 4


def test_numbers_of_single_precision_are_as_short_as_they_were_written(tmp_path):
    single = pa.list_(pa.float32())
    kinds = {"tone": pa.float32(), "half": pa.float16(), "deep": pa.struct({"a": single}), "double": pa.float64()}
    columns = [
        [0.1, None, 16777216.0],
        np.float16([0.1, 1, 2]),
        [{"a": [0.7, None]}, None, {"a": None}],
        [0.1, 2, 1 / 3],
    ]
    table = pa.table([pa.array(column, kind) for column, kind in zip(columns, kinds.values(), strict=True)], [*kinds])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    read = list(read_rows(tmp_path / "rows.parquet"))
    assert [row["tone"] for row in read] == [0.1, None, 16777216.0]
    assert [row["half"] for row in read] == [0.1, 1.0, 2.0]
    assert read[0]["deep"] == {"a": [0.7, None]}
    assert [row["double"] for row in read] == columns[-1]


UNKNOWN = {
    "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
    "uuid": pa.array([b"0" * 16, None], pa.uuid()),
    "list of maps": pa.array(
        [[{"kind": [("a", "b")]}], []], pa.list_(pa.struct({"kind": pa.map_(pa.string(), pa.string())}))
    ),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_columns_of_other_types_do_not_stand_in_the_way(tmp_path, kind):
    """Columns of types that `datasets` does not know are read by pyarrow, the others as before."""
    features = datasets.Features(
        {"tone": datasets.ClassLabel(names=["joy", "fear"]), "share": datasets.Value("float32")}
    )
    known = pa.Table.from_pylist([{"tone": 1, "share": 0.1}, {"tone": 0, "share": 0.5}], features.arrow_schema)
    pyarrow.parquet.write_table(known.add_column(0, "other", UNKNOWN[kind]), tmp_path / "rows.parquet")
    first, second = read_rows(tmp_path / "rows.parquet")
    assert (first["tone"], first["share"], second["tone"]) == ("fear", 0.1, "joy")
    assert [first["other"], second["other"]] == UNKNOWN[kind].to_pylist()


def test_a_column_of_another_type_that_the_template_needs(refused, tmp_path):
    table = pa.table({"phrase": ["a", "b"], "tone": UNKNOWN["map"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert 'row 1: field `tone` is list, not text: [["a", 1]]' in refused(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(table.select(["tone"]), tmp_path / "rows.parquet")
    assert "field `phrase` is in no row. Fields there: tone" in refused(tmp_path / "rows.parquet")


@pytest.mark.parametrize("hub", [False, True])
def test_labels_have_their_names_at_any_depth(tmp_path, hub):
    label, text = datasets.ClassLabel(names=["neg", "pos"]), datasets.Value("string")
    role = datasets.ClassLabel(names=["user", "assistant"])
    media = {"tone": label, "score": datasets.Value("float32"), "image": datasets.Image()}
    features = datasets.Features(
        {
            "top": label,
            "info": {"label": label, "number": datasets.Value("int64"), "deep": [{"label": label}]},
            "many": datasets.List(label),
            "pairs": datasets.Sequence({"label": label, "text": text}),
            "messages": [{"role": role, "content": text}],
            "media": media,
        }
    )
    turns = [{"role": 0, "content": "hi"}, {"role": 1, "content": "yo"}]
    row = {
        "top": 1,
        "info": {"label": 1, "number": 1, "deep": [{"label": 0}, {"label": -1}, {"label": None}]},
        "many": [0, 1],
        "pairs": {"label": [1, 0], "text": ["a", "b"]},
        "messages": turns,
        "media": {"tone": 1, "score": 0.1, "image": {"bytes": None, "path": "a.png"}},
    }
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([row], features.arrow_schema), path)
    section = params.Prepare(source=f"hf:org/rows@{'a' * 40}", text_template="Call: {text}")
    read = read_hub_rows(path.parent, "rows", section, "train", tmp_path / "scratch") if hub else read_rows(path)
    assert list(read) == [
        {
            "top": "pos",
            "info": {"label": "pos", "number": 1, "deep": [{"label": "neg"}, {}, {}]},
            "many": ["neg", "pos"],
            "pairs": {"label": ["pos", "neg"], "text": ["a", "b"]},
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
            "media": {"tone": "pos", "score": 0.1, "image": {"path": "a.png"}},
        }
    ]
