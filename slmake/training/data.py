"""The tokenized rows of a split, as batches of tensors."""

from pathlib import Path

import numpy as np

from slmake.errors import UserError

IGNORED = -100  # the label that torch's cross entropy leaves out
SIMILAR = 2 / 3  # of the longest row's length in a group


def to_device(array: np.ndarray, device):
    """A tensor of an array's values on a device. A copy to a GPU does not wait for the work that the GPU still has."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def by_length(lengths: np.ndarray) -> list[np.ndarray]:
    """Rows in groups of similar length, the longest first: int arrays of row numbers. A padded batch of a group has little padding."""
    order = np.argsort(-lengths, kind="stable")
    groups, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or lengths[order[end]] < SIMILAR * lengths[order[start]]:
            groups.append(order[start:end])
            start = end
    return groups


class Data:
    """Rows of one split as flat arrays: 8 bytes a token.

    Attributes:
        packed: the rows stand behind each other in sequences (strategy packing), and do not know of each other.
        sequence_lengths: int64 [sequences], tokens of each sequence; a sequence is a row, unless they are packed.
    """

    def __init__(self, path: Path):
        import pyarrow.parquet

        if not path.exists():
            raise UserError(f"{path}: no such file. Build it with `snakemake --cores all build/dataset`.")
        table = pyarrow.parquet.read_table(path)
        ids, labels = table["input_ids"].combine_chunks(), table["labels"].combine_chunks()
        self.masked = "attention_mask" in table.column_names
        self.packed = (table.schema.metadata or {}).get(b"strategy") == b"packing"
        self.sequence_lengths = np.diff(ids.offsets.to_numpy())
        if self.packed:
            numbers, sizes = (table[name].combine_chunks() for name in ("rows", "row_lengths"))
            self.rows, self.sequences = numbers.values.to_numpy(), numbers.offsets.to_numpy()
            self.offsets = np.concatenate([[0], np.cumsum(sizes.values.to_numpy(), dtype=np.int64)])
        else:
            self.rows, self.sequences = table["row"].to_numpy(), np.arange(len(table) + 1)
            self.offsets = ids.offsets.to_numpy()
        self.ids, self.labels = ids.values.to_numpy(), labels.values.to_numpy()
        self.lengths = np.diff(self.offsets)
        # Tokens with a loss: all labels but a sequence's first, which nothing predicts.
        counted = np.concatenate([[0], np.cumsum(self.labels != IGNORED)])
        first = self.labels[self.offsets[:-1]] != IGNORED if len(self) else 0
        self.answers = counted[self.offsets[1:]] - counted[self.offsets[:-1]] - first
        if self.masked:
            mask = table["attention_mask"].combine_chunks()
            self.real = (
                np.add.reduceat(mask.values.to_numpy().astype(np.int64), self.offsets[:-1])
                if len(mask)
                else self.lengths
            )

        # The loss depends on a sequence up to its last label, which is predicted and predicts nothing.
        last = np.flatnonzero(self.labels != IGNORED)
        ends = np.searchsorted(last, self.offsets[1:]) - 1
        self.needed = (
            np.maximum(1, last[np.maximum(ends, 0)] - self.offsets[:-1]) if len(last) else self.lengths * 0 + 1
        )
        self.needed = np.where(self.answers > 0, self.needed, 1)
        if not self.masked:  # padding has no mark of its own; it is behind the last label
            self.real = np.where(self.answers > 0, self.needed + 1, self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def rows_of(self, chosen: np.ndarray) -> np.ndarray:
        """The rows of some sequences."""
        if not self.packed:
            return chosen
        return np.concatenate([np.arange(*self.sequences[index : index + 2]) for index in chosen])

    def row(self, index: int) -> np.ndarray:
        """Tokens of a row, up to the last that its loss depends on, int64 [time]."""
        start = self.offsets[index]
        return self.ids[start : start + self.needed[index]].astype(np.int64)

    def targets(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The targets of a batch: row, position and next token of each, int64 [labels]."""
        rows, positions, tokens = [], [], []
        for row, index in enumerate(chosen):
            start = self.offsets[index]
            labels = self.labels[start + 1 : start + self.lengths[index]]
            labelled = np.flatnonzero(labels != IGNORED)
            rows.append(np.full(len(labelled), row))
            positions.append(labelled)
            tokens.append(labels[labelled])
        return np.concatenate(rows), np.concatenate(positions), np.concatenate(tokens).astype(np.int64)

    def batch(self, chosen: np.ndarray, device) -> dict:
        """Right-padded tensors of some rows.

        Returns:
            input_ids int64 [batch, time], labels int64 [batch, time] (-100 where there is no loss), attention_mask int64
            [batch, time] or None.
        """
        time = int(self.lengths[chosen].max())
        ids = np.zeros((len(chosen), time), dtype=np.int64)
        labels = np.full((len(chosen), time), IGNORED, dtype=np.int64)
        for row, index in enumerate(chosen):
            start, length = self.offsets[index], self.lengths[index]
            ids[row, :length] = self.ids[start : start + length]
            labels[row, :length] = self.labels[start : start + length]
        mask = None
        if self.masked and (self.real[chosen] < time).any():
            mask = to_device((np.arange(time) < self.real[chosen][:, None]).astype(np.int64), device)
        return {
            "input_ids": to_device(ids, device),
            "labels": to_device(labels, device),
            "attention_mask": mask,
        }
