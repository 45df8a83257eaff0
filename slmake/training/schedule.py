"""The batches and the learning rate of every training step: functions of the step alone, so that a resumed run repeats the same arithmetic."""

import math

import numpy as np

from slmake import params


def epoch_order(lengths: np.ndarray, batch_size: int, epoch: int, seed: int, group_by_length: bool) -> list[np.ndarray]:
    """Batches of one epoch as arrays of sequence numbers; a function of its arguments alone.

    With `group_by_length`, sequences are shuffled, sorted by length within groups of 32 batches, cut into batches, and
    the batches are shuffled again. That leaves little padding, and every epoch still has another order.
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
        # One step at least has the whole rate: of a schedule that falls, the end of the warm-up must not be the end of all.
        self.warmup = min(math.ceil(section.warmup_ratio * self.steps), self.steps - 1)
        self._epoch, self._batches = -1, []
        self._factor = self._learning_rate_factor()

    def _learning_rate_factor(self):
        import torch
        from transformers import get_scheduler

        # transformers' schedules are closed forms of the step. Only that function is used, so there is no state to restore.
        dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.section.learning_rate)
        scheduler = get_scheduler(
            self.section.lr_scheduler_type, dummy, num_warmup_steps=self.warmup, num_training_steps=self.steps
        )
        return scheduler.lr_lambdas[0]

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0). It starts above 0, so that no step is wasted."""
        return self.section.learning_rate * self._factor(step + 1 if step < self.warmup else step)

    def batches(self, step: int) -> list[np.ndarray]:
        """The sequence numbers of each forward pass of optimizer step `step`."""
        batches = []
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
            batches.append(self._batches[index])
        return batches

    def epoch(self, step: int) -> float:
        """Epochs completed after `step` steps."""
        return step * self.section.gradient_accumulation_steps / self.per_epoch
