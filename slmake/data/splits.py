"""Which rows are for training, evaluation and test, and which of them must not be there."""

import json
import re
import unicodedata
from collections import defaultdict
from decimal import Decimal

import numpy as np

from slmake import params
from slmake.data.near_duplicates import copies_of_heldout
from slmake.data.store import Store
from slmake.data.template import SHOWN
from slmake.errors import UserError

SPLITS = ("train", "eval", "test")
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]{1,9})?")
FEW_ANSWERS = 50  # up to this many different answers, the task is a classification


def assign_splits(names: list[str], codes: np.ndarray, section: params.Prepare, stratify: bool) -> np.ndarray:
    """Split of every row (index into SPLITS, -1 for a row left out by max_samples).

    Args:
        names: the splits that have files of their own are already cut off; these are to be cut from the rows.
        codes: int32 [rows], the answer of each row as a number.
        stratify: keep every answer's share the same in each split.
    """
    rng = np.random.default_rng(section.seed)
    split = np.zeros(len(codes), dtype=np.int8)
    chosen = np.arange(len(codes))
    if section.max_samples and section.max_samples < len(codes):
        chosen = np.sort(rng.permutation(len(codes))[: section.max_samples])
        split[:] = -1
        split[chosen] = 0
    fractions = {"test": section.test_fraction, "eval": section.eval_fraction}
    if section.eval_samples and "eval" in names:
        fractions["eval"] = section.eval_samples / len(chosen)
        if sum(fractions[name] for name in names) > 0.9:
            raise UserError(
                f"prepare.eval_samples: {section.eval_samples} of {len(chosen)} rows leave less than a tenth to train on. Lower it."
            )
    groups = [chosen]
    if stratify and 2 * len(np.unique(codes[chosen])) <= len(chosen):
        groups = [chosen[codes[chosen] == code] for code in np.unique(codes[chosen])]
    due = dict.fromkeys(names, 0.0)  # what small groups, each less than a row of the split, add up to
    for group in groups:
        order, start = rng.permutation(group), 0
        for name in names:
            share = len(group) * fractions[name]
            size = round(share)
            if share < 1:
                due[name] += share
                size = min(round(due[name]), len(group) - start - 1)
                due[name] -= size
            split[order[start : start + size]] = SPLITS.index(name)
            start += size
    return split


def split_rows(section: params.Prepare, store: Store, sizes: dict[str, int]) -> np.ndarray:
    """int8 [rows]: index into SPLITS of every row, from the files they came in and the fractions."""
    names = [name for name in ("test", "eval") if name not in sizes]
    split = np.concatenate([np.full(size, SPLITS.index(name), np.int8) for name, size in sizes.items()])
    own = slice(0, sizes["train"])  # the file that splits are cut from comes first
    split[own] = assign_splits(names, store.answer_codes()[own], section, stratify=store.answers() is not None)
    return split


def check_labels(store: Store, split: np.ndarray, before: np.ndarray) -> list[str] | None:
    """The labels of a classification, sorted; None for free text.

    Args:
        split: int8 [rows], as `split_rows` gives it, without duplicates.
        before: the same with duplicates, to tell when their removal is the reason.

    Raises:
        UserError: no row to train on, a label with white space around it, or one that only held-out rows have: the model could not
            learn it.
    """
    if not (split == 0).any():
        if (before == 0).any():
            raise UserError(
                f"prepare: all {(before == 0).sum()} training rows repeat eval or test rows and were left out as duplicates. Add other "
                "rows: the same few texts again and again teach nothing that held-out rows could measure. Or raise near_duplicate_threshold, up to "
                "1.0 (exact copies only), where rows that are alike are still different examples."
            )
        raise UserError("prepare: no row is left for training. Lower eval_fraction and test_fraction, or add rows.")
    answers, codes = store.answers(), store.answer_codes()
    trained = set(np.unique(codes[split == 0]))
    if answers is None or len(trained) * 2 > (split == 0).sum():
        return None
    for code, answer in enumerate(answers):
        if answer != answer.strip() and (chosen := np.flatnonzero((codes == code) & (split >= 0))).size:
            row = store.row(chosen[0])
            raise UserError(
                f"{row.file}: row {row.line}: the label {json.dumps(answer, ensure_ascii=False)} has white space around it, which no answer "
                "of a model is compared with. Remove it there, or around the placeholder of the answer in the template."
            )
    for number in np.flatnonzero(split > 0):
        if codes[number] not in trained:
            row = store.row(number)
            gone = int(((before == 0) & (codes == codes[number])).sum())
            why = f" (the {gone} it had repeat held-out rows and were left out as duplicates)" if gone else ""
            raise UserError(
                f"{row.file}: row {row.line}: the answer {json.dumps(row.answer, ensure_ascii=False)} is in {SPLITS[split[number]]} but in no "
                f"training row{why}, so the model cannot learn it. Correct the label, or add training rows with it."
            )
    return sorted(answers[code] for code in trained)


def similar_labels(labels: list[str]) -> list[str]:
    """Warnings of labels that a reader takes for the same: one number, or texts that differ in what is hardly seen."""
    groups = defaultdict(list)
    for label in labels:
        visible = "".join(char for char in unicodedata.normalize("NFKC", label) if unicodedata.category(char) != "Cf")
        key = " ".join(visible.casefold().split())
        groups[Decimal(key) if NUMBER.fullmatch(key) else key].append(label)
    return [
        f"the labels {' and '.join(map(json.dumps, group))} "
        + (
            "are one number"
            if isinstance(key, Decimal)
            else "differ only in case, Unicode form or invisible characters"
        )
        + ", and are scored as different answers"
        for key, group in groups.items()
        if len(group) > 1
    ]


def drop_duplicates(section: params.Prepare, store: Store, split: np.ndarray) -> int:
    """Leave out (or refuse) rows that repeat a row of eval or test. Changes `split`; returns how many were left out."""
    copies = copies_of_heldout(store, split, section.near_duplicate_threshold)
    if copies and section.duplicates == "refuse":
        shown = []
        for number, other in copies[:SHOWN]:
            row, repeated = store.row(number), store.row(other)
            shown.append(
                f"  {row.file}: row {row.line} ({SPLITS[split[number]]}) repeats {repeated.file}: row {repeated.line} ({SPLITS[split[other]]})"
            )
        more = f"\n  and {len(copies) - SHOWN} more" if len(copies) > SHOWN else ""
        raise UserError(
            f"prepare.duplicates: {len(copies)} rows repeat held-out rows. Remove them, or set duplicates: remove.\n"
            + "\n".join(shown)
            + more
        )
    split[[number for number, _ in copies]] = -1
    return len(copies)


def check_test_split(section: params.Prepare, split: np.ndarray) -> None:
    """Raise UserError where no row is held out for evaluate: reported now, before hours of training."""
    if not (split == SPLITS.index("test")).any():
        raise UserError(
            f"prepare: the test split is empty, so evaluate (all.stages) could not score anything: test_fraction is "
            f"{section.test_fraction:g}, max_samples {section.max_samples or 'null'}, and there are {len(split)} rows. Raise test_fraction or "
            "max_samples, add rows, or name a file in prepare.source.test."
        )
