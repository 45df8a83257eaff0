"""Text of a dataset where it could be taken for something else: in figures and pages, in Markdown, in a spreadsheet, as JSON."""

import json
import re
from collections.abc import Iterable, Sequence

# Control characters as Unicode's symbols for them; what XML and HTML cannot hold, and what turns the order of letters, as U+FFFD.
_SYMBOLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_SYMBOLS |= dict.fromkeys([0x2028, 0x2029], 0x2424)
_SYMBOLS |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], 0xFFFD)
_SYMBOLS |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
# What spreadsheets take for the beginning of a formula (https://owasp.org/www-community/attacks/CSV_Injection).
_FORMULA = re.compile(r"'*[=+\-@\t\r＝＋－＠]")


def printable(text: str) -> str:
    """The text with symbols in place of control characters, but for tabs and line breaks."""
    return text.translate(_SYMBOLS)


def one_line(text: str, longest: int | None = None) -> str:
    """The printable text on one line, cut to a number of characters."""
    line = " ".join(printable(text).split())
    return line if longest is None or len(line) <= longest else f"{line[: longest - 1]}…"


def listing(names: Iterable[str], separator: str = ", ") -> str:
    """Names for a message, each cut to 60 characters: the first ten, and how many more there are. A file may have any number of columns."""
    names = list(names)
    more = [f"{len(names) - 10:,} more"] if len(names) > 10 else []
    return separator.join([*(one_line(name, 60) for name in names[:10]), *more])


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown(text: str) -> str:
    """The text as Markdown that shows it, on one line, also in a table's cell."""
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", one_line(text))


def code_span(text: str) -> str:
    """The text as a code span of Markdown, on one line, also in a table's cell."""
    line = one_line(text).replace("|", r"\|")
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def csv_cell(value: object) -> object:
    """A cell for a CSV file that spreadsheets show as text, never run as a formula; `csv_text` undoes it."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def csv_text(cell: str) -> str:
    """The text that `csv_cell` made a cell from."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def parse_json(text: str) -> object:
    """A JSON document (RFC 8259): unlike Python's own reader, without NaN and Infinity.

    Raises:
        ValueError: it is none.
        RecursionError: it is nested too deeply.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)
