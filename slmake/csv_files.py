"""CSV files that rules wrote: loss curves, and answers."""

import csv
from pathlib import Path

from slmake.errors import UserError
from slmake.text import csv_text


def read_csv(path: Path, numbers: tuple[str, ...]) -> list[dict]:
    """The lines of a CSV file that a rule wrote; the columns named in `numbers` as numbers.

    Raises:
        UserError: it is damaged: no header, a column that is missing, a cell that is no number.
    """
    with open(path, newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        try:
            lacking = [name for name in numbers if name not in (reader.fieldnames or [])]
            if lacking:
                raise ValueError(f"it has no column `{lacking[0]}`")
            rows = [
                {name: csv_text(cell) if isinstance(cell, str) else cell for name, cell in row.items()}
                for row in reader
            ]
            return [row | {name: float(row[name] or "") for name in numbers} for row in rows]
        except (ValueError, csv.Error) as error:
            raise UserError(
                f"{path}, line {max(1, reader.line_num)}, is damaged: {error}. Remove it and run snakemake: it is built again."
            ) from None
