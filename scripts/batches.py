"""What a training step sees: the tokenized rows of a split, their order in each epoch, and the learning rate.

Batches and learning rate are functions of the step alone, so that a resumed run and an undisturbed one do the same
arithmetic.
"""

import math
from pathlib import Path

import numpy as np

from common import params
from common.errors import UserError

IGNORED = -100  # the label that torch's cross entropy leaves out


class Data:
    """Sequences of one split, held as flat arrays: 8 bytes a token."""

    def __init__(self, path: Path):
        import pyarrow.parquet

        if not path.exists():
            raise UserError(f"{path}: no such file. Build it with `snakemake --cores all build/dataset`.")
        table = pyarrow.parquet.read_table(path)
        ids, labels = table["input_ids"].combine_chunks(), table["labels"].combine_chunks()
        self.masked = "attention_mask" in table.column_names
        self.rows = table["row"].to_numpy()
        self.offsets = ids.offsets.to_numpy()
        self.ids, self.labels = ids.values.to_numpy(), labels.values.to_numpy()
        self.lengths = np.diff(self.offsets)
        # Tokens that have a loss: all labels but a sequence's first, which nothing predicts.
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
        else:
            self.real = self.lengths

        # What the loss depends on: a sequence up to its last label, which is predicted and predicts nothing.
        last = np.flatnonzero(self.labels != IGNORED)
        ends = np.searchsorted(last, self.offsets[1:]) - 1
        self.needed = (
            np.maximum(1, last[np.maximum(ends, 0)] - self.offsets[:-1]) if len(last) else self.lengths * 0 + 1
        )
        self.needed = np.where(self.answers > 0, self.needed, 1)

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, one: int) -> np.ndarray:
        """Tokens of a sequence up to the last that has a part in its loss, int64 [time]."""
        start = self.offsets[one]
        return self.ids[start : start + self.needed[one]].astype(np.int64)

    def targets(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the rows of a batch have to predict: row, place and next token of each, int64 [labels]."""
        rows, places, tokens = [], [], []
        for k, one in enumerate(chosen):
            start = self.offsets[one]
            labels = self.labels[start + 1 : start + self.lengths[one]]
            found = np.flatnonzero(labels != IGNORED)
            rows.append(np.full(len(found), k))
            places.append(found)
            tokens.append(labels[found])
        return np.concatenate(rows), np.concatenate(places), np.concatenate(tokens).astype(np.int64)

    def batch(self, chosen: np.ndarray, device) -> dict:
        """Right-padded tensors of some sequences.

        Returns:
            input_ids int64 [batch, time], labels int64 [batch, time] (-100 where there is no loss), attention_mask int64
            [batch, time] or None, tokens: how many of them are real.
        """
        import torch

        longest = int(self.lengths[chosen].max())
        ids = np.zeros((len(chosen), longest), dtype=np.int64)
        labels = np.full((len(chosen), longest), IGNORED, dtype=np.int64)
        for i, one in enumerate(chosen):
            start, length = self.offsets[one], self.lengths[one]
            ids[i, :length] = self.ids[start : start + length]
            labels[i, :length] = self.labels[start : start + length]
        mask = None
        if self.masked and (self.real[chosen] < longest).any():
            mask = torch.from_numpy((np.arange(longest) < self.real[chosen][:, None]).astype(np.int64)).to(device)
        return {
            "input_ids": torch.from_numpy(ids).to(device),
            "labels": torch.from_numpy(labels).to(device),
            "attention_mask": mask,
            "tokens": int(self.real[chosen].sum()),
        }


def epoch_order(lengths: np.ndarray, batch_size: int, epoch: int, seed: int, group_by_length: bool) -> list[np.ndarray]:
    """Batches of one pass over the data, as arrays of sequence numbers; a function of its arguments alone.

    With `group_by_length`, sequences are shuffled, sorted by length within groups of 32 batches, cut into batches, and
    the batches are shuffled again: little padding, and still another order every epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if not group_by_length:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    group, batches = 32 * batch_size, []
    for start in range(0, len(order), group):
        part = order[start : start + group]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


class Schedule:
    """Which batches make which optimizer step, and with what learning rate."""

    def __init__(self, section: params.Finetune, lengths: np.ndarray):
        self.section, self.lengths = section, lengths
        self.per_epoch = math.ceil(len(lengths) / section.per_device_train_batch_size)
        steps = math.ceil(section.num_train_epochs * self.per_epoch / section.gradient_accumulation_steps)
        self.steps = section.max_steps or max(1, steps)
        self._epoch, self._batches = -1, []
        self._factor = self._learning_rate_factor()

    def _learning_rate_factor(self):
        import torch
        from transformers import get_scheduler

        # transformers' schedules are closed forms of the step; only that function is used, so nothing has to be restored.
        dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.section.learning_rate)
        warmup = math.ceil(self.section.warmup_ratio * self.steps)
        scheduler = get_scheduler(
            self.section.lr_scheduler_type, dummy, num_warmup_steps=warmup, num_training_steps=self.steps
        )
        return scheduler.lr_lambdas[0]

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0). Starts above 0, so that no step is lost."""
        return self.section.learning_rate * self._factor(
            step + 1 if step < self.steps * self.section.warmup_ratio else step
        )

    def batches(self, step: int) -> list[np.ndarray]:
        """The sequence numbers of each forward pass of optimizer step `step`."""
        found = []
        for number in range(
            step * self.section.gradient_accumulation_steps, (step + 1) * self.section.gradient_accumulation_steps
        ):
            epoch, index = divmod(number, self.per_epoch)
            if epoch != self._epoch:
                size, seed = self.section.per_device_train_batch_size, self.section.data_seed
                self._epoch, self._batches = (
                    epoch,
                    epoch_order(self.lengths, size, epoch, seed, self.section.group_by_length),
                )
            found.append(self._batches[index])
        return found

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step * self.section.gradient_accumulation_steps / self.per_epoch
