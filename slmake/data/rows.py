"""Read rows from JSON, JSON Lines, CSV or Parquet as a stream, with memory that does not grow with the file.

JSON arrays are parsed by `ijson`, Parquet by `datasets`, lines and CSV by the standard library; docs/architecture.md says why
not all of them by `datasets`. Every error names the file and the row.
"""

import csv
import json
import mmap
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from slmake.errors import UserError

DEPTH = 100  # levels of arrays and objects in a row
TOO_DEEP = (
    f"more than {DEPTH} levels of arrays and objects in each other. A row is an object of texts: mend or remove it."
)
# Half of a surrogate pair written as an escape. What stands behind an escaped backslash is found too: it costs time only.
_half_pair = re.compile(
    rb"\\u[dD](?:[89a-bA-B]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89a-bA-B]..\\u[dD])[c-fC-F])", re.DOTALL
).search


def read_rows(path: Path) -> Iterator[dict]:
    """Rows of a dataset file as dicts, in order. A field that a row lacks is absent or None.

    Raises:
        UserError: no such file, unknown ending, empty, not UTF-8 or malformed; file and row are named.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file. Check prepare.source.")
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a dataset file. Check prepare.source.")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: empty file.")
    readers = {".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown ending `{path.suffix}`. Use {', '.join(readers)}.")
    with open(path, "rb") as handle:
        mark = handle.read(2)
    if mark in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: UTF-16 text (it begins with {mark.hex(' ').upper()}). Save the file as UTF-8.")
    yield from reader(path)


def _json(path: Path) -> Iterator[dict]:
    with open(path, "rb") as handle:
        start = handle.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start == b"[":
        yield from _json_array(path)
    elif start == b"{":
        yield from _json_lines(path)
    else:
        raise UserError(f"{path}: not JSON: expected an array of objects, or one object a line.")


def _json_array(path: Path) -> Iterator[dict]:
    import ijson
    import ijson.backends.python as strict

    done = 0
    try:
        with open(path, "rb") as handle:
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
                parser = strict if _half_pair(content) else ijson  # yajl makes a question mark of half a pair
            if handle.read(3) != b"\xef\xbb\xbf":
                handle.seek(0)
            for row in _items(parser.basic_parse(handle, use_float=True)):
                yield row
                done += 1
    except RecursionError:
        raise UserError(f"{path}: row {done + 1}: {TOO_DEEP}") from None
    except (ijson.JSONError, UnicodeDecodeError) as error:
        _check_utf8(path)
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path}: row {done + 1}: malformed JSON: {reason}.") from None


def _items(events: Iterable[tuple[str, object]]) -> Iterator[object]:
    """What an array holds, an item at a time, from ijson's events.

    Not `ijson.items`: it keeps the path to every level, so that its memory grows with the square of the depth.

    Raises:
        RecursionError: an item that is nested too deeply.
    """
    levels: list[tuple] = []  # the arrays and objects around, with the key of each in the one before it
    key = None
    for kind, value in events:
        if kind == "map_key":
            key = value
        elif kind in ("start_map", "start_array"):
            levels.append(({} if kind == "start_map" else [], key))
            if len(levels) > DEPTH + 1:
                raise RecursionError
        else:
            if kind in ("end_map", "end_array"):
                value, key = levels.pop()
            if len(levels) == 1:
                yield value
            elif levels:
                around = levels[-1][0]
                if isinstance(around, dict):
                    around[key] = value
                else:
                    around.append(value)


def _json_lines(path: Path) -> Iterator[dict]:
    # Not through `datasets`: its reader takes text that looks like a date for a date.
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            try:
                if line.strip():
                    value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    if not isinstance(value, dict):
                        raise UserError(f"{path}: row {number}: not an object but {type(value).__name__}.")
                    yield value
            except RecursionError:  # Python's limit, some 1000
                raise UserError(f"{path}: row {number}: {TOO_DEEP}") from None
            except UnicodeDecodeError as bad:
                raise UserError(
                    f"{path}: row {number}: not UTF-8 text (byte {bad.start} of the line). Save the file as UTF-8."
                ) from None
            except json.JSONDecodeError as bad:
                if number == 1 and _goes_on(line, next(filter(None, map(bytes.strip, handle)), b"")):
                    raise UserError(
                        f"{path}: one JSON object over several lines. An array [...] of objects is expected, or one object on "
                        "each line."
                    ) from None
                raise UserError(f"{path}: row {number}: malformed JSON: {bad.msg} (column {bad.colno}).") from None
            except ValueError:  # of int()
                raise UserError(
                    f"{path}: row {number}: a number with thousands of digits. Write it as text, or remove it."
                ) from None


def _goes_on(line: bytes, following: bytes) -> bool:
    """Whether a broken first line is the begin of an object that the next line goes on with."""
    opened = line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") and not line.rstrip().endswith(b"}")
    return opened and following != b"" and not following.startswith(b"{")


def _csv(path: Path) -> Iterator[dict]:
    # Not through `datasets`: pandas shifts the columns when every row has one value more than the header.
    _check_utf8(path)
    csv.field_size_limit(2**31 - 1)
    number = 0
    with open(path, encoding="utf-8-sig", newline="") as handle:
        reader = csv.reader(handle, strict=True)
        try:
            columns = next(reader, [])
            if len(set(columns)) != len(columns) or not all(columns):
                raise UserError(
                    f"{path}: row 1: the header has an empty or repeated column name: {', '.join(columns)}."
                )
            for values in filter(None, reader):
                number += 1
                if len(values) != len(columns):
                    raise UserError(
                        f"{path}: row {number} (line {reader.line_num}): {len(values)} values for {len(columns)} columns. "
                        "Put text with a comma between double quotes."
                    )
                yield dict(zip(columns, values, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}: malformed CSV: row {number + 1} (line {reader.line_num}): {error}") from None


def _parquet(path: Path) -> Iterator[dict]:
    import datasets

    datasets.disable_progress_bars()
    try:
        yield from datasets.load_dataset("parquet", data_files=str(path.resolve()), split="train", streaming=True)
    except Exception as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _check_utf8(path: Path) -> None:
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: line {number}: not UTF-8 text (byte {error.start} of the line: 0x{line[error.start]:02x}). Save the file as UTF-8."
                ) from None
