"""A row as the model sees it: its text token by token, which tokens are trained, and what was cut."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from slmake.data.splits import SPLITS
from slmake.data.tokenize import IGNORED
from slmake.prompts import load_prompt
from slmake.text import printable

SHOWN = 2000  # tokens of a row in the report


class Piece(NamedTuple):
    """Some tokens that are one text."""

    text: str
    ids: list[int]
    trained: bool
    special: bool


class Sequence(NamedTuple):
    """One row's tokens in a split."""

    split: str
    row: int
    ids: list[int]
    labels: list[int]
    turns: list[int]  # numbers of a conversation's trained turns
    dropped: int  # turns at a conversation's beginning that are left out
    cut: int  # tokens at the prompts' start that are left out

    def summary(self) -> str:
        """Row, split and counts in one line."""
        trained = sum(label != IGNORED for label in self.labels)
        parts = [f"row {self.row}", self.split, f"{len(self.ids)} tokens, {trained} of them trained"]
        if self.turns:
            parts.insert(2, f"turn{'s' * (len(self.turns) > 1)} {', '.join(map(str, self.turns))}")
        if self.dropped:
            parts.append(f"{self.dropped} earliest turns dropped")
        if self.cut:
            parts.append(f"{self.cut} tokens of the prompt cut off")
        return " · ".join(parts)


def pieces(tokenizer, ids: list[int], labels: list[int]) -> Iterator[Piece]:
    """The text of each token; tokens that are a character together stand together."""
    from tokenizers.decoders import DecodeStream

    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    stream, waiting = DecodeStream(skip_special_tokens=False), []
    trained = False
    for token, label in zip(ids, labels, strict=True):
        text = stream.step(tokenizer.backend_tokenizer, token)
        waiting.append(token)
        trained = label != IGNORED
        if text is not None:
            yield Piece(text, waiting, trained, token in special)
            waiting = []
    if waiting:  # bytes that are no character
        yield Piece(tokenizer.decode(waiting), waiting, trained, False)


def example_of(sequence: Sequence, tokenizer) -> dict:
    """A sequence for the report: its summary, and its text in parts that are trained or not, special tokens apart."""
    ids, labels = sequence.ids[-SHOWN:], sequence.labels[-SHOWN:]
    runs = groupby(pieces(tokenizer, ids, labels), lambda piece: (piece.trained, piece.special))
    parts = [[printable("".join(piece.text for piece in run)), *kind] for kind, run in runs]
    title = sequence.summary()
    if len(sequence.ids) > SHOWN:
        title += f" · the last {SHOWN:,} tokens are shown"
    return {"title": title, "parts": parts}


def sequences(dataset: Path, tokenizer, row: int | None = None) -> Iterator[Sequence]:
    """The sequences of a row of the source file (of every row without one), split by split; a packed sequence row by row."""
    import pyarrow.parquet

    form = load_prompt(dataset)
    special_tokens = (form | form.get("texts", {}))["add_special_tokens"]
    for split in SPLITS:
        for batch in pyarrow.parquet.ParquetFile(dataset / f"{split}.parquet").iter_batches():
            for line in batch.to_pylist():
                for part in _rows_of(split, line):
                    if row in (None, part.row):
                        yield part if "rows" in line else part._replace(cut=_cut(part, line, tokenizer, special_tokens))


def _rows_of(split: str, line: dict) -> Iterator[Sequence]:
    end = max(i for i, label in enumerate(line["labels"]) if label != IGNORED) + 1  # without padding
    numbers, sizes = line.get("rows", [line["row"]]), line.get("row_lengths", [end])
    turns, dropped, start = line.get("turns", []), line.get("dropped_turns", 0), 0
    for number, size, cut in zip(numbers, sizes, line.get("cut_tokens", [0] * len(numbers)), strict=True):
        ids, labels = (line[name][start : start + size] for name in ("input_ids", "labels"))
        yield Sequence(split, number, ids, labels, turns, dropped, cut)
        start += size


def _cut(sequence: Sequence, line: dict, tokenizer, special_tokens: bool) -> int:
    """Tokens of the last answer's prompt that are not in the sequence."""
    start = len(sequence.labels)
    while start and sequence.labels[start - 1] != IGNORED:
        start -= 1
    whole = tokenizer(line["prompt"], add_special_tokens=special_tokens)["input_ids"]
    return len(whole) - (special_tokens and whole[-1:] == [tokenizer.eos_token_id]) - start
