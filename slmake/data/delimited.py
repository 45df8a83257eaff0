"""CSV and its kin: rows of columns with a header, whose delimiter is detected from the first rows, or named by Excel's line `sep=;`."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

from slmake.errors import UserError
from slmake.text import listing

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
LOOKED_AT = 100  # rows
LONGEST_LINE = 2**26  # bytes of a row or of a field
NAMED = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)


def read_delimited(
    path: Path, name: str, known: str | None, fields: Iterable[str], say: Callable[[str], None]
) -> Iterator[dict]:
    """Rows of a file that is valid UTF-8, without columns that have no name, such as pandas' index.

    Args:
        known: the delimiter, a tab in .tsv; detected where it is None.
        fields: columns that must be there, by which one of two possible delimiters is chosen.

    Raises:
        UserError: two delimiters are possible, or another than the known ones is named, a row does not fit the header, a quote is not closed, or one may be text.
    """
    # Not through `datasets`: pandas shifts the columns when every row has one value more than the header.
    csv.field_size_limit(LONGEST_LINE)
    named_first = _named(path, name)
    delimiter = named_first or known or _delimiter(path, name, set(fields))
    if delimiter not in (",", known):
        say(f"{name}: the columns are separated by {DELIMITERS[delimiter]}")
    number = 0
    quoted = cache(lambda: _quotes_needed(path, delimiter, len(columns)))
    with open(path, encoding="utf-8-sig", newline="") as handle:
        lines: list[str] = []  # of the row that is read
        kept = (lines.append(line) or line for line in handle)
        reader = csv.reader(kept, delimiter=delimiter, strict=True)
        try:
            columns = next(islice(reader, bool(named_first), None), [])
            named = list(filter(None, columns))
            if len(set(named)) != len(named) or not named:
                repeated = [column for column, count in Counter(named).items() if count > 1]
                raise UserError(
                    f"{name}: row 1: the header has {f'repeated column names: {listing(repeated)}' if named else 'no column name'}."
                )
            lines.clear()
            for values in reader:
                parts = [line for line in lines if line.strip()] if len(lines) > 1 else []
                lines.clear()
                if not values:
                    continue
                number += 1
                several = min(len(parts), len(columns)) > 1
                if several and _whole(parts, delimiter, len(columns)) and not quoted():
                    raise UserError(
                        f"{name}: row {number} (the lines up to {reader.line_num}): {len(parts)} lines with {len(columns)} columns each, or one "
                        "row: the first line opens a quote that the last one closes. If quotes are text there, write each as two and the "
                        "field between quotes; if not, save the rows as JSON Lines."
                    )
                if len(values) != len(columns):
                    raise UserError(
                        f"{name}: row {number} (line {reader.line_num}): {len(values)} values for {len(columns)} columns separated by "
                        f"{DELIMITERS[delimiter]}. Put text with such a character between double quotes."
                    )
                yield {column: value for column, value in zip(columns, values, strict=True) if column}
        except csv.Error as error:
            raise UserError(f"{name}: malformed CSV: row {number + 1} (line {reader.line_num}): {error}") from None


def _whole(lines: Iterable[str], delimiter: str, columns: int) -> bool:
    """Whether each line has the columns of a row where quotes are text."""
    return all(line.count(delimiter) == columns - 1 for line in lines)


def _quotes_needed(path: Path, delimiter: str, columns: int) -> bool:
    """Whether quotes enclose fields: the header has some, or a line of the file is no row without them. Not asked of tabs: texts have none."""
    if delimiter == "\t":
        return False
    with open(path, encoding="utf-8-sig", newline="") as handle:
        lines = (line for line in handle if line.strip() and not NAMED.fullmatch(line))
        return '"' in next(lines, "") or not _whole(lines, delimiter, columns)


def _named(path: Path, name: str) -> str | None:
    """The delimiter that a first line `sep=;` names, which Excel reads and does not show; None without such a line.

    Raises:
        UserError: it is none of DELIMITERS.
    """
    with open(path, encoding="utf-8-sig", newline="") as handle:
        line = NAMED.fullmatch(handle.readline(20))
    if line and line[1] not in DELIMITERS:
        raise UserError(
            f"{name}: its first line says that the columns are separated by {line[1]!r}. Save the file with {', '.join(DELIMITERS.values())} "
            "between them, and without this line."
        )
    return line and line[1]


def _delimiter(path: Path, name: str, fields: set[str]) -> str:
    """The delimiter by which the header and the first rows have the same number of columns, two at least.

    Raises:
        UserError: several do, and the columns needed do not decide.
    """
    headers, fits = {}, []
    for delimiter in DELIMITERS:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, delimiter=delimiter, strict=True)
            try:
                rows = list(islice(filter(None, reader), LOOKED_AT))
            except csv.Error:
                continue
        if rows and len(rows[0]) > 1:
            headers[delimiter] = rows[0]
            if all(len(row) == len(rows[0]) for row in rows):
                fits.append(delimiter)
    if len(fits) > 1:
        fits = [delimiter for delimiter in fits if fields and fields <= set(headers[delimiter])] or fits
    if len(fits) > 1:
        readings = " or ".join(f"{DELIMITERS[delimiter]} ({listing(headers[delimiter], ' / ')})" for delimiter in fits)
        raise UserError(
            f"{name}: the columns may be separated by {readings}. Put text with the other character between double quotes, or save the file "
            "with tabs as .tsv."
        )
    if fits:
        return fits[0]
    # No delimiter fits all rows: the error is that of the most likely one.
    return max(headers, key=lambda delimiter: (len(headers[delimiter]), delimiter == ","), default=",")
