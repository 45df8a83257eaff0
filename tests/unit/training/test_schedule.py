"""batches: every row once an epoch, in an order that depends on seed and epoch alone; learning rates as documented."""

import math

import numpy as np
import pytest

from slmake import params
from slmake.training import schedule as schedule_module

SETTINGS = {
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "num_train_epochs": 2.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "group_by_length": True,
    "data_seed": 42,
}


@pytest.mark.parametrize("grouped", [True, False])
def test_epoch_order_visits_every_row_once_and_depends_on_seed_and_epoch_alone(grouped):
    lengths = np.random.default_rng(0).integers(5, 90, size=333)
    order = schedule_module.epoch_order(lengths, 8, 3, 42, grouped)
    assert sorted(np.concatenate(order)) == list(range(333))
    assert sorted(len(batch) for batch in order) == [5] + [8] * 41
    np.random.seed(1)  # noqa: NPY002 (a global state that must not matter)
    again = schedule_module.epoch_order(lengths, 8, 3, 42, grouped)
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in order]
    for epoch, seed in ((4, 42), (3, 43)):
        other = schedule_module.epoch_order(lengths, 8, epoch, seed, grouped)
        assert [batch.tolist() for batch in other] != [batch.tolist() for batch in order]


def test_grouping_by_length_saves_padding():
    lengths = np.random.default_rng(0).integers(5, 90, size=512)

    def waste(grouped: bool) -> int:
        order = schedule_module.epoch_order(lengths, 8, 0, 42, grouped)
        return sum(int(lengths[batch].max()) * len(batch) for batch in order) - int(lengths.sum())

    assert waste(True) < 0.1 * waste(False)
    firsts = [lengths[batch].max() for batch in schedule_module.epoch_order(lengths, 8, 0, 42, True)]
    assert firsts != sorted(firsts, reverse=True)  # batches are shuffled again


def test_steps_of_every_epoch_cover_all_rows():
    section = params.Finetune(**{**SETTINGS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})
    lengths = np.full(40, 10)
    schedule = schedule_module.Schedule(section, lengths)
    assert schedule.per_epoch == 10
    assert schedule.steps == 10
    for epoch in range(2):
        passes = [batch for step in range(5 * epoch, 5 * epoch + 5) for batch in schedule.batches(step)]
        assert len(passes) == 10
        assert sorted(np.concatenate(passes)) == list(range(40))
    jumped = schedule_module.Schedule(section, lengths).batches(7)
    assert [batch.tolist() for batch in jumped] == [batch.tolist() for batch in schedule.batches(7)]


def schedule(**changes: object) -> schedule_module.Schedule:
    """A schedule of 20 steps with the peak 0.01."""
    settings = {**SETTINGS, "learning_rate": 0.01, "max_steps": 20, "warmup_ratio": 0.25, **changes}
    return schedule_module.Schedule(params.Finetune(**settings), np.full(96, 10))


def test_cosine_learning_rate_rises_from_above_zero_to_its_peak_and_falls():
    rates = [schedule().learning_rate(step) for step in range(20)]
    assert rates[:6] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01])
    assert rates[10] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 5 / 15)))
    assert rates[19] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 14 / 15)))
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[19] < 0.0002


def test_linear_learning_rate_without_warmup():
    rates = [schedule(lr_scheduler_type="linear", warmup_ratio=0.0).learning_rate(step) for step in range(20)]
    assert rates == pytest.approx([0.01 * (20 - step) / 20 for step in range(20)])


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "linear", "cosine"])
def test_every_schedule_is_positive_and_at_most_the_peak(name):
    rates = [schedule(lr_scheduler_type=name).learning_rate(step) for step in range(20)]
    assert all(0 < rate <= 0.01 * (1 + 1e-9) for rate in rates)
    assert max(rates) == pytest.approx(0.01)
    assert rates[0] == pytest.approx(0.01 if name == "constant" else 0.002)


@pytest.mark.parametrize("ratio", [0.03, 0.07, 0.26, 0.99, 1.0])
def test_warmup_of_any_length_starts_above_zero_and_reaches_the_peak(ratio):
    rates = [schedule(warmup_ratio=ratio).learning_rate(step) for step in range(20)]
    warmup = min(math.ceil(20 * ratio), 19)
    assert rates[0] == pytest.approx(0.01 / warmup)
    assert max(rates) == pytest.approx(0.01)
    assert all(rate > 0 for rate in rates)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "ratio"), [(1, 0.05), (1, 1.0), (2, 0.6), (3, 1.0)])
def test_few_steps_learn_all_the_same(name, steps, ratio):
    plan = schedule(lr_scheduler_type=name, max_steps=steps, warmup_ratio=ratio)
    rates = [plan.learning_rate(step) for step in range(steps)]
    assert max(rates) == pytest.approx(0.01)
    assert min(rates) >= 0.0025
