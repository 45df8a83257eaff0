"""Helpers of the tests of prepare: parameters, files of rows, and what a run wrote."""

import csv
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from slmake.data import tokenize

END = 0  # id of <|end|> in the test tokenizer


TEMPLATE = "### Text: {phrase}\n### The tone is:\n{tone}"


# Everything is set here, so that the project's own params.yaml can change.
FIELDS = {
    "format": "auto",
    "text_template": TEMPLATE,
    "messages": None,
    "answer": None,
    "labels": None,
    "chat_template_kwargs": {},
    "chat_date": "2024-01-01",
    "train_on": "all",
    "strategy": "line-by-line",
    "max_seq_len": 128,
    "pad_to_max_len": False,
    "use_attention_mask": True,
    "eval_fraction": 0.05,
    "test_fraction": 0.2,
    "duplicates": "remove",
    "near_duplicate_threshold": 0.8,
    "seed": 42,
    "max_samples": None,
}


WHOLE = {"eval_fraction": 0.0, "test_fraction": 0.0}


CHAT = {"text_template": None, "answer": None}


class Built(NamedTuple):
    """What one run of prepare wrote."""

    folder: Path
    report: dict
    train: list[dict]
    eval: list[dict]
    test: list[dict]

    @property
    def prompt(self) -> dict:
        return json.loads((self.folder / "prompt.json").read_text(encoding="utf-8"))


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows in the format that the file's ending names."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def other_chat(tokenizer_folder: Path, folder: Path, chat_template: str | None) -> Path:
    """A copy of the test tokenizer with another chat template, or with none."""
    tokenizer = tokenize.load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def numbers(split: list[dict]) -> set[int]:
    return {row["row"] for row in split}


def flat(lists: Iterable[list]) -> list:
    return list(chain.from_iterable(lists))
