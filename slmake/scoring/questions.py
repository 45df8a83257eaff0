"""The rows that models are asked: prompt tokens of training, expected answers, labels."""

from pathlib import Path

import numpy as np

from slmake import prompts
from slmake.errors import UserError

IGNORED = -100
COMPARED = 512  # prompts whose logits are kept for parity, so that a large test split does not fill the memory


class Questions:
    """Rows of the chosen splits as prompts (int64 token ids), expected answers and their tokens.

    Attributes:
        prompts: one int64 array of token ids per row.
        answers: one list of token ids per row, the end token included.
        expected: one text per row.
        label_tokens: for a classification, token ids of every label, the end token included; else None.
        scored: how many rows, from the first, are scored; rows behind them are asked for parity only.
        compared: how many rows, from the first, are compared in parity.
    """

    def __init__(self, dataset: Path, limit: int | None = None, splits: tuple[str, ...] = ("test",)):
        self.form = prompts.load_prompt(dataset)
        self.dataset, self.end = dataset, self.form["end_token_id"]
        self.rows: list[int] = []
        self.texts: list[str] = []
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
        import pyarrow.parquet

        columns = ["row", "prompt", "answer", "input_ids", "labels"]
        table = pyarrow.parquet.read_table(self.dataset / f"{split}.parquet", columns=columns).slice(0, limit)
        for row in table.to_pylist():
            end = max(i for i, tag in enumerate(row["labels"]) if tag != IGNORED) + 1  # padding stands behind it
            start = end
            while start and row["labels"][start - 1] != IGNORED:
                start -= 1
            begin = start  # of this row, where several are joined in one sequence
            while begin and row["labels"][begin - 1] == IGNORED:
                begin -= 1
            self.rows.append(row["row"])
            self.texts.append(row["prompt"])
            self.prompts.append(np.array(row["input_ids"][begin:start], dtype=np.int64))
            self.answers.append(row["input_ids"][start:end])
            self.expected.append(row["answer"].strip())

    def extend_for_parity(self, count: int) -> None:
        """Add rows of eval and train behind the scored ones until there are `count` prompts (or no more rows)."""
        for split in ("eval", "train"):
            if len(self.rows) < count:
                self._add(split, count - len(self.rows))
        self.compared = min(len(self.rows), max(count, COMPARED))

    def _label_tokens(self) -> list[list[int]]:
        """Token ids of every label, as the rows have them.

        Raises:
            UserError: two labels are the same tokens, so no score can tell them apart.
        """
        found = dict(zip(self.expected, self.answers, strict=True))
        missing = set(self.form["labels"]) - found.keys()
        for split in ("eval", "train"):
            if missing:
                rows = Questions.__new__(Questions)
                rows.__dict__.update(dataset=self.dataset, rows=[], texts=[], prompts=[], answers=[], expected=[])
                rows._add(split, None)
                found = dict(zip(rows.expected, rows.answers, strict=True)) | found
                missing = set(self.form["labels"]) - found.keys()
        if missing:
            raise UserError(f"{self.dataset}: no row has the label {sorted(missing)[0]!r}. Build the dataset again.")
        tokens = [found[label] for label in self.form["labels"]]
        for i, one in enumerate(tokens):
            if one in tokens[:i]:
                other = self.form["labels"][tokens.index(one)]
                raise UserError(
                    f"the labels {other!r} and {self.form['labels'][i]!r} are the same tokens for this model. Rename one."
                )
        return tokens

    def read(self, text: str, index: int) -> str:
        """The answer in generated text: as many first lines as the expected answer has."""
        return prompts.first_answer(text, self.expected[index].count("\n") + 1)
