"""From the files that `prepare` names to its output: rows, splits, tokens, prompt.json and statistics."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from slmake import cli, outputs, params
from slmake.data.conversation import Conversation
from slmake.data.formats import prompt_template
from slmake.data.hub_rows import read_hub_rows
from slmake.data.preview import Sequence, example_of
from slmake.data.repeated_answers import repeated_answers, without_answers
from slmake.data.rows import decompressed, read_rows
from slmake.data.splits import (
    FEW_ANSWERS,
    SPLITS,
    check_labels,
    check_test_split,
    drop_duplicates,
    similar_labels,
    split_rows,
)
from slmake.data.store import Row, Store
from slmake.data.template import Conversations, PromptTemplate, read_valid
from slmake.data.tokenize import BATCH, CHATS, Example, Tokenize, lengths_summary, load_tokenizer
from slmake.data.writer import Writer
from slmake.errors import UserError
from slmake.params.dataset_files import hub_split, source_files
from slmake.prompts import CHATS_FILE
from slmake.sources.fetching import fetch_rows
from slmake.sources.schemes import parse
from slmake.text import listing

EXAMPLES = 10  # rows that the report shows
# Conversations of each split, and so many of other tools: the runtime writes their prompts in `rehearse`.
CHATS_KEPT = 32
FIRST_ROWS = 20  # by which a format is detected


class Preparation:
    """One run of prepare: reads, splits and tokenizes into a folder.

    Args:
        scored: evaluate will score the test split, so it must not be empty.
    """

    def __init__(self, section: params.Prepare, base: Path, folder: Path, job: cli.Job, scored: bool):
        self.section, self.folder, self.job, self.scored = section, folder, job, scored
        self.tokenizer = load_tokenizer(base)
        self.examples: list[Example] = []  # of train, for the report
        self.chats: dict[str, list[Row]] = {name: [] for name in SPLITS}
        self.tools: dict[str, set[str]] = {name: set() for name in SPLITS}  # of these chats, as JSON
        check_context(section, base)

    def run(self, downloads: Path) -> dict:
        """Do all of it; returns the statistics.

        Raises:
            UserError: the first thing that is wrong with sources, rows, labels or lengths.
        """
        fetched = {
            name: fetch_rows(parse(text), downloads, self.job) for name, text in source_files(self.section).items()
        }
        files = {
            name: [(decompressed(path, source, downloads), source) for path, source in paths]
            for name, (paths, _) in fetched.items()
        }
        self.scratch = downloads / "rows"

        def first_rows() -> list:
            return list(islice(self._rows("train", *files["train"][0]), FIRST_ROWS))

        template = prompt_template(self.section, self.tokenizer, first_rows, self.job.say)
        few = max(FEW_ANSWERS, len(self.section.labels or {}))
        with Store(self.folder / ".rows.sqlite", few) as store:
            split, before, labels = self._split(store, self._read(store, files, template))
            within = store.exact_duplicates(split == 0)
            chats = isinstance(template, Conversations)
            self.repeated = self._leave_out_repeated(store, split) if chats else {}
            tokenize = Tokenize(self.section, self.tokenizer, template)
            tokenize.check_labels(labels or [])
            writers = self._write(store, split, tokenize)
            self.apart = tokenize.apart > 0
            self._warn(template, tokenize, None if chats else store.repeated_answers())
            answers, codes = store.answers(), store.answer_codes().copy()
        for name, (paths, _) in fetched.items():
            for path in {path for path, _ in files[name]} - {path for path, _ in paths}:
                path.unlink()
        self._write_prompt(template, labels, tokenize)
        per_label = {name: _counts(answers, codes[split == i]) if labels else {} for i, name in enumerate(SPLITS)}
        return {
            "source": {name: record | self._chosen(name, fetched[name][0]) for name, (_, record) in fetched.items()},
            "rows": {"read": len(split), **{name: int((split == i).sum()) for i, name in enumerate(SPLITS)}},
            "sequences": {name: sum(writer.lengths.values()) for name, writer in writers.items()},
            "tokens": {name: writer.tokens for name, writer in writers.items()},
            "answer_tokens": {name: writer.answer_tokens for name, writer in writers.items()},
            "length": lengths_summary(sum((writer.lengths for writer in writers.values()), Counter())),
            "labels": per_label,
            "truncated": tokenize.truncated,
            "dropped_turns": {"conversations": tokenize.shortened, "turns": tokenize.dropped},
            "examples": [
                example_of(Sequence("train", *example[:1], *example[3:8]), self.tokenizer) for example in self.examples
            ],
            "duplicates": {
                "removed_from_train": int(((before == 0) & (split < 0)).sum()),
                "removed_from_eval": int(((before == 1) & (split < 0)).sum()),
                "within_train": within,
                **({"answers_not_scored": sum(map(len, self.repeated.values()))} if self.repeated else {}),
            },
        }

    def _read(self, store: Store, files: dict[str, list[tuple[Path, str]]], template: PromptTemplate) -> dict[str, int]:
        """Read and check every row; returns the number of rows of each split's files."""
        sizes = dict.fromkeys(files, 0)
        for split, paths in files.items():
            for path, name in paths:
                rows = self._rows(split, path, name, template.fields)
                sizes[split] += store.add(read_valid(name, template, rows, sizes[split]))
        if isinstance(template, Conversations) and template.chat.mixed:
            store.forget_answers()  # in some rows the template's text belongs to them
        return sizes

    def _rows(self, split: str, path: Path, name: str, fields: Iterable[str] = ()) -> Iterator[dict]:
        """The rows of a file, or those chosen of a dataset on the hub."""
        if path.is_dir():
            return read_hub_rows(path, name, self.section, split, self.scratch, fields, self.job.say)
        return read_rows(path, name, fields, self.job.say)

    def _chosen(self, split: str, paths: list[tuple[Path, str]]) -> dict:
        """Which rows of a dataset on the hub were read, for the report."""
        if not paths[0][0].is_dir():
            return {}
        return {"config": self.section.config, "split": hub_split(self.section, split), "where": self.section.where}

    def _split(self, store: Store, sizes: dict[str, int]) -> tuple[np.ndarray, np.ndarray, list[str] | None]:
        """Split of every row without and with duplicates (int8 [rows], as `split_rows` gives it), and the labels."""
        split = split_rows(self.section, store, sizes)
        if self.scored:
            check_test_split(self.section, split)
        before = split.copy()
        drop_duplicates(self.section, store, split)
        labels = check_labels(store, split, before)
        for warning in similar_labels(labels or []):
            self.job.say(f"warning: {warning}")
        return split, before, labels

    def _leave_out_repeated(self, store: Store, split: np.ndarray) -> dict[int, list[int]]:
        """Answers of test conversations that are not scored (see `repeated_answers`); a row without any other leaves `split`."""
        repeated = repeated_answers(store, split)
        count = sum(map(len, repeated.values()))
        if repeated and self.section.duplicates == "refuse":
            number = min(repeated)
            row = store.row(number)
            raise UserError(
                f"prepare.duplicates: {count} answers of test conversations are in training rows, too, behind the same turns; the first is "
                f"{row.file}: row {row.line}, turn {repeated[number][0] + 1}. Remove them, or set duplicates: remove."
            )
        for number, turns in repeated.items():
            if len(turns) == store.row(number).answers:
                split[number] = -1
        if repeated and self.scored and not (split == SPLITS.index("test")).any():
            raise UserError(
                f"prepare: all {count} answers of the test conversations are in training rows, too, behind the same turns, so nothing is "
                "left to score. Add other conversations."
            )
        if repeated:
            self.job.say(
                f"{count} answers of test conversations are not scored: training has them, too, behind the same turns"
            )
        return repeated

    def _write(self, store: Store, split: np.ndarray, tokenize: Tokenize) -> dict[str, Writer]:
        """Tokenize the rows of every split into its Parquet file."""
        tokenizer, strategy = self.tokenizer, self.section.strategy
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        chats = isinstance(tokenize.template, Conversations)
        with contextlib.ExitStack() as stack:
            writers = {
                name: stack.enter_context(
                    Writer(
                        self.folder / f"{name}.parquet",
                        self.section,
                        pad_id,
                        "line-by-line" if name == "test" else strategy,
                        chats,
                    )
                )
                for name in SPLITS
            }
            bar = stack.enter_context(self.job.progress(int((split >= 0).sum()), "rows"))
            for numbers, batch in store.batches(CHATS if chats else BATCH):
                for index, (name, writer) in enumerate(writers.items()):
                    chosen = [
                        without_answers(row, self.repeated[number]) if number in self.repeated else row
                        for number, row in zip(numbers, batch, strict=True)
                        if split[number] == index
                    ]
                    if chosen:
                        examples = tokenize(chosen, one_answer=name == "test")
                        writer.write(examples)
                        if chats:
                            self._keep(name, chosen)
                        if name == "train":
                            self.examples += examples[: EXAMPLES - len(self.examples)]
                        bar.update(len(chosen))
        return writers

    def _warn(self, template: PromptTemplate, tokenize: Tokenize, repeated: int | None) -> None:
        """Say what of the answers no answer of the exported model can have, and that so many `repeated` ones are no labels."""
        if repeated:
            advice = ". To score them as labels, name them in prepare.labels" if self.section.templated else ""
            self.job.say(
                f"warning: {repeated} different answers, more than {FEW_ANSWERS}, so they are scored as open text, without labels{advice}"
            )
        if tokenize.unlike:
            self.job.say(
                f"warning: {tokenize.unlike} answers of the test split are another text when their tokens are read back, so no answer of a "
                f"model can be equal to them; the first is {tokenize.first_unlike}"
            )
        if template.left_out:
            self.job.say(
                f"warning: answers hold {listing(sorted(template.left_out))}: special tokens of this model, which the runtime leaves out of "
                "what it answers. Scores compare answers without them; write them otherwise if they are meant as text"
            )

    def _keep(self, split: str, rows: list[Row]) -> None:
        """Keep the first conversations of a split for `rehearse`, and as many of those behind them whose tools are others."""
        kept, seen = self.chats[split], self.tools[split]
        for row in rows:
            if len(kept) == 2 * CHATS_KEPT:
                return
            tools = json.dumps(Conversation.parse(row.chat).tools)
            if len(kept) < CHATS_KEPT or tools not in seen:
                kept.append(row)
                seen.add(tools)

    def _write_prompt(self, template: PromptTemplate, labels: list[str] | None, tokenize: Tokenize) -> None:
        written = template.inference()
        chat = written.pop("chat", None)
        written |= {
            "end_token": self.tokenizer.eos_token,
            "end_token_id": self.tokenizer.eos_token_id,
            "labels": labels,
            "longest_answer_tokens": tokenize.longest_answer,
            **tokenize.inference(),
        }
        outputs.write_json(self.folder / "prompt.json", written | ({"chat": chat} if chat else {}))
        if isinstance(template, Conversations):
            kept = [_asked(row) for rows in self.chats.values() for row in rows]
            outputs.write_json(self.folder / CHATS_FILE, {"chats": kept})


def _asked(row: Row) -> dict:
    """A row's file, number, tools, and its turns before its last answer."""
    chat = Conversation.parse(row.chat)
    return {"file": row.file, "row": row.line, "tools": chat.tools, "turns": chat.turns[: chat.trained[-1]]}


def _counts(answers: list[str] | None, codes: np.ndarray) -> dict[str, int]:
    """Rows of each label."""
    numbers, amounts = np.unique(codes, return_counts=True)
    return {answers[code]: int(amount) for code, amount in zip(numbers, amounts, strict=True)}


def check_context(section: params.Prepare, base: Path) -> None:
    """Raise UserError where rows may be longer than what the base model reads."""
    config = base / "config.json"
    context = outputs.read_json(config, output=base).get("max_position_embeddings") if config.is_file() else None
    if context and section.max_seq_len > context:
        raise UserError(
            f"prepare.max_seq_len: {section.max_seq_len} is more than the base model reads: {context} tokens (max_position_embeddings in "
            f"{config}). Lower it."
        )
