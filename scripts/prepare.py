"""Validate, split and tokenize the dataset.

    python scripts/prepare.py --params params.yaml --base build/base --output build/dataset --report results/dataset.json

Reads the section `prepare`, the dataset files it names (here or elsewhere: scripts/sources/syntax.py) and the tokenizer in the base model's folder. Checks every row
first, then writes train.parquet, eval.parquet and test.parquet (row, prompt, answer, input_ids, labels) and
prompt.json (the template for inference), and a report of rows, tokens, lengths, labels, truncation and duplicates.

The loss is taken on the answer only: labels are -100 over the prompt, and the answer ends with the end-of-text token.
"""

import difflib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common import cli, outputs, params, prompts
from common.errors import UserError
from dataset.duplicates import copies_of_held_out
from dataset.rows import read_rows
from dataset.store import Row, Store
from sources.resolve import bring, downloading
from sources.syntax import parse

SPLITS = ("train", "eval", "test")
IGNORED = -100  # the label that torch's cross entropy leaves out
FEW_ANSWERS = 50  # up to this many different answers, the task is a classification
BATCH = 2048  # rows in memory at a time
SHOWN = 20  # row errors printed before "and N more"
HALF_PAIR = "holds half a surrogate pair: text that was cut inside a character"


class Form:
    """How a row becomes prompt and answer text: a text template, chat templates, or a column of messages."""

    def __init__(self, section: params.Prepare, tokenizer):
        self.said = section.messages[-1].content if isinstance(section.messages, list) else None
        self.column = section.messages if isinstance(section.messages, str) else None
        self.tokenizer = tokenizer
        self.special_tokens = True  # the tokenizer adds its own begin token, as for any text
        if section.messages is not None:
            if not section.messages:
                raise UserError(
                    "prepare.messages: an empty name. Name the column that holds each row's list of messages, or set it to null."
                )
            if not tokenizer.chat_template:
                raise UserError(
                    "prepare.messages: the base model's tokenizer has no chat template. Use text_template instead."
                )
            self.special_tokens = False  # the chat template writes them
        if self.column:
            self.fields, self.head, self.tail, self.answer = [self.column], None, None, None
        elif section.messages is not None:
            self.head, self.tail = self._chat(section.messages)
            self.fields = list(dict.fromkeys(prompts.fields_of(self.head) + prompts.fields_of(self.tail)))
            self.answer = prompts.fields_of(self.tail)[0] if prompts.fields_of(self.tail) else None
        else:
            self.head, self.tail, self.answer = prompts.split_at_answer(section.text_template, section.answer)
            self.fields = list(dict.fromkeys(prompts.fields_of(section.text_template)))
        self.prompt_fields = list(dict.fromkeys(prompts.fields_of(self.head))) if self.head else []

    def _chat(self, messages: list[params.Message]) -> tuple[str, str]:
        """Apply the chat template once, to the templates themselves, so that inference needs no chat engine."""
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        for turn in turns:
            prompts.fields_of(turn["content"], "prepare.messages")
        # The chat template's own braces must survive str.format; the contents keep theirs.
        marks = {turn["content"]: f"\x00{number}\x00" for number, turn in enumerate(turns)}
        marked = [{"role": turn["role"], "content": marks[turn["content"]]} for turn in turns]
        if not marked[:-1]:
            raise UserError("prepare.messages: nothing stands before the answer, so there is no prompt.")
        try:
            head, whole = self._apply(marked)
        except ValueError as error:
            raise UserError(f"prepare.messages: {error}") from None
        pieces = []
        for text in (head, whole[len(head) :].rstrip("\n")):
            text = text.replace("{", "{{").replace("}", "}}")
            for content, mark in marks.items():
                text = text.replace(mark, content)
            pieces.append(text)
        return pieces[0], pieces[1]

    def _apply(self, turns: list[dict]) -> tuple[str, str]:
        """The chat template over the turns before the answer, and over all of them.

        Raises:
            ValueError: it does not take these turns (roles that do not alternate, for one).
            UserError: it changes earlier turns when the answer is added.
        """
        import jinja2

        try:
            head = self.tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
            whole = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the base model's chat template does not take it: {error}") from None
        if not whole.startswith(head):
            raise UserError(
                "prepare.messages: this chat template changes earlier turns when the answer is added. Use text_template."
            )
        return head, whole

    def render(self, row: dict) -> tuple[str, str, str, str]:
        """Prompt, answer, text for duplicates, answer with what closes it; the prompt's own text (without the template) of a validated row.

        Raises:
            ValueError: messages that the chat template does not take.
        """
        if self.column is None:
            values = {name: row[name] for name in self.fields}
            own = "\n".join(values[name] for name in self.prompt_fields)
            tail = self.tail.format(**values)
            answer = self.said.format(**values) if self.said else tail.rstrip("\n")
            return self.head.format(**values), answer, own if self.prompt_fields else answer, tail
        turns = row[self.column]
        try:
            head, whole = self._apply(turns)
        except ValueError as error:
            raise ValueError(f"field `{self.column}`: {error}") from None
        own = "\n".join(turn["content"] for turn in turns[:-1])
        return head, turns[-1]["content"], own, whole[len(head) :].rstrip("\n")


def problems(row: object, form: Form) -> list[str]:
    """What is wrong with one row, each as `field: reason`."""
    if not isinstance(row, dict):
        return [f"not an object but {type(row).__name__}"]
    found = []
    for name in form.fields:
        value = row.get(name)
        if value is None:
            found.append(f"field `{name}` is missing")
        elif name == form.column:
            found += _chat_problems(name, value)
        elif not isinstance(value, str):
            found.append(f"field `{name}` is {type(value).__name__}, not text: {json.dumps(value, default=str)[:60]}")
        elif "\ufffd" in value:
            found.append(
                f"field `{name}` holds the replacement character U+FFFD: text that was not UTF-8 was decoded wrongly"
            )
        elif not prompts.encodes(value):
            found.append(f"field `{name}` {HALF_PAIR}")
        elif name == form.answer and not value.strip():
            found.append(f"field `{name}` is an empty answer")
    return found


def _chat_problems(name: str, value: object) -> list[str]:
    if not isinstance(value, list) or not value:
        return [f"field `{name}` is not a list of messages"]
    for turn in value:
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            return [f"field `{name}` has a message without text in `role` and `content`"]
    if value[-1]["role"] != "assistant":
        return [f"field `{name}` does not end with the assistant's turn"]
    if not value[-1]["content"].strip():
        return [f"field `{name}` ends with an empty answer"]
    if len(value) == 1:
        return [f"field `{name}` has no turn before the assistant's, so there is no prompt"]
    if not all(prompts.encodes(turn[key]) for turn in value for key in ("role", "content")):
        return [f"field `{name}` {HALF_PAIR}"]
    return []


def read_valid(file: str, form: Form, path: Path | None = None) -> Iterator[Row]:
    """Rows of one file, rendered; every bad row is collected and told at once.

    Args:
        file: the name by which errors call it.
        path: where it lies, if that is another place.

    Raises:
        UserError: no rows, a field that no row has, or bad rows (file, row number and field of each).
    """
    bad, count, seen = [], 0, Counter()
    columns: dict[str, None] = {}
    number = 0
    for number, raw in enumerate(read_rows(path or Path(file)), 1):
        if isinstance(raw, dict):
            seen.update(name for name in form.fields if raw.get(name) is not None)
            if number <= 1000:
                columns.update(dict.fromkeys(raw))
        found = problems(raw, form)
        if not found and not bad:
            try:
                row = Row(file, number, *form.render(raw))
            except ValueError as error:
                found = [str(error)]
            else:
                yield row
        if found:
            count += len(found)
            bad += [f"  {file}: row {number}: {problem}" for problem in found][: SHOWN - len(bad)]
    if not number:
        raise UserError(f"{file}: no rows in it.")
    for name in form.fields if columns else []:
        if not seen[name]:
            near = difflib.get_close_matches(name, columns, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise UserError(
                f"{file}: the template's field `{name}` is in no row. Fields there: {', '.join(columns) or 'none'}.{hint}"
            )
    if bad:
        more = f"\n  and {count - len(bad)} more" if count > len(bad) else ""
        raise UserError(
            f"{file}: {count} bad value{'s' if count > 1 else ''} in {number} rows; mend them and run again.\n"
            + "\n".join(bad)
            + more
        )


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
    groups = [chosen]
    if stratify and 2 * len(np.unique(codes[chosen])) <= len(chosen):
        groups = [chosen[codes[chosen] == code] for code in np.unique(codes[chosen])]
    due = dict.fromkeys(names, 0.0)  # what small groups, each less than a row of the split, add up to
    for group in groups:
        order, start = rng.permutation(group), 0
        for name in names:
            share = len(group) * (section.test_fraction if name == "test" else section.eval_fraction)
            size = round(share)
            if share < 1:
                due[name] += share
                size = min(round(due[name]), len(group) - start - 1)
                due[name] -= size
            split[order[start : start + size]] = SPLITS.index(name)
            start += size
    return split


def truncate(prompt: list[int], answer: list[int], limit: int, begin: int | None) -> list[int]:
    """Drop tokens at the prompt's start (after the begin token) until prompt and answer fit `limit` tokens."""
    over = len(prompt) + len(answer) - limit
    if over <= 0:
        return prompt
    kept = [prompt[0]] if begin is not None and prompt[0] == begin else []
    return kept + prompt[over + len(kept) :]


class Tokenize:
    """Prompt and answer text to `input_ids` and `labels`, as training and inference share them."""

    def __init__(self, section: params.Prepare, tokenizer, special_tokens: bool):
        self.section, self.tokenizer, self.special_tokens = section, tokenizer, special_tokens
        self.truncated = 0
        self.longest_answer = 0

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]

    def __call__(self, batch: list[Row]) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer tokens of each row; the answer ends with the end-of-text token.

        Raises:
            UserError: an answer that does not fit into max_seq_len behind at least one prompt token.
        """
        end, limit = self.tokenizer.eos_token_id, self.section.max_seq_len
        heads = self._encode([row.prompt for row in batch], self.special_tokens)
        tails = self._encode([row.tail for row in batch], False)
        pairs, cut = [], []
        for row, head, tail in zip(batch, heads, tails, strict=True):
            if self.special_tokens and head and head[-1] == end:
                head = head[:-1]  # some tokenizers close every text; the prompt goes on
            tail = tail if tail and tail[-1] == end else [*tail, end]
            if len(tail) + 1 > limit:
                cut.append(f"  {row.file}: row {row.line}: the answer has {len(tail)} tokens (with its end token)")
                continue
            kept = truncate(head, tail, limit, self.tokenizer.bos_token_id)
            self.truncated += len(kept) < len(head)
            self.longest_answer = max(self.longest_answer, len(tail))
            pairs.append((kept, tail))
        if cut:
            more = f"\n  and {len(cut) - SHOWN} more" if len(cut) > SHOWN else ""
            raise UserError(
                f"prepare.max_seq_len: {limit} tokens cut off an answer; raise it.\n" + "\n".join(cut[:SHOWN]) + more
            )
        return pairs


class Writer:
    """One split's Parquet file, written a batch at a time."""

    def __init__(self, path: Path, section: params.Prepare, pad_id: int, join: bool):
        import pyarrow
        import pyarrow.parquet

        self.arrow, self.section, self.pad_id, self.join = pyarrow, section, pad_id, join
        ids = pyarrow.list_(pyarrow.int32())
        fields = [
            ("row", pyarrow.int64()),
            ("prompt", pyarrow.string()),
            ("answer", pyarrow.string()),
            ("input_ids", ids),
            ("labels", ids),
        ]
        if section.use_attention_mask:
            fields.append(("attention_mask", pyarrow.list_(pyarrow.int8())))
        self.schema = pyarrow.schema(fields)
        self.file = pyarrow.parquet.ParquetWriter(path, self.schema)
        self.open: list = []  # the sequence being filled, with strategy join
        self.lengths: Counter = Counter()
        self.tokens = self.answer_tokens = 0

    def write(self, batch: list[Row], pairs: list[tuple[list[int], list[int]]]) -> None:
        examples = []
        for row, (head, tail) in zip(batch, pairs, strict=True):
            example = (row.line, row.prompt, row.answer, head + tail, [IGNORED] * len(head) + tail)
            if not self.join:
                examples.append(example)
            elif not self.open:
                self.open = [example]
            elif sum(len(one[3]) for one in self.open) + len(example[3]) <= self.section.max_seq_len:
                self.open.append(example)
            else:
                examples.append(self._joined())
                self.open = [example]
        self._flush(examples)

    def _joined(self) -> tuple:
        first = self.open[0]
        return (
            first[0],
            "".join(one[1] + one[2] for one in self.open[:-1]) + self.open[-1][1],
            self.open[-1][2],
            [token for one in self.open for token in one[3]],
            [label for one in self.open for label in one[4]],
        )

    def _flush(self, examples: list[tuple]) -> None:
        if not examples:
            return
        columns: dict[str, list] = {name: [] for name in self.schema.names}
        for number, prompt, answer, ids, labels in examples:
            self.lengths[len(ids)] += 1
            self.tokens += len(ids)
            self.answer_tokens += sum(label != IGNORED for label in labels)
            padding = self.section.max_seq_len - len(ids) if self.section.pad_to_max_len else 0
            values = [
                number,
                prompt,
                answer,
                ids + [self.pad_id] * padding,
                labels + [IGNORED] * padding,
                [1] * len(ids) + [0] * padding,
            ]
            for name, value in zip(self.schema.names, values, strict=False):
                columns[name].append(value)
        self.file.write_table(self.arrow.table(columns, schema=self.schema))

    def close(self) -> None:
        if self.open:
            self._flush([self._joined()])
        self.file.close()


def lengths_summary(lengths: Counter) -> dict:
    """Minimum, median, 95th percentile and maximum of sequence lengths in tokens, with the histogram."""
    if not lengths:
        return {"min": 0, "median": 0, "p95": 0, "max": 0, "histogram": {}}
    keys = sorted(lengths)
    counts = np.cumsum([lengths[key] for key in keys])

    def quantile(share: float) -> int:
        return keys[int(np.searchsorted(counts, share * counts[-1]))]

    histogram = {str(key): lengths[key] for key in keys}
    return {"min": keys[0], "median": quantile(0.5), "p95": quantile(0.95), "max": keys[-1], "histogram": histogram}


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base model's folder (for its tokenizer)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the dataset to")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write statistics to")
    parser.add_argument(
        "--downloads", type=Path, help="folder where a broken download is kept and goes on (default: nothing is kept)"
    )
    args = parser.parse_args(argv)
    with cli.job("prepare", args.log) as job:
        everything = params.load(args.params)
        section = everything.prepare
        with outputs.written(args.output, [args.report]) as (folder, report):
            with downloading(args.downloads, folder.parent) as downloads:
                statistics = prepare(section, args.base, folder, downloads, job, "evaluate" in everything.all.stages)
            outputs.write_json(report, statistics)
        counts = statistics["rows"]
        for name, gate in everything.gates.every().items() if "gates" in everything.all.stages else ():
            if counts["test"] < gate.rows_needed():  # said now, before hours of training
                job.say(
                    f"gates.{name} needs {gate.rows_needed()} test rows; there are {counts['test']}: the build will fail at gates"
                )
        job.say(
            f"{counts['train']} train, {counts['eval']} eval and {counts['test']} test rows in {args.output} "
            f"({statistics['duplicates']['removed_from_train']} duplicates removed, {statistics['truncated']} prompts truncated, {job.seconds():.0f} s)"
        )


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
        UserError: no row to train on, or a label that only held-out rows have: the model could not learn it.
    """
    if not (split == 0).any():
        if (before == 0).any():
            raise UserError(
                f"prepare: all {(before == 0).sum()} training rows repeat eval or test rows and were left out as duplicates. Add other "
                "rows, or mend the data: the same few texts again and again teach nothing that held-out rows could measure."
            )
        raise UserError("prepare: no row is left for training. Lower eval_fraction and test_fraction, or add rows.")
    answers, codes = store.answers(), store.answer_codes()
    trained = set(np.unique(codes[split == 0]))
    if answers is None or len(trained) * 2 > (split == 0).sum():
        return None
    for number in np.flatnonzero(split > 0):
        if codes[number] not in trained:
            row = store.row(number)
            gone = int(((before == 0) & (codes == codes[number])).sum())
            why = f" (the {gone} it had repeat held-out rows and were left out as duplicates)" if gone else ""
            raise UserError(
                f"{row.file}: row {row.line}: the answer {json.dumps(row.answer, ensure_ascii=False)} is in {SPLITS[split[number]]} but in no "
                f"training row{why}, so the model cannot learn it. Mend the label, or add training rows with it."
            )
    return sorted(answers[code] for code in trained)


def drop_duplicates(section: params.Prepare, store: Store, split: np.ndarray) -> int:
    """Leave out (or refuse) rows that repeat a row of eval or test. Changes `split`; returns how many were left out."""
    copies = copies_of_held_out(store, split, section.near_duplicate_threshold)
    if copies and section.duplicates == "refuse":
        shown = []
        for number, other in copies[:SHOWN]:
            row, held = store.row(number), store.row(other)
            shown.append(
                f"  {row.file}: row {row.line} ({SPLITS[split[number]]}) repeats {held.file}: row {held.line} ({SPLITS[split[other]]})"
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
    """Raise UserError where no row is held out for evaluate: said now, before hours of training."""
    if not (split == SPLITS.index("test")).any():
        raise UserError(
            f"prepare: the test split is empty, so evaluate (all.stages) could not score anything: test_fraction is "
            f"{section.test_fraction:g}, max_samples {section.max_samples or 'null'}, and there are {len(split)} rows. Raise test_fraction or "
            "max_samples, add rows, or name a file in prepare.source.test."
        )


def prepare(section: params.Prepare, base: Path, folder: Path, downloads: Path, job: cli.Job, scored: bool) -> dict:
    """Run all of it: bring remote files here, validate into a temporary store, split, drop duplicates, tokenize.

    Args:
        scored: evaluate will score the test split, so it must not be empty.

    Returns:
        The statistics.
    """
    tokenizer = load_tokenizer(base)
    check_room(section, base)
    form = Form(section, tokenizer)
    files = {name: bring(parse(text), "dataset", downloads / name, job) for name, text in section.files.items()}

    with Store(folder / ".rows.sqlite", FEW_ANSWERS) as store:
        sizes = {name: store.add(read_valid(file.record["source"], form, file.path)) for name, file in files.items()}
        split = split_rows(section, store, sizes)
        if scored:
            check_test_split(section, split)
        before = split.copy()
        drop_duplicates(section, store, split)
        gone = {name: int(((before == i) & (split < 0)).sum()) for i, name in enumerate(SPLITS)}
        labels = check_labels(store, split, before)
        within = store.exact_duplicates(split == 0)

        tokenize = Tokenize(section, tokenizer, form.special_tokens)
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        writers = [
            Writer(folder / f"{name}.parquet", section, pad_id, section.strategy == "join" and name != "test")
            for name in SPLITS
        ]
        with job.progress(int((split >= 0).sum()), "rows") as bar:
            for numbers, batch in store.batches(BATCH):
                for index, writer in enumerate(writers):
                    chosen = [row for row, own in zip(batch, split[numbers] == index, strict=True) if own]
                    if chosen:
                        writer.write(chosen, tokenize(chosen))
                        bar.update(len(chosen))
        for writer in writers:
            writer.close()
        answers, codes = store.answers(), store.answer_codes().copy()

    outputs.write_json(
        folder / "prompt.json",
        {
            "prompt": form.head,
            "answer": form.tail,
            "fields": form.prompt_fields,
            "add_special_tokens": form.special_tokens,
            "end_token": tokenizer.eos_token,
            "end_token_id": tokenizer.eos_token_id,
            "labels": labels,
            "longest_answer_tokens": tokenize.longest_answer,
        },
    )
    per_label = {}
    for index, name in enumerate(SPLITS):
        numbers, amounts = np.unique(codes[split == index], return_counts=True)
        per_label[name] = (
            {answers[code]: int(amount) for code, amount in zip(numbers, amounts, strict=True)} if labels else {}
        )
    return {
        "source": {name: file.record for name, file in files.items()},
        "rows": {"read": len(split), **{name: int((split == index).sum()) for index, name in enumerate(SPLITS)}},
        "sequences": {name: sum(writer.lengths.values()) for name, writer in zip(SPLITS, writers, strict=True)},
        "tokens": {name: writer.tokens for name, writer in zip(SPLITS, writers, strict=True)},
        "answer_tokens": {name: writer.answer_tokens for name, writer in zip(SPLITS, writers, strict=True)},
        "length": lengths_summary(sum((writer.lengths for writer in writers), Counter())),
        "labels": per_label,
        "truncated": tokenize.truncated,
        "duplicates": {"removed_from_train": gone["train"], "removed_from_eval": gone["eval"], "within_train": within},
    }


def check_room(section: params.Prepare, base: Path) -> None:
    """Raise UserError where rows may be longer than what the base model reads."""
    config = base / "config.json"
    room = outputs.read_json(config, output=base).get("max_position_embeddings") if config.is_file() else None
    if room and section.max_seq_len > room:
        raise UserError(
            f"prepare.max_seq_len: {section.max_seq_len} is more than the base model reads: {room} tokens (max_position_embeddings in "
            f"{config}). Lower it."
        )


def load_tokenizer(base: Path):
    """The base model's tokenizer, from local files only."""
    if not base.is_dir():
        raise UserError(f"{base}: no such folder. Build it with `snakemake --cores all {base}`.")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base, trust_remote_code=False, local_files_only=True)


if __name__ == "__main__":
    main()
