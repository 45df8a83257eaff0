"""Parquet files of sequences: one row each, or several rows behind each other (strategies join and packing)."""

from collections import Counter
from pathlib import Path

from slmake import params
from slmake.data.tokenize import IGNORED, Example


class Writer:
    """One split's Parquet file, written a batch at a time.

    The columns `turns`, `dropped_turns` and `tools` (as JSON) are those of conversations. `rows`, `row_answers`, `row_lengths` and `cut_tokens`, of a file
    whose sequences hold several rows, have the number of each, its last answer, its tokens and those that its prompt lost; the schema's
    metadata name the strategy, since rows of `packing` do not attend to each other and those of `join` do.
    """

    def __init__(self, path: Path, section: params.Prepare, pad_id: int, strategy: str, chats: bool):
        import pyarrow
        import pyarrow.parquet

        self.arrow, self.section, self.pad_id, self.strategy = pyarrow, section, pad_id, strategy
        ids = pyarrow.list_(pyarrow.int32())
        fields = [
            ("row", pyarrow.int64()),
            ("prompt", pyarrow.string()),
            ("answer", pyarrow.string()),
            ("input_ids", ids),
            ("labels", ids),
        ]
        if section.use_attention_mask:
            fields.append(("attention_mask", pyarrow.list_(pyarrow.int8())))
        if chats:
            fields += [("turns", ids), ("dropped_turns", pyarrow.int32()), ("tools", pyarrow.string())]
        several = strategy != "line-by-line"
        if several:
            fields += [("rows", pyarrow.list_(pyarrow.int64())), ("row_answers", pyarrow.list_(pyarrow.string()))]
            fields += [("row_lengths", ids), ("cut_tokens", ids)]
        self.schema = pyarrow.schema(fields, metadata={"strategy": strategy} if several else None)
        self.file = pyarrow.parquet.ParquetWriter(path, self.schema)
        self.open: list[list[Example]] = []  # the sequences being filled
        self.lengths: Counter = Counter()
        self.tokens = self.answer_tokens = 0

    def write(self, examples: list[Example]) -> None:
        if self.strategy == "line-by-line":
            self._flush([[example] for example in examples])
        elif self.strategy == "join":
            self._flush(self._join(examples))
        else:
            self._flush(self._pack(examples))

    def _join(self, examples: list[Example]) -> list[list[Example]]:
        """The sequences that are full, each of examples in their order."""
        full = []
        for example in examples:
            if not self.open:
                self.open = [[example]]
            elif _length(self.open[0]) + len(example.ids) <= self.section.max_seq_len:
                self.open[0].append(example)
            else:
                full.append(self.open[0])
                self.open = [[example]]
        return full

    def _pack(self, examples: list[Example]) -> list[list[Example]]:
        """The sequences that are full: the longest examples first, each into the fullest sequence that has room (best fit decreasing)."""
        limit = self.section.max_seq_len
        by_room: dict[int, list[list[Example]]] = {}
        for sequence in self.open:
            by_room.setdefault(limit - _length(sequence), []).append(sequence)
        for example in sorted(examples, key=lambda example: -len(example.ids)):
            size = len(example.ids)
            room = min((room for room in by_room if room >= size), default=None)
            sequence = by_room[room].pop() if room is not None else []
            if room is not None and not by_room[room]:
                del by_room[room]
            sequence.append(example)
            by_room.setdefault((limit if room is None else room) - size, []).append(sequence)
        # A sequence that no short row fits into is full; the others wait for the next rows.
        shortest = min((len(example.ids) for example in examples), default=0)
        self.open = [sequence for room in sorted(by_room) if room >= shortest for sequence in by_room[room]]
        return [sequence for room in sorted(by_room) if room < shortest for sequence in by_room[room]]

    def _flush(self, sequences: list[list[Example]]) -> None:
        if not sequences:
            return
        columns: dict[str, list] = {name: [] for name in self.schema.names}
        for sequence in sequences:
            last = sequence[-1]
            ids = [token for example in sequence for token in example.ids]
            labels = [label for example in sequence for label in example.labels]
            self.lengths[len(ids)] += 1
            self.tokens += len(ids)
            self.answer_tokens += sum(label != IGNORED for label in labels)
            padding = self.section.max_seq_len - len(ids) if self.section.pad_to_max_len else 0
            values = {
                "row": sequence[0].row,
                "prompt": "".join(example.prompt + example.answer for example in sequence[:-1]) + last.prompt,
                "answer": last.answer,
                "input_ids": ids + [self.pad_id] * padding,
                "labels": labels + [IGNORED] * padding,
                "attention_mask": [1] * len(ids) + [0] * padding,
                "turns": last.turns,
                "dropped_turns": sum(example.dropped for example in sequence),
                "tools": last.tools,
                "rows": [example.row for example in sequence],
                "row_answers": [example.answer for example in sequence],
                "row_lengths": [len(example.ids) for example in sequence],
                "cut_tokens": [example.cut for example in sequence],
            }
            for name, column in columns.items():
                column.append(values[name])
        self.file.write_table(self.arrow.table(columns, schema=self.schema))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, error, *_) -> None:
        try:
            if error is None:
                self._flush(self.open)
            self.file.close()
        except OSError:
            if error is None:
                raise
        finally:
            self.file.is_open = False  # or it would try again, and fail aloud, when it is deleted


def _length(sequence: list[Example]) -> int:
    return sum(len(example.ids) for example in sequence)
