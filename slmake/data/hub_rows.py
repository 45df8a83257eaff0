"""Rows of a dataset in the hub's layout. The library `datasets` says which files make up a split, and runs no code of a dataset.

It reads the files itself unless they are text with types to guess: CSV, TSV, JSON and JSON Lines are read as local files are,
so that their values stay as they are written.
"""

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from slmake import params
from slmake.data.delimited import DELIMITERS
from slmake.data.parquet import BATCH, rows_of
from slmake.data.rows import decompressed, read_rows
from slmake.errors import UserError
from slmake.params.dataset_files import hub_split
from slmake.text import listing

# Options of a card that change nothing here: of speed, of what is guessed, and of texts that the readers refuse if they are not UTF-8.
WITHOUT_EFFECT = {
    *("name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"),
    *("chunksize", "block_size", "use_threads", "engine", "memory_map", "verbose", "encoding", "encoding_errors"),
    *("keep_default_na", "na_filter", "float_precision", "on_mixed_types", "parse_agent_traces"),
}


def read_hub_rows(
    folder: Path,
    name: str,
    section: params.Prepare,
    split: str,
    scratch: Path,
    fields: Iterable[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[dict]:
    """The rows that `prepare.config`, `split` and `where` choose, in order, with names in place of the numbers of a ClassLabel.

    Args:
        folder: the snapshot of the dataset.
        name: the dataset's, for errors.
        split: train, eval or test.
        scratch: a folder for the library's files.
        fields: columns that are needed, and `say`: see `read_rows`.

    Raises:
        UserError: no such configuration, split or column, no row with these values, or a file that cannot be read.
    """
    wanted = hub_split(section, split)
    try:
        rows = _of_split(folder, name, section.config, wanted, scratch, (tuple(fields), say))
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).replace(str(folder), name)
        raise UserError(
            f"{name}: config {section.config or 'none'}, split {wanted} cannot be read: {reason[:400]}"
        ) from None
    columns: dict[str, None] = {}
    chosen = False
    for row in rows:
        found = row if isinstance(row, dict) else {}
        if all(_equal(found.get(column), value) for column, value in section.where.items()):
            chosen = True
            yield row
        elif not chosen:
            columns.update(dict.fromkeys(found))
    if section.where and not chosen:
        for column in section.where:
            if column not in columns:
                near = difflib.get_close_matches(column, columns, n=1)
                hint = f" Did you mean `{near[0]}`?" if near else f" Columns: {listing(columns)}."
                raise UserError(f"prepare.where: {name} has no column `{column}`.{hint}")
        values = ", ".join(f"{column} {value!r}" for column, value in section.where.items())
        raise UserError(f"prepare.where: no row of {name} ({wanted}) has {values}.")


def _of_split(folder: Path, name: str, config: str | None, wanted: str, scratch: Path, how: tuple) -> Iterator[dict]:
    """The rows of a split or slice, read as its files' form asks for."""
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig

    datasets.disable_progress_bars()
    builder = datasets.load_dataset_builder(str(folder), config, cache_dir=str(scratch))
    if isinstance(builder.config, CsvConfig | JsonConfig):
        return _as_written(builder, folder, name, wanted, scratch, how)
    builder.download_and_prepare()
    table = builder.as_dataset(split=wanted)
    return rows_of(table.with_format("arrow").iter(BATCH), table.features)


def _as_written(builder: Any, folder: Path, name: str, wanted: str, scratch: Path, how: tuple) -> Iterator[dict]:
    """The rows of a split of text files, through the readers of local files.

    A slice needs the number of a split's rows, so that its files are read once before.
    """
    import datasets

    config, files = builder.config, builder.config.data_files
    delimiter = _delimiter(config, name)
    kinds = {key: kind for key, kind in (builder.info.features or {}).items() if isinstance(kind, datasets.ClassLabel)}

    def rows(split: str) -> Iterator[dict]:
        for file in files[split]:
            inside = os.path.relpath(file, folder)
            if inside.startswith(os.pardir):
                raise UserError(f"{name}: its card names {file}, which is no file of the dataset.")
            path = decompressed(Path(file), f"{name}/{inside}", scratch)
            for number, row in enumerate(read_rows(path, f"{name}/{inside}", *how, delimiter), 1):
                yield (
                    _with_names(row, kinds, f"{name}/{inside}: row {number}")
                    if kinds and isinstance(row, dict)
                    else row
                )

    wanted = "+".join(map(str, files)) if wanted == "all" else wanted
    named = {part.partition("[")[0].strip() for part in wanted.split("+")} if "[" in wanted else ()
    lengths = {split: sum(1 for _ in rows(split)) if split in named else sys.maxsize for split in files}
    slices = datasets.ReadInstruction.from_spec(wanted).to_absolute(lengths)
    return (row for part in slices for row in islice(rows(part.splitname), part.from_, part.to))


def _delimiter(config: Any, name: str) -> str | None:
    """What the dataset's card says is between the columns; None where it says nothing else than commas, which is its default, too.

    Raises:
        UserError: the card wants the files read in a way that is not known here.
    """
    usual = type(config)()
    others = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in WITHOUT_EFFECT and getattr(config, field.name) != getattr(usual, field.name)
    }
    delimiter = getattr(config, "sep", ",")
    if delimiter not in DELIMITERS:
        others["sep"] = delimiter
    if others:
        options = listing([f"{key}: {value!r}" for key, value in others.items()])
        raise UserError(
            f"{name}: its card has the files read with {options}, which is not known here. Name a file that needs none of this, as "
            f"{name}/FILE, or save the rows as JSON Lines or Parquet."
        )
    return None if delimiter == "," else delimiter


def _with_names(row: dict, kinds: dict[str, Any], where: str) -> dict:
    """A row with names in place of the numbers that its card gives to them; -1 is no label."""
    for key, kind in kinds.items():
        value = row.get(key)
        try:
            number = kind.str2int(value) if isinstance(value, str) and value else value
            row[key] = kind.int2str(number) if isinstance(number, int) and number >= 0 else None
        except ValueError as error:
            raise UserError(f"{where}: `{key}` is none of the names in the dataset's card: {error}.") from None
    return row


def _equal(found: object, value: object) -> bool:
    """Whether a row's value is that of `prepare.where`: in CSV, numbers and truth values are text."""
    if isinstance(found, str) and not isinstance(value, str):
        try:
            return json.loads(found.lower()) == value
        except (ValueError, RecursionError):
            return False
    return found == value
