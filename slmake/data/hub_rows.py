"""Rows of a dataset in the hub's layout, through the library `datasets`, which runs no code of a dataset."""

import difflib
from collections.abc import Iterator
from pathlib import Path

from slmake import params
from slmake.data.parquet import BATCH, rows_of
from slmake.errors import UserError
from slmake.params.dataset_files import hub_split
from slmake.text import listing


def read_hub_rows(folder: Path, name: str, section: params.Prepare, split: str, scratch: Path) -> Iterator[dict]:
    """The rows that `prepare.config`, `split` and `where` choose, in order, with names in place of the numbers of a ClassLabel.

    Args:
        folder: the snapshot of the dataset.
        name: the dataset's, for errors.
        split: train, eval or test.
        scratch: a folder for the library's files.

    Raises:
        UserError: no such configuration, split or column, or no row with these values.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(
            str(folder), section.config, split=hub_split(section, split), cache_dir=str(scratch)
        )
    except Exception as error:
        reason = " ".join(str(error).split()).replace(str(folder), name)
        raise UserError(
            f"{name}: config {section.config or 'none'}, split {hub_split(section, split)} cannot be read: {reason[:400]}"
        ) from None
    for column in section.where:
        if column not in table.column_names:
            near = difflib.get_close_matches(column, table.column_names, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else f" Columns: {listing(table.column_names)}."
            raise UserError(f"prepare.where: {name} has no column `{column}`.{hint}")
    chosen = False
    for row in rows_of(table.with_format("arrow").iter(BATCH), table.features):
        if all(row[column] == value for column, value in section.where.items()):
            chosen = True
            yield row
    if section.where and not chosen:
        wanted = ", ".join(f"{column} {value!r}" for column, value in section.where.items())
        raise UserError(f"prepare.where: no row of {name} ({hub_split(section, split)}) has {wanted}.")
