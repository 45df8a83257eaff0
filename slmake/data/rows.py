"""Read rows from JSON, JSON Lines, CSV or Parquet as a stream, with memory that does not grow with the file.

JSON arrays are parsed by `ijson`, Parquet by pyarrow, lines and CSV by the standard library; docs/architecture.md says why
not all of them by `datasets`. Every error names the file and the row.
"""

import codecs
import contextlib
import gzip
import hashlib
import json
import math
import mmap
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path

from slmake.data import json_values
from slmake.data.delimited import LONGEST_LINE, read_delimited
from slmake.data.parquet import MOST_UNPACKED, SMALL, read_parquet
from slmake.errors import UserError
from slmake.text import listing

PIECE = 2**20  # bytes that are decoded at a time
DEPTH = 100  # levels of arrays and objects in a row
TOO_DEEP = (
    f"more than {DEPTH} levels of arrays and objects in each other. A row is an object of texts: correct or remove it."
)
# Half of a surrogate pair written as an escape. What stands behind an escaped backslash matches too: it costs time only.
_half_pair = re.compile(
    rb"\\u[dD](?:[89a-bA-B]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89a-bA-B]..\\u[dD])[c-fC-F])", re.DOTALL
).search
TOO_LONG_NUMBER = "a number with thousands of digits. Write it as text, or remove it."
BYTE_ORDER_MARKS = {  # UTF-32's first: UTF-16's are their beginning
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def read_rows(
    path: Path,
    name: str | None = None,
    fields: Iterable[str] = (),
    say: Callable[[str], None] = lambda line: None,
    delimiter: str | None = None,
) -> Iterator[dict]:
    """Rows of a dataset file as dicts, in order. A field that a row lacks is absent or None.

    Args:
        name: the file's name in errors, if that is another; its ending says how it is read.
        fields: columns that are needed, which helps to find the delimiter of a CSV file.
        say: takes one line for the user, where something about the file was detected.
        delimiter: of a CSV file, if it is known.

    Raises:
        UserError: no such file, unknown ending, empty, not UTF-8 or malformed; file and row are named.
    """
    name = name or str(path)
    if not path.exists():
        raise UserError(f"{name}: no such file. Check prepare.source.")
    if path.is_dir():
        raise UserError(f"{name}: a folder, not a dataset file. Check prepare.source.")
    if path.stat().st_size == 0:
        raise UserError(f"{name}: empty file.")
    ending = Path(name.removesuffix(".gz")).suffix.lower()
    readers = {".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": read_parquet}
    if ending in (".xlsx", ".xls", ".xlsm", ".ods"):
        raise UserError(
            f"{name}: a spreadsheet. Save the sheet with the rows as CSV (in Excel: File, Save As, CSV UTF-8), and name that file."
        )
    if ending not in (*readers, ".csv", ".tsv"):
        raise UserError(
            f"{name}: unknown ending `{ending}`. Use {', '.join([*readers, '.csv', '.tsv'])}, or one of them with .gz."
        )
    if ending != ".parquet":
        _refuse_wide_text(path, name)
    if ending in readers:
        yield from readers[ending](path, name)
    else:
        _check_utf8(path, name, LONGEST_LINE)
        yield from read_delimited(path, name, delimiter or ("\t" if ending == ".tsv" else None), fields, say)


def decompressed(path: Path, name: str, folder: Path) -> Path:
    """A `.gz` file's content as a file in `folder`; another file as it is.

    Raises:
        UserError: it is damaged.
    """
    if not name.endswith(".gz"):
        return path
    target = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.content"
    try:
        most, written = max(SMALL, MOST_UNPACKED * path.stat().st_size), 0
        with gzip.open(path) as packed, open(target, "wb") as out:
            while block := packed.read(2**20):
                written += out.write(block)
                if written > most:
                    raise UserError(
                        f"{name}: it unpacks to more than {MOST_UNPACKED} times its size, which no dataset does. Unpack it where you trust it."
                    )
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name}: not a readable gzip file: {error}. Download or compress it again.") from None
    return target


def _refuse_wide_text(path: Path, name: str) -> None:
    with open(path, "rb") as handle:
        start = handle.read(4)
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            raise UserError(
                f"{name}: {encoding} text (it begins with {mark.hex(' ').upper()}). Save the file as UTF-8."
            )


def _json(path: Path, name: str) -> Iterator[dict]:
    with open(path, "rb") as handle:
        start = handle.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        handle.seek(0)
        lines = start == b"{" and _is_lines(handle)
    if start == b"[":
        yield from _json_items(path, name, "")
    elif lines:
        yield from _json_lines(path, name)
    elif start == b"{":
        yield from _json_items(path, name, _rows_key(path, name))
    else:
        raise UserError(f"{name}: not JSON: expected an array of objects, or one object a line.")


def _is_lines(handle) -> bool:
    """Whether a file that begins with an object has one on each line; a single object that holds no rows counts, too."""
    line = next(
        (line for line in iter(lambda: handle.readline(LONGEST_LINE), b"") if line.strip(b"\xef\xbb\xbf \t\r\n")), b""
    )
    following = next((more for more in iter(lambda: handle.readline(LONGEST_LINE), b"") if more.strip()), b"").strip()
    if following:
        return not _continues(line, following)
    try:
        only = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return True  # its error is that of a line
    return not any(_holds_rows(value) for value in only.values())


def _holds_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _rows_key(path: Path, name: str) -> str:
    """The one key of an object's whose value is an array of objects.

    Raises:
        UserError: none, or several.
    """
    keys, seen, depth, key, opened = [], set(), 0, "", ""
    try:
        for kind, value in _events(path):
            depth -= kind.startswith("end_")
            if depth == 1:
                if kind == "map_key":
                    if value in seen:
                        raise UserError(f"{name}: {json_values.twice(value)}.")
                    seen.add(value)
                    key = value
                opened = key if kind == "start_array" else ""
            elif depth == 2 and kind == "start_map" and opened and opened not in keys:
                keys.append(opened)
            depth += kind.startswith("start_")
    except ValueError as error:
        raise _malformed(path, name, 1, error) from None
    if len(keys) == 1:
        return keys[0]
    if keys:
        raise UserError(
            f"{name}: the object holds rows under {listing(keys, ' and ')}. Save each list as a file of its own."
        )
    raise UserError(
        f"{name}: one JSON object over several lines. An array [...] of objects is expected, one object with such an array under one key, "
        "or one object on each line."
    )


def _events(path: Path, exact: bool = False) -> Iterator[tuple[str, object]]:
    """ijson's events of a file, from its beginning; ValueError where it is malformed.

    Args:
        exact: all events before an error are given, slowly; else the last ones may be missing.
    """
    import ijson
    import ijson.backends.python as strict

    with open(path, "rb") as handle:
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
            parser = strict if exact or _half_pair(content) else ijson  # yajl makes a question mark of half a pair
        if handle.read(3) != b"\xef\xbb\xbf":
            handle.seek(0)
        try:
            yield from parser.basic_parse(handle)
        except (ijson.JSONError, ArithmeticError) as error:  # an exponent that even a Decimal does not hold
            raise ValueError(str(error)) from None


def _below(events: Iterable[tuple[str, object]], key: str) -> Iterator[tuple[str, object]]:
    """The events of the value under a key of the outermost object."""
    depth, inside = 0, False
    for kind, value in events:
        depth -= kind.startswith("end_")
        if kind == "map_key" and depth == 1:
            inside = value == key
        elif inside and depth >= 1:
            yield kind, value
        depth += kind.startswith("start_")


def _json_items(path: Path, name: str, key: str) -> Iterator[dict]:
    """The items of an array: the file's own, or the one under `key` of the file's object."""
    done = 0
    try:
        for row in _items(_below(_events(path), key) if key else _events(path)):
            yield row
            done += 1
    except RecursionError:
        raise UserError(f"{name}: row {done + 1}: {TOO_DEEP}") from None
    except ValueError as error:
        if str(error).startswith("Exceeds the limit"):  # of int(), which takes the events before it with it
            with contextlib.suppress(ValueError):
                events = _events(path, exact=True)
                done = 0
                for _ in _items(_below(events, key) if key else events):
                    done += 1
            raise UserError(f"{name}: row {done + 1}: {TOO_LONG_NUMBER}") from None
        raise _malformed(path, name, done + 1, error) from None


def _malformed(path: Path, name: str, row: int, error: ValueError) -> UserError:
    _check_utf8(path, name)
    if isinstance(error, json_values.Refused):
        return UserError(f"{name}: row {row}: {error}.")
    return UserError(f"{name}: row {row}: malformed JSON: {str(error).splitlines()[0][:200].rstrip('.')}.")


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
            elif type(value) is Decimal:
                value = json_values.number(str(value))
            if len(levels) == 1:
                yield value
            elif levels:
                around = levels[-1][0]
                if isinstance(around, dict):
                    if key in around:
                        raise json_values.twice(key)
                    around[key] = value
                else:
                    around.append(value)


def _json_lines(path: Path, name: str) -> Iterator[dict]:
    # Not through `datasets`: its reader takes text that looks like a date for a date.
    with open(path, "rb") as handle:
        for number, line in enumerate(iter(lambda: handle.readline(LONGEST_LINE), b""), 1):
            try:
                if len(line) == LONGEST_LINE:
                    raise UserError(f"{name}: row {number}: {LONGEST_LINE:,} bytes or more. Shorten or remove it.")
                if line.strip():
                    value = json_values.read_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    if not isinstance(value, dict):
                        raise UserError(f"{name}: row {number}: not an object but {type(value).__name__}.")
                    yield value
            except RecursionError:  # Python's limit, some 1000
                raise UserError(f"{name}: row {number}: {TOO_DEEP}") from None
            except UnicodeDecodeError as bad:
                raise UserError(
                    f"{name}: row {number}: not UTF-8 text (byte {bad.start} of the line). Save the file as UTF-8."
                ) from None
            except json.JSONDecodeError as bad:
                if number == 1 and _continues(line, next(filter(None, map(bytes.strip, handle)), b"")):
                    raise UserError(
                        f"{name}: one JSON object over several lines. An array [...] of objects is expected (in a .json file), or one "
                        "object on each line."
                    ) from None
                raise UserError(f"{name}: row {number}: malformed JSON: {bad.msg} (column {bad.colno}).") from None
            except json_values.Refused as bad:
                raise UserError(f"{name}: row {number}: {bad}.") from None
            except ValueError:  # of int()
                raise UserError(f"{name}: row {number}: {TOO_LONG_NUMBER}") from None


def _continues(line: bytes, following: bytes) -> bool:
    """Whether a first line is the beginning of an object that the next line continues."""
    opened = line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") and not line.rstrip().endswith(b"}")
    return opened and following != b"" and not following.startswith(b"{")


def _check_utf8(path: Path, name: str, longest: float = math.inf) -> None:
    """Raise UserError if a file is not UTF-8 text, or has a line of more than `longest` bytes; a piece at a time is read."""
    decoder, line, begin, end = (
        codecs.getincrementaldecoder("utf-8")(),
        1,
        0,
        0,
    )  # of the line: number, and offset; offset of the piece
    with open(path, "rb") as handle:
        while True:
            piece = handle.read(PIECE)
            kept = decoder.getstate()[0]
            text = kept + piece
            try:
                decoder.decode(piece, final=not piece)
                bad = None
            except UnicodeDecodeError as error:
                bad = error.start
            lines = text[:bad].count(b"\n", len(kept))
            if lines:
                line, begin = line + lines, end - len(kept) + text.rindex(b"\n", 0, bad) + 1
            if bad is not None:
                at = end - len(kept) + bad
                raise UserError(
                    f"{name}: line {line}: not UTF-8 text (byte {at - begin} of the line: 0x{text[bad]:02x}). Save the file as UTF-8."
                )
            end += len(piece)
            if end - begin > longest:
                raise UserError(f"{name}: line {line}: more than {longest:,} bytes. Shorten or remove it.")
            if not piece:
                return
