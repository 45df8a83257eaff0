"""Validated rows on disk while a dataset is prepared, so that memory does not grow with the text."""

import sqlite3
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from slmake.data.near_duplicates import normalized


class Row(NamedTuple):
    """One validated example."""

    file: str  # file it came from
    line: int  # its number there, from 1
    prompt: str  # what the model sees
    answer: str  # what the model shall say; of a conversation, the last of its answers
    text: str  # the values of the prompt's fields, without the template: what duplicates are judged by
    tail: str = ""  # the answer with what closes it: the tokens behind the prompt
    chat: str = ""  # a conversation as JSON, instead of prompt and tail
    answers: int = 1  # how many there are in the conversation
    before: int = 0  # rows in the files of its split that are read before its own

    @property
    def number(self) -> int:
        """Its number among all rows of its split's files, from 1."""
        return self.before + self.line


COLUMNS = ",".join(Row._fields)
MOST_ANSWERS = 1000  # different answers that may be labels
REPEATED = 5  # rows of a label, on average


class Store:
    """An SQLite file of rows, numbered from 0 in the order they were added.

    In memory per row: 8 bytes of hash and 4 bytes of answer code.
    """

    def __init__(self, path: Path, few_answers: int):
        self.path, self.few_answers = path, few_answers
        self.hashes, self.codes = array("Q"), array("i")
        self._answers: dict[str, int] | None = {}
        self._different: set[int] = set()  # hashes of answers, up to MOST_ANSWERS and one

    def __enter__(self) -> "Store":
        self.database = sqlite3.connect(self.path, isolation_level=None)
        self.database.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; BEGIN;"
            f"CREATE TABLE rows (number INTEGER PRIMARY KEY, {COLUMNS});"
        )
        return self

    def __exit__(self, *_) -> None:
        self.database.close()
        self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.hashes)

    def add(self, rows: Iterable[Row]) -> int:
        """Append rows; return how many."""
        before = len(self)
        rows = iter(rows)
        while batch := list(islice(rows, 4096)):
            start = len(self)
            self.database.executemany(
                f"INSERT INTO rows VALUES (?{',?' * len(Row._fields)})",
                ((start + i, *row) for i, row in enumerate(batch)),
            )
            self.hashes.extend(xxhash.xxh3_64_intdigest(normalized(row.text).encode()) for row in batch)
            if any(row.answers > 1 for row in batch):
                self._answers = None  # a conversation is no example of a class
            codes = [self._code(row.answer) for row in batch]  # may find that there are many answers
            if len(self._different) <= MOST_ANSWERS:
                self._different |= {xxhash.xxh3_64_intdigest(row.answer.encode()) for row in batch}
            if self._answers is None:
                self.codes = array("i", bytes(4 * (len(self.codes) + len(codes))))
            else:
                self.codes.extend(codes)
        return len(self) - before

    def _code(self, answer: str) -> int:
        """A small number for the answer, while there are few different ones; then 0 for all."""
        if self._answers is None:
            return 0
        code = self._answers.setdefault(answer, len(self._answers))
        if len(self._answers) > self.few_answers:
            self._answers = None
            return 0
        return code

    def forget_answers(self) -> None:
        """From now on the answers are no classes, as if there were many different ones."""
        self._answers, self.codes = None, array("i", bytes(4 * len(self.codes)))

    def repeated_answers(self) -> int | None:
        """How many different answers there are, if there are more than `few_answers` that repeat all the same; else None."""
        count = len(self._different)
        many = self.few_answers < count <= MOST_ANSWERS
        return count if many and self._answers is None and len(self) >= REPEATED * count else None

    def answers(self) -> list[str] | None:
        """The different answers by code, or None if there are more than `few_answers`."""
        return None if self._answers is None else list(self._answers)

    def answer_codes(self) -> np.ndarray:
        """int32 [rows]: each row's answer as a number (all 0 if there are many different ones)."""
        return np.frombuffer(self.codes, dtype=np.int32) if self.codes else np.zeros(0, np.int32)

    def row(self, number: int) -> Row:
        """The row of a number."""
        cursor = self.database.execute(f"SELECT {COLUMNS} FROM rows WHERE number=?", (int(number),))
        return Row(*cursor.fetchone())

    def batches(self, size: int = 4096) -> Iterator[tuple[np.ndarray, list[Row]]]:
        """All rows in order, `size` at a time, with their numbers."""
        for start in range(0, len(self), size):
            cursor = self.database.execute(
                f"SELECT {COLUMNS} FROM rows WHERE number>=? AND number<? ORDER BY number",
                (start, start + size),
            )
            rows = [Row(*values) for values in cursor]
            yield np.arange(start, start + len(rows)), rows

    def text_hashes(self) -> np.ndarray:
        """uint64 [rows]: equal for rows whose texts are exact copies."""
        return np.frombuffer(self.hashes, dtype=np.uint64) if self.hashes else np.zeros(0, np.uint64)

    def exact_duplicates(self, chosen: np.ndarray) -> int:
        """How many of the chosen rows (bool [rows]) repeat the text of another chosen row."""
        hashes = self.text_hashes()[chosen]
        return int(len(hashes) - len(np.unique(hashes)))
