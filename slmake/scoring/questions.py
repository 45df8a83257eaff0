"""The rows that models are asked: prompt tokens of training, expected answers, labels."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slmake import prompts
from slmake.errors import UserError
from slmake.generation import truncate

IGNORED = -100
COLUMNS = (
    "row",
    "prompt",
    "answer",
    "input_ids",
    "labels",
    *("turns", "tools", "rows", "row_answers", "row_lengths"),  # not in every dataset
)
TUNING = ("eval", "train")  # splits of the rows by which quantize.search chooses, never those of test
COMPARED = 512  # largest number of prompts whose logits parity compares, so that a large test split fits into memory


def separate(sequence: dict) -> list[dict]:
    """The rows of a sequence, each as if it were alone; of several, their prompts are not there as text."""
    if "row_lengths" not in sequence or len(sequence["row_lengths"]) < 2:
        return [sequence]
    rows, end = [], 0
    for number, answer, length in zip(
        *(sequence[name] for name in ("rows", "row_answers", "row_lengths")), strict=True
    ):
        begin, end = end, end + length
        part = {name: sequence[name][begin:end] for name in ("input_ids", "labels")}
        rows.append({"row": number, "prompt": None, "answer": answer, **part})
    return rows


class Question(NamedTuple):
    """A row that models are asked; of a sequence of several turns its last answer.

    Attributes:
        row: its number in its file.
        turn: the answer's turn in its conversation; None without conversations.
        tools: what the assistant may call; None without tools.
        text: the prompt as text; None for one of several rows in a sequence (strategies join and packing).
        prompt: int64 token ids, of training; cut as a user's prompt is, for whose answer there must be room.
        answer: token ids, the end token included.
        expected: the answer's text, as the model's tokens have it.
    """

    row: int
    turn: int | None
    tools: list[dict] | None
    text: str | None
    prompt: np.ndarray
    answer: list[int]
    expected: str


def read_split(dataset: Path, split: str, form: dict, limit: int | None = None) -> Iterator[Question]:
    """The rows of a split, at most `limit`.

    Args:
        form: of `prompts.load_prompt`.

    Raises:
        UserError: the split's file is damaged.
    """
    import pyarrow.parquet

    file = dataset / f"{split}.parquet"
    try:
        known = pyarrow.parquet.read_schema(file).names
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is damaged: {error} Remove {dataset} and run snakemake: it is built again.") from None
    columns = [name for name in COLUMNS if name in known]
    table = pyarrow.parquet.read_table(file, columns=columns).slice(0, limit)
    rows = (row for sequence in table.to_pylist() for row in separate(sequence))
    return (_question(row, form) for row in islice(rows, limit))


def _question(row: dict, form: dict) -> Question:
    """The last answer of a row that is alone in its sequence."""
    end = max(i for i, tag in enumerate(row["labels"]) if tag != IGNORED) + 1  # without padding
    start = end
    while start and row["labels"][start - 1] != IGNORED:
        start -= 1
    prompt = row["input_ids"][:start]
    if "max_prompt_tokens" in form:
        prompt = truncate(prompt, form["max_prompt_tokens"], form["kept_token_id"])
    return Question(
        row=row["row"],
        turn=row["turns"][-1] if row.get("turns") else None,
        tools=json.loads(row["tools"]) if row.get("tools") else None,
        text=row["prompt"],
        prompt=np.array(prompt, dtype=np.int64),
        answer=row["input_ids"][start:end],
        expected=prompts.as_written(row["answer"], form).strip(),
    )


class Questions:
    """Rows of the chosen splits, a list for each of their parts.

    Attributes:
        rows: number of every row in its file; an answer of a conversation counts as a row here.
        turns: number of every answer's turn in its conversation; empty without conversations.
        tools, texts, prompts, answers, expected: of every row, as `Question` has them.
        label_tokens: for a classification, token ids of every label, the end token included; else None.
        scored: the number of rows that are scored; the rows after them are asked for parity only.
        compared: the number of rows, from the first, that parity compares.
        without_dataset: the rows are the fixed texts: openings, and the tokens that follow (slmake/data/texts.py).
    """

    def __init__(self, dataset: Path, limit: int | None = None, splits: tuple[str, ...] = ("test",)):
        form = prompts.load_prompt(dataset)
        self.without_dataset = "texts" in form
        self.form = form | form.get("texts", {})
        self.dataset, self.end = dataset, self.form["end_token_id"]
        self.rows: list[int] = []
        self.turns: list[int] = []
        self.tools: list[list[dict] | None] = []
        self.texts: list[str | None] = []
        self.prompts: list[np.ndarray] = []
        self.answers: list[list[int]] = []
        self.expected: list[str] = []
        for split in splits:
            self._add(split, None if limit is None else limit - len(self.rows))
        if not self.rows:
            raise UserError(
                f"{dataset}: the {' and '.join(splits)} split is empty, so nothing can be scored. "
                "Raise prepare.test_fraction, or name a test file."
            )
        self.scored = len(self.rows)
        self.compared = min(self.scored, COMPARED)
        self.label_tokens = self._label_tokens() if self.form["labels"] else None

    def _add(self, split: str, limit: int | None) -> None:
        for question in read_split(self.dataset, split, self.form, limit):
            self.rows.append(question.row)
            self.turns += [] if question.turn is None else [question.turn]
            self.tools.append(question.tools)
            self.texts.append(question.text)
            self.prompts.append(question.prompt)
            self.answers.append(question.answer)
            self.expected.append(question.expected)

    def extend_for_parity(self, count: int) -> None:
        """Add rows of eval and train after the scored ones until there are `count` prompts (or no more rows)."""
        for split in () if self.without_dataset else ("eval", "train"):
            if len(self.rows) < count:
                self._add(split, count - len(self.rows))
        self.compared = min(len(self.rows), max(count, COMPARED))

    def positions(self, index: int) -> list[int]:
        """Tokens of the answer for which parity compares the logits: the first; of a text, some that are evenly spread."""
        if not self.without_dataset:
            return [0]
        last = len(self.answers[index]) - 1
        return np.linspace(0, last, min(last + 1, COMPARED // self.scored)).astype(int).tolist()

    def _label_tokens(self) -> list[list[int]]:
        """Token ids of every label, as in the rows.

        Raises:
            UserError: two labels are the same tokens, so no score can distinguish them.
        """
        labels = self.form["labels"]
        known = dict(zip(self.expected, self.answers, strict=True))
        for split in ("eval", "train"):
            if set(labels) - known.keys():
                questions = read_split(self.dataset, split, self.form)
                known = {question.expected: question.answer for question in questions} | known
        missing = sorted(set(labels) - known.keys())
        if missing:
            raise UserError(f"{self.dataset}: no row has the label {missing[0]!r}. Build the dataset again.")
        tokens = [known[label] for label in labels]
        for i, ids in enumerate(tokens):
            if ids in tokens[:i]:
                raise UserError(
                    f"the labels {labels[tokens.index(ids)]!r} and {labels[i]!r} are the same tokens for this model. Rename one of them."
                )
        return tokens

    def groups(self) -> np.ndarray:
        """int [scored]: scored answers of one conversation have the same number, from 0."""
        rows = np.array(self.rows[: self.scored])
        return np.concatenate([[0], np.cumsum(rows[1:] != rows[:-1])])

    def runtime_prompt(self, model, index: int) -> list[int]:
        """Tokens of a prompt as the runtime makes them of its text; those of training for a part of a longer sequence.

        Args:
            model: the exported model, a `generation.Exported`.
        """
        text = self.texts[index]
        return self.prompts[index].tolist() if text is None else model.encode(text)

    def read(self, text: str) -> str:
        """The answer in generated text, whichever is expected."""
        return prompts.read_answer(text, self.form["labels"])
