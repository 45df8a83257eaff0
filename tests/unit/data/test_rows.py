"""Rows of every file format, and files that cannot be read."""

import csv
import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from prepared import WHOLE, Built, write_rows
from tiny import TONES, make_rows

from slmake.data import rows
from slmake.data.rows import read_rows
from slmake.data.template import label_text
from slmake.errors import UserError

TRICKY = [
    {"phrase": 'He said "NA", twice', "tone": "NA", "code": "007"},
    {"phrase": "two\nlines, one text", "tone": "null", "code": "1e5"},
    {"phrase": "  blanks around  ", "tone": "3.10", "code": "-0"},
    {"phrase": "Grüße 🙂 你好", "tone": "true", "code": "1,000"},
    {"phrase": "back\\slash {brace}", "tone": "nan", "code": "0x10"},
]


@pytest.fixture
def tricky(build, tmp_path) -> Built:
    source = write_rows(tmp_path / "tricky.json", TRICKY)
    return build(source, name="reference", text_template="{phrase}|{code}\n{tone}", **WHOLE)


def test_texts_arrive_unchanged(tricky):
    texts = [(row["prompt"], row["answer"]) for row in tricky.train]
    assert texts == [(f"{row['phrase']}|{row['code']}\n", row["tone"]) for row in TRICKY]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_formats_give_the_same_rows(build, tricky, tmp_path, ending):
    """JSON Lines, CSV and Parquet give byte for byte the same splits as a JSON array."""
    source = write_rows(tmp_path / f"tricky{ending}", TRICKY)
    built = build(source, text_template="{phrase}|{code}\n{tone}", **WHOLE)
    for name in ("train.parquet", "eval.parquet", "test.parquet", "prompt.json"):
        assert (built.folder / name).read_bytes() == (tricky.folder / name).read_bytes()


@pytest.mark.parametrize("ending", [".json", ".csv", ".jsonl"])
def test_byte_order_mark_is_not_text(build, tmp_path, ending):
    source = write_rows(tmp_path / f"rows{ending}", make_rows(24))
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert len(build(source, **WHOLE).train) == 24


def test_json_lines_in_a_json_file(build, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", make_rows(24)).rename(tmp_path / "rows.json")
    assert len(build(source, **WHOLE).train) == 24


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
def test_dates_stay_text(build, tmp_path, ending):
    """A column that looks like dates is text all the same: the answer of an extraction task, for one."""
    rows = [{"phrase": f"The meeting is on day {i} of May", "tone": f"2024-05-{i:02d}"} for i in range(1, 25)]
    built = build(write_rows(tmp_path / f"rows{ending}", rows), **WHOLE)
    assert [row["answer"] for row in built.train][:2] == ["2024-05-01", "2024-05-02"]


@pytest.mark.parametrize(
    ("content", "row"),
    [
        ("phrase,tone\nI like it, a lot,joy\nI hate it, a lot,fear\n", 1),
        ("tone,phrase\njoy,I like it,\nfear,I hate it,\n", 1),
        ("phrase,tone\nI like it,joy\nI hate it, a lot,fear\n", 2),
        ("tone,phrase\njoy,I like it\nfear\n", 2),
    ],
    ids=["all-too-long", "comma-at-the-end", "one-too-long", "one-too-short"],
)
def test_csv_row_that_does_not_fit_its_header(refused, tmp_path, content, row):
    """A row with more or fewer values than columns is refused and named; its values are never shifted."""
    source = tmp_path / "rows.csv"
    source.write_text(content, encoding="utf-8")
    message = refused(source, **WHOLE)
    assert str(source) in message
    assert re.search(rf"\brow {row}\b|\bline {row + 1}\b", message)


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize("half", ["\ud83d", "a \ud83d b", "c \ude00", "\U0001f600\ude00", "\ud83d\U0001f600"])
def test_half_a_surrogate_pair(refused, tmp_path, ending, half):
    rows = make_rows(24)
    rows[16]["tone"] = half
    source, lines = tmp_path / f"rows{ending}", [json.dumps(row) for row in rows]
    source.write_text("\n".join(lines) if ending == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    assert f"  {source}: row 17: field `tone` holds half a surrogate pair" in refused(source)


def test_nested_json_is_read_as_the_standard_library_does(tmp_path):
    """What looks like half a pair behind an escaped backslash is text; a hundred levels are allowed."""
    deep = json.loads("[" * 99 + "]" * 99)
    rows = [{"a": {"b": [1, {"c": None}], "d": []}, "e": {}}, {"f": [[2.5], {}, "\U0001f600"]}, {"g": deep}, {}]
    for some in (rows, [*rows, {"h": "\\ud83d"}]):
        (tmp_path / "rows.json").write_text(json.dumps(some), encoding="utf-8")
        assert list(read_rows(tmp_path / "rows.json")) == some


def test_folder_as_source(refused, tmp_path):
    (tmp_path / "rows").mkdir()
    assert refused(tmp_path / "rows") == f"{tmp_path / 'rows'}: a folder, not a dataset file. Check prepare.source."


# Files as people have them


def delimited(delimiter: str, rows: list[dict]) -> str:
    lines = [delimiter.join(row.values()) for row in [{"phrase": "phrase", "tone": "tone"}, *rows]]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("delimiter", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
def test_delimiter_is_detected_and_reported(build, tmp_path, capsys, delimiter, name):
    rows = [{**row, "phrase": f"well, {row['phrase']}"} for row in make_rows(24)]
    source = tmp_path / "rows.csv"
    source.write_text(delimited(delimiter, rows), encoding="utf-8-sig")
    built = build(source, **WHOLE)
    assert [row["answer"] for row in built.train] == [row["tone"] for row in rows]
    assert rows[0]["phrase"] in built.train[0]["prompt"]
    assert f"prepare: {source}: the columns are separated by {name}\n" in capsys.readouterr().err


def test_commas_are_not_reported(build, tmp_path, capsys):
    build(write_rows(tmp_path / "rows.csv", make_rows(24)), **WHOLE)
    assert "separated by" not in capsys.readouterr().err


def test_tsv_has_tabs(build, tmp_path):
    (tmp_path / "rows.tsv").write_text(delimited("\t", make_rows(24)), encoding="utf-8")
    assert len(build(tmp_path / "rows.tsv", **WHOLE).train) == 24


def write_quoted(path: Path, lines: Iterable[Iterable[str]], delimiter: str) -> None:
    """Fields with the delimiter, a quote or a line end in them stand between quotes."""
    with open(path, "w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, delimiter=delimiter).writerows(lines)


@pytest.mark.parametrize("ending", [".tsv", ".csv"])
def test_quotes_that_may_be_text_are_refused(refused, tmp_path, ending):
    """Files with tabs are often written without quoting: a row would take in the next ones, with the last one's label."""
    rows = ['"I am here, he said.\tjoy', "between\tjoy", "", 'I am gone, she said."\tfear', *["plain\tjoy"] * 12]
    source = tmp_path / f"rows{ending}"
    source.write_text("\n".join(["phrase\ttone", "first\tjoy", *rows]), encoding="utf-8")
    message = refused(source)
    assert (
        f"{source}: row 2 (the lines up to 6): 3 lines with 2 columns each, or one row: the first line opens a quote"
        in message
    )


@pytest.mark.parametrize("delimiter", [",", ";", "|"])
def test_quotes_that_may_be_text_between_other_delimiters(refused, tmp_path, delimiter):
    """Where another line is a row with quotes only, or the header has some, quotes enclose fields in the whole file."""
    source = tmp_path / "rows.csv"
    header, plain = ["id", "phrase", "tone"], [[str(i), "plain", "joy"] for i in range(12)]
    unquoted = [header, *plain, ["12", '"Great he said', "joy"], ["13", 'Bye."', "fear"]]
    source.write_text("\n".join(map(delimiter.join, unquoted)), encoding="utf-8")
    assert f"{source}: row 13 (the lines up to 15): 2 lines with 3 columns each, or one row" in refused(source)
    text = f"one{delimiter} two\nthree{delimiter} four"
    for more in (f"five{delimiter} six", "five\nsix"):
        lines = [header, *plain, ["12", text, "joy"], ["13", more, "joy"]]
        write_quoted(source, lines, delimiter)
        assert [row["phrase"] for row in read_rows(source, fields=header)][12:] == [text, more]
    with open(source, "w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([header, ["1", text, "joy"]])
    assert list(read_rows(source, fields=header)) == [{"id": "1", "phrase": text, "tone": "joy"}]


@pytest.mark.parametrize("text", ["one\ntwo", "one\ttwo", 'a "quoted"\n\nword', "\n", "one\n\ttwo\tthree"])
def test_quotes_that_enclose_a_field_with_tabs_and_line_ends(tmp_path, text):
    """Only one reading of the lines has the header's columns."""
    rows = [{"phrase": text, "tone": "joy"}, {"phrase": "plain", "tone": text}]
    write_quoted(tmp_path / "rows.tsv", [["phrase", "tone"], *(row.values() for row in rows)], "\t")
    assert list(read_rows(tmp_path / "rows.tsv")) == rows
    write_quoted(tmp_path / "column.tsv", [["phrase"], [text], ["plain"]], "\t")
    assert list(read_rows(tmp_path / "column.tsv")) == [{"phrase": text}, {"phrase": "plain"}]


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_columns_without_a_name_are_not_read(build, tmp_path, ending):
    """As pandas writes its index, and a delimiter at the end of every line makes one."""
    source, rows = tmp_path / f"rows{ending}", make_rows(24)
    lines = ["", "phrase", "tone", ""], *([str(i), row["phrase"], row["tone"], ""] for i, row in enumerate(rows))
    write_quoted(source, lines, "\t" if ending == ".tsv" else ",")
    assert list(read_rows(source)) == [{"phrase": row["phrase"], "tone": row["tone"]} for row in rows]
    assert len(build(source, **WHOLE).train) == 24


@pytest.mark.parametrize("line", ["sep=;\n", "SEP=;\r\n", '"sep=;"\n', "\ufeffsep=;\n"])
def test_excels_line_that_names_the_delimiter(tmp_path, line):
    """It is no header; here all rows would fit commas, too. Lines are counted with it."""
    source, said = tmp_path / "rows.csv", []
    source.write_text(f"{line}phrase,x;tone\na,b;joy\n", encoding="utf-8", newline="")
    assert list(read_rows(source, say=said.append)) == [{"phrase,x": "a,b", "tone": "joy"}]
    assert said == [f"{source}: the columns are separated by semicolons"]
    source.write_text(f"{line}phrase;tone\na;joy\nb\n", encoding="utf-8", newline="")
    with pytest.raises(UserError, match=r"row 2 \(line 4\): 1 values for 2 columns separated by semicolons"):
        list(read_rows(source))


def test_excels_line_that_names_another_delimiter(refused, tmp_path):
    (tmp_path / "rows.csv").write_text("sep=:\nphrase:tone\na:joy\n", encoding="utf-8")
    assert "its first line says that the columns are separated by ':'. Save the file with commas," in refused(
        tmp_path / "rows.csv"
    )


def test_a_header_without_names(refused, tmp_path):
    (tmp_path / "rows.csv").write_text(",\na,joy\n", encoding="utf-8")
    assert "row 1: the header has no column name" in refused(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        (".csv", ",".join(map(str, range(5000))) + "\n" + ",".join(["x"] * 5000)),
        (".json", json.dumps([dict.fromkeys(map(str, range(5000)), "x")])),
        (".json", json.dumps({str(i): [{"a": 1}] for i in range(5000)})),
    ],
)
def test_errors_do_not_list_thousands_of_columns(refused, tmp_path, ending, content):
    (tmp_path / f"rows{ending}").write_text(content, encoding="utf-8")
    assert len(refused(tmp_path / f"rows{ending}")) < 500


def test_two_possible_delimiters_are_refused_with_both_readings(refused, build, tmp_path):
    """Where the columns needed are in one reading only, that one is taken."""
    source = tmp_path / "rows.csv"
    source.write_text("phrase,x;tone\n" + "a,b;c\nd,e;f\n" * 12, encoding="utf-8")
    message = refused(source)
    assert (
        f"{source}: the columns may be separated by commas (phrase / x;tone) or semicolons (phrase,x / tone)."
        in message
    )
    assert "Put text with the other character between double quotes, or save the file with tabs as .tsv." in message
    source.write_text("id;n,phrase,tone\n" + "".join(f"{i};{i},text {i},joy\n" for i in range(24)), encoding="utf-8")
    assert [row["answer"] for row in build(source, **WHOLE).train] == ["joy"] * 24


@pytest.mark.parametrize("ending", [".csv.gz", ".jsonl.gz", ".json.gz"])
def test_compressed_files(build, tmp_path, ending):
    plain = write_rows(tmp_path / f"rows{ending.removesuffix('.gz')}", make_rows(24))
    packed = tmp_path / f"packed{ending}"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    built, same = build(packed, **WHOLE), build(plain, name="plain", **WHOLE)
    assert (built.folder / "train.parquet").read_bytes() == (same.folder / "train.parquet").read_bytes()
    assert built.report["source"]["train"]["sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("around", [{}, {"version": "1", "about": {"rows": [1]}, "tags": ["a", "b"], "empty": []}])
def test_object_that_holds_the_rows_under_one_key(build, tmp_path, indent, around):
    source = tmp_path / "rows.json"
    source.write_text(json.dumps({**around, "data": make_rows(24), "more": 1}, indent=indent), encoding="utf-8")
    assert [row["answer"] for row in build(source, **WHOLE).train] == [row["tone"] for row in make_rows(24)]


def test_names_of_a_class_label_column(build, tmp_path):
    """The column holds numbers, the schema their names."""
    import datasets

    rows = [{"phrase": row["phrase"], "tone": TONES.index(row["tone"])} for row in make_rows(24)]
    features = datasets.Features({"phrase": datasets.Value("string"), "tone": datasets.ClassLabel(names=list(TONES))})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    assert [row["answer"] for row in build(tmp_path / "rows.parquet", **WHOLE).train] == [
        row["tone"] for row in make_rows(24)
    ]


@pytest.mark.parametrize(("times", "refused"), [(50, False), (400, True)])
def test_what_a_gz_file_unpacks_to_is_bounded(tmp_path, monkeypatch, times, refused):
    monkeypatch.setattr(rows, "SMALL", 1000)
    path = tmp_path / "rows.jsonl.gz"
    content = os.urandom(2000).hex().encode() + b" " * 4000 * times
    path.write_bytes(gzip.compress(content))
    assert len(content) / path.stat().st_size > 100 or not refused
    if refused:
        with pytest.raises(UserError, match="it unpacks to more than 100 times its size"):
            rows.decompressed(path, path.name, tmp_path)
    else:
        assert rows.decompressed(path, path.name, tmp_path).read_bytes() == content


def test_a_row_has_a_longest_line(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST_LINE", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x"}\n{"a": "' + "y" * 200 + '"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="row 2: 100 bytes or more"):
        list(rows.read_rows(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', "row 2: an object has the key `a` twice"),
        ('{"a": {"c": [{"b": 1, "b": 1}]}}\n', "row 1: an object has the key `b` twice"),
        ('{"a": 1}\n{"a": 1, "x": NaN}\n', "row 2: "),
        ('{"a": 1}\n{"a": 1, "x": -Infinity}\n', "row 2: "),
    ],
)
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_what_python_reads_and_json_does_not_mean_is_refused(tmp_path, content, reason, ending):
    """The last of two values would win in silence; NaN is a number here and an error there."""
    file = tmp_path / f"rows{ending}"
    file.write_text(content if ending == ".jsonl" else f"[{content.strip().replace(chr(10), ',')}]", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{file}: {reason}")):
        list(read_rows(file))


def test_two_lists_of_rows_under_one_key_are_refused(tmp_path):
    (tmp_path / "rows.json").write_text('{"data": [{"a": 1}],\n"data": [{"a": 2}]}', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.json: an object has the key `data` twice\. Keep one of them\."):
        list(read_rows(tmp_path / "rows.json"))


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_numbers_stay_as_they_are_written(tmp_path, ending):
    """As text, such as a label's: a float holds 17 digits, and these are more."""
    written = [
        "12345678901234567890.0",
        "0.12345678901234567890123",
        "0.1",
        "2.50",
        "1e999",
        "3",
        "123456789012345678901",
    ]
    lines = [f'{{"tone": {number}}}' for number in written]
    (tmp_path / f"rows{ending}").write_text("\n".join(lines) if ending == ".jsonl" else f"[{','.join(lines)}]")
    read = [row["tone"] for row in read_rows(tmp_path / f"rows{ending}")]
    assert [label_text(value) for value in read] == [*written[:3], "2.5", float("inf"), *written[5:]]
    assert json.loads(json.dumps(read[:3])) == [float(number) for number in written[:3]]
