"""Rows of Arrow tables and of Parquet files, as a stream: no media is decoded, and what comes out of a file is bounded."""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from slmake.errors import UserError
from slmake.sources.base import MOST_UNPACKED, SMALL

SINGLE = ("float32", "float16")
BATCH = 100  # rows in memory at a time, at most: a row group may be the whole file


def read_parquet(path: Path, name: str) -> Iterator[dict]:
    """Rows of a file, as `rows_of` gives them; columns of types that `datasets` does not know (maps, UUIDs) as pyarrow does.

    Raises:
        UserError: it is damaged, or becomes much larger than it is, as where millions of rows repeat one value.
    """
    import datasets
    import pyarrow.parquet

    unpacked, most = 0, max(SMALL, MOST_UNPACKED * path.stat().st_size)
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            features, others = _known(file.schema_arrow)
            sizes = [_size(file.metadata.row_group(i)) for i in range(file.num_row_groups)]
            unpacked, batch = sum(sizes), most // max([1, *sizes])
            for part in file.iter_batches(max(1, min(batch, BATCH))) if unpacked <= most else ():
                table = pyarrow.Table.from_batches([part])
                rest = table.select(others)
                table = datasets.table.table_cast(table.drop_columns(others), features.arrow_schema)
                unpacked += table.nbytes + rest.nbytes
                if unpacked > most:
                    break
                # A table without columns gives no rows: one of the two may be shorter.
                for row, other in zip_longest(rows_of([table], features), rest.to_pylist(), fillvalue={}):
                    yield row | {key: without_none(value) for key, value in other.items()}
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: not a readable Parquet file: {reason}. Download or write it again.") from None
    if unpacked > most:
        raise UserError(
            f"{name}: it unpacks to more than {MOST_UNPACKED} times its size, which no dataset does. Write it as JSON Lines where you trust it."
        )


def _known(schema: Any) -> tuple[Any, list[str]]:
    """What `datasets` calls the columns of an Arrow schema, and the names of those whose types it does not know."""
    import datasets
    import pyarrow

    def named(columns: Iterable[Any]) -> Any:
        return datasets.Features.from_arrow_schema(pyarrow.schema(columns, schema.metadata))

    others = []
    try:
        return named(schema), others
    except ValueError:
        pass
    for column in schema:
        try:
            named([column])
        except ValueError:
            others.append(column.name)
    return named(column for column in schema if column.name not in others), others


def _size(group: Any) -> int:
    """What a row group holds, in bytes, before repeated values are written out: one for each value at least."""
    return max(group.total_byte_size, sum(group.column(i).num_values for i in range(group.num_columns)))


def rows_of(tables: Iterable[Any], features: Any) -> Iterator[dict]:
    """Rows of Arrow tables, in order, with names in place of the numbers of a ClassLabel.

    Images, audio and other media stay what the table holds, bytes or a name: to decode one opens whatever file or address a row names.

    Args:
        features: the tables' columns, a `datasets.Features`.
    """
    import datasets

    written = {key: kind for key, kind in features.items() if _is_rewritten(kind)}
    texts = datasets.Features({key: _without_media(kind) for key, kind in features.copy().items()})
    for table in tables:
        for row in map(texts.decode_example, table.to_pylist()):
            for key, kind in written.items():
                row[key] = _rewritten(row[key], kind)
            yield {key: without_none(value) for key, value in row.items()}


def _parts(kind: Any) -> Iterable[Any]:
    """The columns that an object's or a list's column is made of."""
    if isinstance(kind, dict | list):
        return kind.values() if isinstance(kind, dict) else kind
    return [kind.feature] if hasattr(kind, "feature") else []


def _is_rewritten(kind: Any) -> bool:
    """Whether a column holds labels, or numbers of single or half precision."""
    named = hasattr(kind, "int2str") or getattr(kind, "dtype", None) in SINGLE
    return named or any(map(_is_rewritten, _parts(kind)))


def _rewritten(value: Any, kind: Any) -> Any:
    """A value with names in place of a ClassLabel's numbers, and with numbers written as short as their precision allows: a float32 of
    0.1 is no 0.10000000149011612."""
    inner = getattr(kind, "feature", kind)  # datasets' Sequence of an object
    if isinstance(value, dict) and isinstance(inner, dict):
        return {key: _rewritten(part, inner[key]) for key, part in value.items()}
    if isinstance(value, list):
        # An array of two dimensions is its own column.
        inner = kind if isinstance(kind, dict) else next(iter(_parts(kind)), kind)
        return [_rewritten(part, inner) for part in value]
    if isinstance(value, int) and hasattr(kind, "int2str"):
        return kind.int2str(value) if value >= 0 else None  # -1 is no label
    if isinstance(value, float) and getattr(kind, "dtype", None) in SINGLE:
        return float(str(getattr(np, kind.dtype)(value)))
    return value


def _without_media(kind: Any) -> Any:
    """What a column holds, with all decoding switched off but that of JSON in texts."""
    import datasets

    for inner in kind.values() if isinstance(kind, dict) else kind if isinstance(kind, list) else ():
        _without_media(inner)
    if hasattr(kind, "feature"):  # of a list
        _without_media(kind.feature)
    if hasattr(kind, "decode") and not isinstance(kind, datasets.Json):
        kind.decode = False
    return kind


def without_none(value: object) -> object:
    """A value without the keys that Arrow gives an object for others in its column: they are None."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value
