"""prepare: rows in, tokenized train, eval and test splits out."""

import contextlib
import csv
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny import TONES, make_rows, make_tokenizer, run_script, write_params

from scripts import prepare
from slmake.data import splits as splits_module
from slmake.data import tokenize
from slmake.data.rows import read_rows
from slmake.data.store import Row, Store

END = 0  # id of <|end|> in the test tokenizer
TEMPLATE = "### Text: {phrase}\n### The tone is:\n{tone}"
# Everything is set here, so that the project's own params.yaml can change.
FIELDS = {
    "text_template": TEMPLATE,
    "messages": None,
    "answer": None,
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


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A folder with the test tokenizer only: prepare reads nothing else of the base model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    """The test tokenizer."""
    return tokenize.load_tokenizer(tokenizer_folder)


def other_chat(tokenizer_folder: Path, folder: Path, chat_template: str | None) -> Path:
    """A copy of the test tokenizer with another chat template, or with none."""
    tokenizer = tokenize.load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def build(tmp_path, tokenizer_folder):
    """Run prepare's main in this process: build(rows or source, name=…, base=…, field=value…)."""

    def run(source, name: str = "dataset", base: Path | None = None, stages=("finetune",), **fields) -> Built:
        if isinstance(source, list):
            source = write_rows(tmp_path / f"{name}-rows.json", source)
        source = {key: str(file) for key, file in source.items()} if isinstance(source, dict) else str(source)
        given = {**FIELDS, "source": source, **fields}
        params = write_params(tmp_path / f"{name}.yaml", all={"stages": list(stages)}, prepare=given)
        folder, report = tmp_path / name, tmp_path / f"{name}-report.json"
        places = ["--base", base or tokenizer_folder, "--output", folder, "--report", report]
        prepare.main([str(part) for part in ["--params", params, *places]])
        tables = [pyarrow.parquet.read_table(folder / f"{split}.parquet").to_pylist() for split in splits_module.SPLITS]
        return Built(folder, json.loads(report.read_text(encoding="utf-8")), *tables)

    return run


@pytest.fixture
def refused(build, tmp_path, capsys, monkeypatch):
    """Run prepare, expect exit code 1, one clear message and no output; return the message."""

    def run(source, **options) -> str:
        monkeypatch.setattr(logging, "raiseExceptions", False)  # libraries keep an earlier test's stderr, closed now
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            build(source, **options)
        assert stopped.value.code == 1
        told = capsys.readouterr().err
        assert "Traceback" not in told
        left = [path.name for path in tmp_path.iterdir() if "dataset-report" in path.name or ".partial" in path.name]
        assert left == []
        assert not (tmp_path / "dataset").exists()
        assert told.count("prepare: error: ") == 1
        return told.split("prepare: error: ")[1].strip()

    return run


def numbers(split: list[dict]) -> set[int]:
    return {row["row"] for row in split}


def flat(lists: Iterable[list]) -> list:
    return list(chain.from_iterable(lists))


# The loss is on the answer only


def test_loss_is_on_the_answer_only(build, tokenizer):
    """Decoded: -100 over the prompt, then the answer's own ids, then the end token, in every row of every split."""
    rows = make_rows(96)
    built = build(rows)
    for example in built.train + built.eval + built.test:
        source = rows[example["row"] - 1]
        ids, labels = example["input_ids"], example["labels"]
        start = next(i for i, label in enumerate(labels) if label != -100)
        assert labels[:start] == [-100] * start
        assert labels[start:] == ids[start:]
        assert labels[-1] == ids[-1] == END
        assert END not in ids[:-1]
        assert tokenizer.decode(ids[:start]) == example["prompt"] == f"### Text: {source['phrase']}\n### The tone is:\n"
        assert tokenizer.decode(ids[start:-1]) == example["answer"] == source["tone"]


def test_answer_that_brings_its_end_token_gets_no_second_one(build):
    built = build(make_rows(96), text_template=TEMPLATE + "<|end|>")
    assert all(example["input_ids"].count(END) == 1 and example["labels"][-1] == END for example in built.train)


def test_answer_starts_at_the_named_field(build, tokenizer):
    """`answer` may be an earlier placeholder; what follows it belongs to the answer."""
    rows = [{**row, "why": f"because of {i}"} for i, row in enumerate(make_rows(96))]
    built = build(rows, text_template="Q: {phrase}\nA: {tone}\nWhy: {why}", answer="tone", **WHOLE)
    first = built.train[0]
    assert first["prompt"] == f"Q: {rows[0]['phrase']}\nA: "
    assert first["answer"] == "sadness\nWhy: because of 0"
    scored = [label for label in first["labels"] if label != -100]
    assert tokenizer.decode(scored) == "sadness\nWhy: because of 0<|end|>"


def test_tokens_are_those_of_inference(build, tokenizer):
    """prompt.json's template, filled in and tokenized as it says, gives the very prompt tokens of training."""
    rows = make_rows(96)
    built = build(rows)
    form = built.prompt
    for example in built.test:
        text = form["prompt"].format(**{name: rows[example["row"] - 1][name] for name in form["fields"]})
        ids = tokenizer(text, add_special_tokens=form["add_special_tokens"])["input_ids"]
        assert ids == [i for i, tag in zip(example["input_ids"], example["labels"], strict=True) if tag == -100]


def test_prompt_json_tells_inference_all_it_needs(build):
    built = build(make_rows(96))
    longest = max(sum(label != -100 for label in row["labels"]) for row in built.train + built.eval + built.test)
    assert built.prompt == {
        "prompt": "### Text: {phrase}\n### The tone is:\n",
        "answer": "{tone}",
        "fields": ["phrase"],
        "add_special_tokens": True,
        "end_token": "<|end|>",
        "end_token_id": 0,
        "labels": ["fear", "joy", "sadness", "surprise"],
        "longest_answer_tokens": longest,
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text_template": TEMPLATE + "\n"}, "a line end after the answer"),
        (
            {**CHAT, "messages": [{"role": "user", "content": "{phrase}"}, {"role": "assistant", "content": "{tone}"}]},
            "",
        ),
    ],
    ids=["line-end", "chat"],
)
def test_labels_are_the_plain_answers(build, fields, expected):
    """What closes a turn is no part of a label: evaluate compares labels with generated text without it."""
    built = build(make_rows(96), **fields)
    assert built.prompt["labels"] == ["fear", "joy", "sadness", "surprise"], expected
    assert built.report["labels"]["test"] == dict.fromkeys(TONES, 5)


# Splits


def test_splits_are_stratified_and_disjoint(build):
    built = build(make_rows(96))
    assert [len(built.train), len(built.eval), len(built.test)] == [72, 4, 20]
    for split, each in ((built.train, 18), (built.eval, 1), (built.test, 5)):
        assert Counter(row["answer"] for row in split) == dict.fromkeys(TONES, each)
    assert numbers(built.train) | numbers(built.eval) | numbers(built.test) == set(range(1, 97))
    assert len(built.train) + len(built.eval) + len(built.test) == 96


def test_same_seed_gives_the_same_bytes(build, tmp_path):
    source = write_rows(tmp_path / "rows.json", make_rows(96))
    first, second = build(source, name="first"), build(source, name="second")
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == ["eval.parquet", "prompt.json", "test.parquet", "train.parquet"]
    for name in names:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    assert (tmp_path / "first-report.json").read_bytes() == (tmp_path / "second-report.json").read_bytes()


def test_another_seed_gives_another_split(build):
    first, second = build(make_rows(96), name="first"), build(make_rows(96), name="second", seed=43)
    assert numbers(first.test) != numbers(second.test)
    assert len(first.test) == len(second.test) == 20


@pytest.mark.parametrize(
    ("eval_fraction", "test_fraction", "counts"),
    [(0.0, 0.0, [96, 0, 0]), (0.25, 0.25, [48, 24, 24]), (0.0, 0.5, [48, 0, 48]), (0.4, 0.5, [8, 40, 48])],
)
def test_fractions(build, eval_fraction, test_fraction, counts):
    built = build(make_rows(96), eval_fraction=eval_fraction, test_fraction=test_fraction)
    assert [len(built.train), len(built.eval), len(built.test)] == counts
    assert [built.report["rows"][name] for name in splits_module.SPLITS] == counts


def test_free_text_is_split_without_strata(build):
    """More than 50 different answers: no labels, and sizes by the fractions of the whole."""
    rows = [{"phrase": row["phrase"], "tone": f"reply number {i}"} for i, row in enumerate(make_rows(96))]
    built = build(rows)
    assert [len(built.train), len(built.eval), len(built.test)] == [72, 5, 19]
    assert built.prompt["labels"] is None
    assert built.report["labels"] == {"train": {}, "eval": {}, "test": {}}


@pytest.mark.parametrize(("answers", "copies"), [(48, 1), (48, 2), (30, 4)])
def test_fractions_hold_for_small_classes(build, answers, copies):
    """A quarter of the rows is held out even if a quarter of each answer's rows is less than one."""
    rows = [
        {"phrase": row["phrase"], "tone": f"class {i % answers}"} for i, row in enumerate(make_rows(answers * copies))
    ]
    params = {"eval_fraction": 0.0, "test_fraction": 0.25, "near_duplicate_threshold": 1.0}
    assert len(build(rows, **params).test) == pytest.approx(answers * copies / 4, abs=1)


@pytest.mark.parametrize("answers", [50, 51, 96])
def test_number_of_different_answers_makes_no_row_disappear(build, answers):
    """Up to 50 different answers are told apart, more are not; every row is in a split either way."""
    rows = [{"phrase": row["phrase"], "tone": f"class {i % answers}"} for i, row in enumerate(make_rows(96))]
    built = build(rows, near_duplicate_threshold=1.0)
    assert numbers(built.train) | numbers(built.eval) | numbers(built.test) == set(range(1, 97))
    assert built.report["rows"]["read"] == 96


def test_nothing_left_to_train_on(refused, tmp_path):
    """The same file for train and test: every training row repeats a test row."""
    source = write_rows(tmp_path / "rows.json", make_rows(24))
    told = refused({"train": source, "test": source}, eval_fraction=0.0)
    assert told.startswith("prepare: all 24 training rows repeat eval or test rows and were left out as duplicates.")


@pytest.mark.parametrize(("count", "fields"), [(1, {}), (24, {"test_fraction": 0.0}), (24, {"max_samples": 1})])
def test_empty_test_split_where_evaluate_is_to_run(build, refused, count, fields):
    told = refused(make_rows(count), stages=["finetune", "evaluate"], **fields)
    assert told.startswith("prepare: the test split is empty, so evaluate (all.stages) could not score anything: ")
    for part in ("test_fraction is ", "max_samples ", f"there are {count} rows"):
        assert part in told
    assert len(build(make_rows(count), name="unscored", **fields).test) == 0


def test_label_whose_training_rows_were_all_duplicates(refused, tmp_path):
    """The error says that the label was there, and why its rows are gone."""
    held = {"phrase": "Not one of us saw the second moon coming", "tone": "awe"}
    source = {
        "train": write_rows(tmp_path / "train.json", [*make_rows(24), held, held]),
        "test": write_rows(tmp_path / "test.json", [held]),
    }
    assert (
        'row 1: the answer "awe" is in test but in no training row (the 2 it had repeat held-out rows and were left out as duplicates)'
        in refused(source, eval_fraction=0.0)
    )


def test_one_file_per_split(build, tmp_path):
    """Each file's rows go to its own split, whatever the fractions say."""
    rows = make_rows(96)
    parts = {"train": rows[:64], "eval": rows[64:76], "test": rows[76:]}
    source = {name: write_rows(tmp_path / f"{name}.json", part) for name, part in parts.items()}
    built = build(source)
    assert [len(built.train), len(built.eval), len(built.test)] == [64, 12, 20]
    assert [row["row"] for row in built.test] == list(range(1, 21))
    assert [row["prompt"] for row in built.eval] == [
        f"### Text: {r['phrase']}\n### The tone is:\n" for r in rows[64:76]
    ]
    assert set(built.report["source"]) == {"train", "eval", "test"}


@pytest.mark.parametrize(("given", "counts"), [("test", [56, 8, 32]), ("eval", [48, 32, 16]), (None, [40, 8, 16])])
def test_missing_split_is_cut_from_the_train_file(build, tmp_path, given, counts):
    rows = make_rows(96)
    source = {"train": write_rows(tmp_path / "train.json", rows[:64])}
    if given:
        source[given] = write_rows(tmp_path / "held.json", rows[64:])
    built = build(source, eval_fraction=0.125, test_fraction=0.25)
    held = {"test": built.test, "eval": built.eval}.get(given, [])
    assert len(held) == (32 if given else 0)
    assert [len(built.train), len(built.eval), len(built.test)] == counts


def test_max_samples(build):
    """A random sample, the same for the same seed, before splitting."""
    built = build(make_rows(96), max_samples=40)
    kept = numbers(built.train) | numbers(built.eval) | numbers(built.test)
    assert len(kept) == len(built.train) + len(built.eval) + len(built.test) == 40
    assert kept != set(range(1, 41))
    assert built.report["rows"]["read"] == 96
    assert 6 <= len(built.test) <= 10
    again = build(make_rows(96), name="again", max_samples=40)
    assert numbers(again.train) == numbers(built.train)


def test_max_samples_above_the_rows_takes_all(build):
    assert build(make_rows(24), max_samples=1000, **WHOLE).report["rows"]["train"] == 24


def test_label_that_only_held_out_rows_have(refused, tmp_path):
    source = {
        "train": write_rows(tmp_path / "train.json", make_rows(48)),
        "test": write_rows(
            tmp_path / "test.json", [*make_rows(60)[48:], {"phrase": "What a mess this is", "tone": "angr"}]
        ),
    }
    told = refused(source)
    assert told.startswith(f'{source["test"]}: row 13: the answer "angr" is in test but in no training row')


def test_splits_of_more_rows_than_a_batch(build):
    """5,000 rows pass through prepare's batches of 2,048 complete and in order."""
    rows = [{"phrase": f"{i} {i * 31 % 997} {i * 17 % 613} {i * 7 % 411}", "tone": TONES[i % 4]} for i in range(5000)]
    built = build(rows, near_duplicate_threshold=1.0)
    assert [len(built.train), len(built.eval), len(built.test)] == [3752, 248, 1000]
    for split in (built.train, built.eval, built.test):
        assert [row["row"] for row in split] == sorted(row["row"] for row in split)
    assert all(row["answer"] == TONES[(row["row"] - 1) % 4] for row in built.test)


# Formats

TRICKY = [
    {"phrase": 'He said "NA", twice', "tone": "NA", "code": "007"},
    {"phrase": "two\nlines, one text", "tone": "null", "code": "1e5"},
    {"phrase": "  blanks around  ", "tone": "3.10", "code": "-0"},
    {"phrase": "Grüße 🙂 你好", "tone": "true", "code": "1,000"},
    {"phrase": "back\\slash {brace}", "tone": "nan", "code": "0x10"},
]


@pytest.fixture
def tricky(build, tmp_path) -> Built:
    source = write_rows(tmp_path / "tricky.json", TRICKY)
    return build(source, name="reference", text_template="{phrase}|{code}\n{tone}", **WHOLE)


def test_texts_arrive_unchanged(tricky):
    texts = [(row["prompt"], row["answer"]) for row in tricky.train]
    assert texts == [(f"{row['phrase']}|{row['code']}\n", row["tone"]) for row in TRICKY]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_formats_give_the_same_rows(build, tricky, tmp_path, ending):
    """JSON Lines, CSV and Parquet give byte for byte the same splits as a JSON array."""
    source = write_rows(tmp_path / f"tricky{ending}", TRICKY)
    built = build(source, text_template="{phrase}|{code}\n{tone}", **WHOLE)
    for name in ("train.parquet", "eval.parquet", "test.parquet", "prompt.json"):
        assert (built.folder / name).read_bytes() == (tricky.folder / name).read_bytes()


@pytest.mark.parametrize("ending", [".json", ".csv", ".jsonl"])
def test_byte_order_mark_is_not_text(build, tmp_path, ending):
    source = write_rows(tmp_path / f"rows{ending}", make_rows(24))
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert len(build(source, **WHOLE).train) == 24


def test_json_lines_in_a_json_file(build, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", make_rows(24)).rename(tmp_path / "rows.json")
    assert len(build(source, **WHOLE).train) == 24


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
def test_dates_stay_text(build, tmp_path, ending):
    """A column that looks like dates is text all the same: the answer of an extraction task, for one."""
    rows = [{"phrase": f"The meeting is on day {i} of May", "tone": f"2024-05-{i:02d}"} for i in range(1, 25)]
    built = build(write_rows(tmp_path / f"rows{ending}", rows), **WHOLE)
    assert [row["answer"] for row in built.train][:2] == ["2024-05-01", "2024-05-02"]


@pytest.mark.parametrize(
    ("content", "row"),
    [
        ("phrase,tone\nI like it, a lot,joy\nI hate it, a lot,fear\n", 1),
        ("tone,phrase\njoy,I like it,\nfear,I hate it,\n", 1),
        ("phrase,tone\nI like it,joy\nI hate it, a lot,fear\n", 2),
        ("tone,phrase\njoy,I like it\nfear\n", 2),
    ],
    ids=["all-too-long", "comma-at-the-end", "one-too-long", "one-too-short"],
)
def test_csv_row_that_does_not_fit_its_header(refused, tmp_path, content, row):
    """A row with more or fewer values than columns is refused and named; its values are never shifted."""
    source = tmp_path / "rows.csv"
    source.write_text(content, encoding="utf-8")
    told = refused(source, **WHOLE)
    assert str(source) in told
    assert re.search(rf"\brow {row}\b|\bline {row + 1}\b", told)


# Sequences


def test_join_packs_whole_rows(build):
    """The same tokens and labels in the same order, cut between rows only, each sequence filled as far as rows fit."""
    apart, joined = build(make_rows(96), name="apart"), build(make_rows(96), strategy="join")
    for split in ("train", "eval"):
        rows, sequences = getattr(apart, split), getattr(joined, split)
        for column in ("input_ids", "labels", "attention_mask"):
            assert flat(one[column] for one in sequences) == flat(one[column] for one in rows)
        left = [len(row["input_ids"]) for row in rows]
        for one in sequences:
            filled = 0
            while left and filled + left[0] <= 128:
                filled += left.pop(0)
            assert len(one["input_ids"]) == len(one["labels"]) == filled
        assert left == []
    assert len(joined.train) < 72 == joined.report["rows"]["train"]
    assert joined.report["sequences"] == {"train": len(joined.train), "eval": len(joined.eval), "test": 20}
    assert joined.test == apart.test


def test_join_ends_every_row_with_the_end_token(build):
    joined = build(make_rows(96), strategy="join", **WHOLE)
    assert sum(one["labels"].count(END) for one in joined.train) == 96
    assert all(one["labels"][-1] == END and one["labels"][0] == -100 for one in joined.train)


def test_pad_to_max_len(build):
    plain, padded = build(make_rows(96), name="plain"), build(make_rows(96), pad_to_max_len=True)
    for before, after in zip(plain.train + plain.test, padded.train + padded.test, strict=True):
        size = len(before["input_ids"])
        assert len(after["input_ids"]) == len(after["labels"]) == len(after["attention_mask"]) == 128
        assert after["input_ids"] == before["input_ids"] + [END] * (128 - size)
        assert after["labels"] == before["labels"] + [-100] * (128 - size)
        assert after["attention_mask"] == [1] * size + [0] * (128 - size)
    assert padded.report["tokens"] == plain.report["tokens"]
    assert padded.report["length"] == plain.report["length"]


@pytest.mark.parametrize("use", [True, False])
def test_use_attention_mask(build, use):
    built = build(make_rows(24), use_attention_mask=use, **WHOLE)
    assert list(built.train[0]) == ["row", "prompt", "answer", "input_ids", "labels"] + ["attention_mask"] * use


def test_long_prompts_lose_their_start_and_are_counted(build, tokenizer):
    whole, cut = build(make_rows(96), name="whole"), build(make_rows(96), max_seq_len=16)
    longer = 0
    for before, after in zip(whole.train + whole.eval + whole.test, cut.train + cut.eval + cut.test, strict=True):
        assert after["input_ids"] == before["input_ids"][-16:]
        assert after["labels"] == before["labels"][-16:]
        assert tokenizer.decode([label for label in after["labels"] if label != -100]) == before["answer"] + "<|end|>"
        longer += len(before["input_ids"]) > 16
    assert cut.report["truncated"] == longer > 90
    assert cut.report["length"]["max"] == 16
    assert whole.report["truncated"] == 0


def test_truncation_keeps_the_begin_token():
    assert tokenize.truncate([1, 5, 6, 7, 8], [9, 0], 5, 1) == [1, 7, 8]
    assert tokenize.truncate([1, 5, 6, 7, 8], [9, 0], 5, None) == [6, 7, 8]
    assert tokenize.truncate([5, 6, 7, 8], [9, 0], 5, 1) == [6, 7, 8]
    assert tokenize.truncate([1, 5, 6], [9, 0], 5, 1) == [1, 5, 6]


def test_answer_that_does_not_fit_is_an_error(refused, tmp_path, tokenizer):
    """Every row whose answer would be cut off is named with its length."""
    rows = make_rows(12)
    rows[4]["tone"] = rows[9]["tone"] = "a very long answer that no short sequence can ever hold in full"
    source = write_rows(tmp_path / "rows.json", rows)
    size = len(tokenizer(rows[4]["tone"])["input_ids"]) + 1
    assert refused(source, max_seq_len=8, **WHOLE) == (
        "prepare.max_seq_len: 8 tokens cut off an answer; raise it.\n"
        f"  {source}: row 5: the answer has {size} tokens (with its end token)\n"
        f"  {source}: row 10: the answer has {size} tokens (with its end token)"
    )


def test_rows_longer_than_the_model_reads(refused, rows_file, base):
    assert refused(rows_file, base=base, max_seq_len=513) == (
        f"prepare.max_seq_len: 513 is more than the base model reads: 512 tokens (max_position_embeddings in {base}/config.json). Lower it."
    )


# Templates


def test_braces_in_a_text_template(build):
    built = build(make_rows(24), text_template='{{"text": "{phrase}", "tone": }}\n{tone}', **WHOLE)
    phrase = make_rows(1)[0]["phrase"]
    assert built.train[0]["prompt"] == f'{{"text": "{phrase}", "tone": }}\n'


def test_literal_braces_around_the_answers_name(build):
    """`{{tone}}` is the text {tone}, not the place of the answer."""
    built = build(make_rows(24), text_template="Write {{tone}} for {phrase}: {tone}", **WHOLE)
    assert built.train[0]["prompt"] == f"Write {{tone}} for {make_rows(1)[0]['phrase']}: "
    assert built.train[0]["answer"] == "sadness"


def test_braces_in_rows_are_text(build):
    rows = [{**row, "phrase": row["phrase"] + " {tone} {0} }{"} for row in make_rows(24)]
    assert build(rows, **WHOLE).train[0]["prompt"] == f"### Text: {rows[0]['phrase']}\n### The tone is:\n"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"text_template": "{phrase} {"},
            "prepare.text_template: Single '{' encountered in format string. Write {{ and }}",
        ),
        ({"text_template": "{phrase!r} {tone}"}, "`{phrase!r}` is not a plain field name such as {phrase}."),
        ({"text_template": "{phrase:>10} {tone}"}, "`{phrase:>10}` is not a plain field name such as {phrase}."),
        ({"text_template": "{phrase} {phrase:} {tone}"}, "`{phrase:}` is not a plain field name such as {phrase}."),
        ({"text_template": "\ud83d {phrase} {tone}"}, "prepare.text_template: holds half a surrogate pair"),
        ({"text_template": "{0} {tone}"}, "prepare.text_template: `{0}` is not a plain field name such as {phrase}."),
        ({"text_template": "no field"}, "prepare.text_template: no placeholder such as {phrase} in it."),
        ({"text_template": "{phrase}"}, "nothing stands before the answer, so there is no prompt."),
        (
            {"answer": "mood"},
            "prepare.answer: `mood` is not a placeholder of text_template. Placeholders: phrase, tone.",
        ),
    ],
)
def test_template_errors(refused, fields, told):
    assert told in refused(make_rows(24), **fields)


def test_answer_never_stands_in_the_prompt(build):
    """`{tone:}` with an empty format is either the answer's place or refused; it must not leak into the prompt."""
    with contextlib.suppress(SystemExit):
        built = build(make_rows(24), text_template="{phrase} {tone:}", **WHOLE)
        assert built.train[0]["prompt"] == make_rows(1)[0]["phrase"] + " "


MESSAGES = [
    {"role": "system", "content": 'Answer with one word, such as {{"joy"}}.'},
    {"role": "user", "content": "Tone of: {phrase}"},
    {"role": "assistant", "content": "{tone}"},
]


def test_messages_as_templates(build, tokenizer):
    """The chat template frames the turns; the loss is on the assistant's turn and ends with one end token."""
    rows = make_rows(96)
    built = build(rows, messages=MESSAGES, **CHAT)
    for example in built.train + built.test:
        row = rows[example["row"] - 1]
        assert example["prompt"] == (
            '<|start|>system\nAnswer with one word, such as {"joy"}.<|end|>\n'
            f"<|start|>user\nTone of: {row['phrase']}<|end|>\n<|start|>assistant\n"
        )
        labels = example["labels"]
        start = next(i for i, label in enumerate(labels) if label != -100)
        assert tokenizer.decode(example["input_ids"][:start]) == example["prompt"]
        assert tokenizer.decode(labels[start:]) == row["tone"] + "<|end|>"
        assert labels[-1] == END
        assert labels.count(END) == 1
    assert built.prompt["add_special_tokens"] is False
    assert built.prompt["fields"] == ["phrase"]


def test_inference_fills_the_chat_prompt_alike(build):
    built = build(make_rows(96), messages=MESSAGES, **CHAT)
    example = built.test[0]
    phrase = make_rows(96)[example["row"] - 1]["phrase"]
    assert built.prompt["prompt"].format(phrase=phrase) == example["prompt"]


def test_braces_of_the_chat_template_survive(build, tmp_path, tokenizer_folder):
    """Braces that the chat template writes, that a content escapes and that a row holds all come out as they are."""
    chat = "{% for m in messages %}{{ '{' + m['role'] + '}' }}{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}{{ '{assistant}' }}{% endif %}"
    base = other_chat(tokenizer_folder, tmp_path / "base", chat)
    rows = [{**row, "phrase": "{x} " + row["phrase"]} for row in make_rows(24)]
    messages = [{"role": "user", "content": "{{json}} {phrase}"}, {"role": "assistant", "content": "{tone}"}]
    built = build(rows, base=base, messages=messages, **CHAT, **WHOLE)
    assert built.train[0]["prompt"] == "{user}{json} " + rows[0]["phrase"] + "<|end|>{assistant}"


def chat_rows(count: int) -> list[dict]:
    """Rows with a column of messages: every second one has two rounds."""
    rows = []
    for i, row in enumerate(make_rows(count)):
        earlier = [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": "Hi {name}"}] * (i % 2)
        turns = [{"role": "user", "content": row["phrase"]}, {"role": "assistant", "content": row["tone"]}]
        rows.append({"turns": earlier + turns, "id": str(i)})
    return rows


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_messages_as_a_column(build, tokenizer, tmp_path, ending):
    """Only the last assistant turn is trained on, whatever the number of turns."""
    rows = chat_rows(24)
    built = build(write_rows(tmp_path / f"rows{ending}", rows), messages="turns", **CHAT, **WHOLE)
    assert len(built.train) == 24
    phrase = rows[1]["turns"][2]["content"]
    assert built.train[1]["prompt"] == (
        "<|start|>user\nHello 1<|end|>\n<|start|>assistant\nHi {name}<|end|>\n"
        f"<|start|>user\n{phrase}<|end|>\n<|start|>assistant\n"
    )
    for example, row in zip(built.train, rows, strict=True):
        scored = [label for label in example["labels"] if label != -100]
        assert tokenizer.decode(scored) == row["turns"][-1]["content"] + "<|end|>"
        assert tokenizer.decode(example["input_ids"][: -len(scored)]) == example["prompt"]
    assert built.prompt["prompt"] is None


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ("Hello", "field `turns` is not a list of messages"),
        ([], "field `turns` is not a list of messages"),
        ([{"role": "user"}], "field `turns` has a message without text in `role` and `content`"),
        ([{"role": "user", "content": "Hi"}], "field `turns` does not end with the assistant's turn"),
        ([{"role": "assistant", "content": " "}], "field `turns` ends with an empty answer"),
        ([{"role": "assistant", "content": "Hi"}], "field `turns` has no turn before the assistant's"),
        ("", "field `turns` is not a list of messages"),
    ],
)
def test_bad_messages_are_named(refused, tmp_path, turns, told):
    rows = chat_rows(24)
    rows[7]["turns"] = turns
    source = write_rows(tmp_path / "rows.json", rows)
    assert f"  {source}: row 8: {told}" in refused(source, messages="turns", **CHAT)


def test_half_a_surrogate_pair_in_messages(refused, tmp_path):
    rows = chat_rows(24)
    rows[7]["turns"][0]["content"] = "\ud83d"
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    told = refused(source, messages="turns", **CHAT)
    assert f"  {source}: row 8: field `turns` holds half a surrogate pair" in told


def test_turns_that_the_chat_template_does_not_take(refused, tmp_path, tokenizer_folder):
    """Told with the row, for a column; with the parameter, for templates."""
    picky = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}{{ messages }}"
    )
    base = other_chat(tokenizer_folder, tmp_path / "base", picky)
    rows = chat_rows(24)
    rows[0]["turns"] = [{"role": "system", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    source = write_rows(tmp_path / "rows.json", rows[:1])
    told = refused(source, base=base, messages="turns", **CHAT)
    assert f"  {source}: row 1: field `turns`: the base model's chat template does not take it: the user must" in told
    messages = [{"role": "system", "content": "{phrase}"}, {"role": "assistant", "content": "{tone}"}]
    told = refused(make_rows(24), base=base, messages=messages, **CHAT)
    assert told == "prepare.messages: the base model's chat template does not take it: the user must begin"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("", "prepare.messages: an empty name. Name the column"),
        ([{"role": "assistant", "content": "{tone}"}], "prepare.messages: nothing stands before the answer"),
    ],
)
def test_messages_without_a_prompt(refused, messages, told):
    assert refused(make_rows(24), messages=messages, **CHAT).startswith(told)


def test_messages_need_a_chat_template(refused, tmp_path, tokenizer_folder):
    base = other_chat(tokenizer_folder, tmp_path / "base", None)
    told = refused(make_rows(24), base=base, messages=MESSAGES, **CHAT)
    assert told == "prepare.messages: the base model's tokenizer has no chat template. Use text_template instead."


def test_chat_template_that_rewrites_earlier_turns(refused, tmp_path, tokenizer_folder):
    """Prompt and answer cannot be told apart if the template changes the prompt when the answer is added."""
    base = other_chat(tokenizer_folder, tmp_path / "base", "{{ messages | length }}{{ messages[-1]['content'] }}")
    told = refused(make_rows(24), base=base, messages=MESSAGES, **CHAT)
    assert told.startswith("prepare.messages: this chat template changes earlier turns when the answer is added.")


def test_error_in_a_message_names_messages(refused):
    messages = [{"role": "user", "content": "{the phrase}"}, {"role": "assistant", "content": "{tone}"}]
    told = refused(make_rows(24), messages=messages, **CHAT)
    assert "prepare.messages: `{the phrase}` is not a plain field name" in told


# Duplicates

LONG = "the quick brown fox jumps over the lazy dog while the old cat sleeps in the warm sun near the red barn"


@pytest.fixture
def leaky(tmp_path) -> dict[str, Path]:
    """train row 2 repeats test row 1 but for case and space; train row 3 repeats test row 2 but for its last word."""
    train = make_rows(24)
    test = [{"phrase": "What a surprise to meet you here", "tone": "surprise"}, {"phrase": LONG, "tone": "joy"}]
    train[1] = {"phrase": "what a  SURPRISE to meet you here ", "tone": "surprise"}
    train[2] = {"phrase": LONG.replace("barn", "house"), "tone": "joy"}
    return {
        "train": write_rows(tmp_path / "train.json", train),
        "test": write_rows(tmp_path / "test.json", test),
    }


def test_duplicates_leave_train_not_test(build, leaky):
    built = build(leaky, eval_fraction=0.0)
    assert numbers(built.train) == set(range(1, 25)) - {2, 3}
    assert numbers(built.test) == {1, 2}
    assert built.report["duplicates"]["removed_from_train"] == 2
    assert built.report["duplicates"]["within_train"] == 0
    assert built.report["rows"] == {"read": 26, "train": 22, "eval": 0, "test": 2}


def test_threshold_of_one_leaves_near_duplicates(build, leaky):
    built = build(leaky, eval_fraction=0.0, near_duplicate_threshold=1.0)
    assert numbers(built.train) == set(range(1, 25)) - {2}
    assert built.report["duplicates"]["removed_from_train"] == 1


def test_duplicates_refused_name_both_rows(refused, leaky):
    assert refused(leaky, eval_fraction=0.0, duplicates="refuse") == (
        "prepare.duplicates: 2 rows repeat held-out rows. Remove them, or set duplicates: remove.\n"
        f"  {leaky['train']}: row 2 (train) repeats {leaky['test']}: row 1 (test)\n"
        f"  {leaky['train']}: row 3 (train) repeats {leaky['test']}: row 2 (test)"
    )


def test_many_duplicates_are_named_up_to_a_limit(refused, tmp_path):
    rows = make_rows(24)
    source = {"train": write_rows(tmp_path / "train.json", rows), "test": write_rows(tmp_path / "test.json", rows)}
    told = refused(source, eval_fraction=0.0, duplicates="refuse").splitlines()
    assert told[0].startswith("prepare.duplicates: 24 rows repeat held-out rows.")
    assert len(told) == 1 + 20 + 1
    assert told[-1] == "  and 4 more"


def test_duplicates_within_one_file_do_not_cross_the_split(build):
    """Three copies of each text, cut at random: no text of test is left in train."""
    rows = [row for row in make_rows(80) for _ in range(3)]
    built = build(rows, eval_fraction=0.0)
    assert {row["prompt"] for row in built.train} & {row["prompt"] for row in built.test} == set()
    counts = built.report["rows"]
    assert counts["read"] == 240 == counts["train"] + counts["test"] + built.report["duplicates"]["removed_from_train"]
    assert counts["test"] == 48


def test_duplicates_within_train_are_counted_and_kept(build):
    rows = [*make_rows(24), *make_rows(5)]
    built = build(rows, **WHOLE)
    assert built.report["duplicates"]["removed_from_train"] == 0
    assert built.report["duplicates"]["within_train"] == 5
    assert len(built.train) == 29


def test_eval_row_that_repeats_a_test_row(build, tmp_path):
    """It leaves eval, and is not counted as removed from train."""
    rows = make_rows(96)
    source = {
        "train": write_rows(tmp_path / "train.json", rows[:64]),
        "eval": write_rows(tmp_path / "eval.json", [*rows[64:76], rows[80]]),
        "test": write_rows(tmp_path / "test.json", rows[76:]),
    }
    built = build(source)
    assert [len(built.train), len(built.eval), len(built.test)] == [64, 12, 20]
    assert built.report["duplicates"]["removed_from_train"] == 0


def test_rows_without_a_prompt_field_are_no_duplicates(build, tmp_path):
    """Plain text generation has the same prompt in every row; that alone must not empty the training split."""
    rows = [{"phrase": row["phrase"]} for row in make_rows(40)]
    source = {
        "train": write_rows(tmp_path / "train.json", rows[:30]),
        "test": write_rows(tmp_path / "test.json", rows[30:]),
    }
    built = build(source, text_template="### Text:\n{phrase}", eval_fraction=0.0)
    assert [len(built.train), len(built.eval), len(built.test)] == [30, 0, 10]


# Bad input: one clear error, exit code 1, nothing left behind


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.json", b"", ": empty file."),
        ("rows.json", b"[]", ": no rows in it."),
        ("rows.json", b" [ ]\n", ": no rows in it."),
        ("rows.jsonl", b"\n\n", ": no rows in it."),
        ("rows.csv", b"phrase,tone\n", ": no rows in it."),
        ("rows.json", None, ": no such file or folder. Correct the source in params.yaml"),
        ("rows.json", b'"text"', ": not JSON: expected an array of objects, or one object a line."),
        ("rows.json", b'[{"phrase": "a", "tone": "x"}, {"phrase": "b" "tone": "y"}]', ": row 2: malformed JSON: "),
        ("rows.json", b'[{"phrase": "a", "tone": "x"}, {"phrase": "b", ', ": row 2: malformed JSON: "),
        ("rows.jsonl", b'{"phrase": "a", "tone": "x"}\n{"phrase": "b", "tone"}\n', ": row 2: malformed JSON: "),
        ("rows.jsonl", b'{"phrase": "a", "tone": "x"}\n[1]\n', ": row 2: not an object but list."),
        ("rows.jsonl", b'{"phrase": "a", "tone": "x"}\n{"phrase": "\\ud83d", "tone": "y"}\n', ": row 2: "),
        ("rows.json", b'[\n{"phrase": "caf\xe9", "tone": "x"}\n]', ": line 2: not UTF-8 text (byte 15 of the line: 0xe9)."),
        ("rows.jsonl", b'{"phrase": "a", "tone": "x"}\n{"phrase": "caf\xe9", "tone": "y"}\n', ": row 2: not UTF-8 text (byte 15"),
        ("rows.csv", b"phrase,tone\ncaf\xe9,joy\n", ": line 2: not UTF-8 text (byte 3 of the line: 0xe9). Save the file as UTF-8."),
        ("rows.csv", b"\xff\xfe" + "phrase,tone\na,b\n".encode("utf-16-le"), ": UTF-16 text (it begins with FF FE). Save the file as UTF-8."),
        ("rows.json", b"\xfe\xff" + "[]".encode("utf-16-be"), ": UTF-16 text (it begins with FE FF). Save the file as UTF-8."),
        ("rows.json", b'{\n  "data": [\n    {"phrase": "a"}\n  ]\n}\n', ": one JSON object over several lines. An array [...] of objects"),
        ("rows.jsonl", b'{"phrase": "a",\n\n"tone": "x"}\n', ": one JSON object over several lines. An array [...] of objects"),
        ("rows.json", b'{"phrase": "a", "tone"}\n{"phrase": "a"}\n', ": row 1: malformed JSON: "),
        ("rows.jsonl", b'{"phrase": "a", "tone": "x"}\n{"phrase": ' + b"9" * 5000 + b"}\n", ": row 2: a number with thousands of digits."),
        ("rows.json", b'[{"phrase": "a", "tone": "x"}, {"phrase": ' + b"9" * 5000 + b"}]", ": row 2: malformed JSON: parse error: integer"),
        ("rows.json", b'[{"phrase": "a"}, {"phrase": ' + b"[" * 2000, ": row 2: more than 100 levels of arrays and objects in each other."),
        ("rows.jsonl", b'{"phrase": "a"}\n{"phrase": ' + b"[" * 2000 + b"\n", ": row 2: more than 100 levels of arrays and objects in each other."),
        ("rows.csv", b'phrase,tone\n"unclosed,joy\nx,fear\n', ": malformed CSV: "),
        ("rows.csv", b"phrase,tone,tone\na,b,c\n", ": row 1: the header has an empty or repeated column name: phrase, tone, tone."),
        ("rows.parquet", b"no Parquet at all", ": not a readable Parquet file: "),
        ("rows.xlsx", b"PK", ": unknown ending `.xlsx`. Use .json, .jsonl, .ndjson, .csv, .parquet."),
        ("rows.json", b"[1, 2]", ": row 1: not an object but int"),
    ],
)  # fmt: skip
def test_unreadable_files(refused, tmp_path, name, content, told):
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    assert f"{source}{told}" in refused(source)


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize("half", ["\ud83d", "a \ud83d b", "c \ude00", "\U0001f600\ude00", "\ud83d\U0001f600"])
def test_half_a_surrogate_pair(refused, tmp_path, ending, half):
    rows = make_rows(24)
    rows[16]["tone"] = half
    source, lines = tmp_path / f"rows{ending}", [json.dumps(row) for row in rows]
    source.write_text("\n".join(lines) if ending == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    assert f"  {source}: row 17: field `tone` holds half a surrogate pair" in refused(source)


def test_nested_json_is_read_as_the_standard_library_does(tmp_path):
    """What looks like half a pair behind an escaped backslash is text; a hundred levels are allowed."""
    deep = json.loads("[" * 99 + "]" * 99)
    rows = [{"a": {"b": [1, {"c": None}], "d": []}, "e": {}}, {"f": [[2.5], {}, "\U0001f600"]}, {"g": deep}, {}]
    for some in (rows, [*rows, {"h": "\\ud83d"}]):
        (tmp_path / "rows.json").write_text(json.dumps(some), encoding="utf-8")
        assert list(read_rows(tmp_path / "rows.json")) == some


def test_folder_as_source(refused, tmp_path):
    (tmp_path / "rows").mkdir()
    assert refused(tmp_path / "rows") == f"{tmp_path / 'rows'}: a folder, not a dataset file. Check prepare.source."


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        (3, "field `tone` is int, not text: 3"),
        (True, "field `tone` is bool, not text: true"),
        (["joy"], 'field `tone` is list, not text: ["joy"]'),
        ("", "field `tone` is an empty answer"),
        (" \n", "field `tone` is an empty answer"),
        (None, "field `tone` is missing"),
        (
            "j\ufffdy",
            "field `tone` holds the replacement character U+FFFD: text that was not UTF-8 was decoded wrongly",
        ),
    ],
)
def test_bad_value(refused, tmp_path, ending, value, told):
    """One bad value among 24 rows is told with its file, row and field."""
    rows = make_rows(24)
    rows[16]["tone"] = value
    source = write_rows(tmp_path / f"rows{ending}", rows)
    assert refused(source) == (
        f"{source}: 1 bad value in 24 rows; mend them and run again.\n  {source}: row 17: {told}"
    )


def test_numbers_in_parquet_are_not_text(refused, tmp_path):
    source = write_rows(tmp_path / "rows.parquet", [{"phrase": "a", "tone": 1}, {"phrase": "b", "tone": 2}])
    told = refused(source)
    assert told.startswith(f"{source}: 2 bad values in 2 rows; mend them and run again.")
    assert f"  {source}: row 2: field `tone` is int, not text: 2" in told


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_missing_fields_are_named_row_by_row(refused, tmp_path, ending):
    rows = make_rows(30)
    for number in (3, 4, 29):
        del rows[number - 1]["tone"]
    del rows[3]["phrase"]
    source = write_rows(tmp_path / f"rows{ending}", rows)
    assert refused(source).splitlines() == [
        f"{source}: 4 bad values in 30 rows; mend them and run again.",
        f"  {source}: row 3: field `tone` is missing",
        f"  {source}: row 4: field `phrase` is missing",
        f"  {source}: row 4: field `tone` is missing",
        f"  {source}: row 29: field `tone` is missing",
    ]


def test_long_lists_of_bad_rows_are_cut(refused, tmp_path):
    rows = make_rows(30)
    for row in rows[5:]:
        del row["tone"]
    source = write_rows(tmp_path / "rows.json", rows)
    told = refused(source).splitlines()
    assert told[0] == f"{source}: 25 bad values in 30 rows; mend them and run again."
    assert told[1:21] == [f"  {source}: row {number}: field `tone` is missing" for number in range(6, 26)]
    assert told[21:] == ["  and 5 more"]


def test_field_that_no_row_has(refused, tmp_path):
    source = write_rows(tmp_path / "rows.json", [{"phrase": row["phrase"], "tones": "x"} for row in make_rows(24)])
    assert refused(source) == (
        f"{source}: the template's field `tone` is in no row. Fields there: phrase, tones. Did you mean `tones`?"
    )


def test_base_model_that_is_not_there(refused, tmp_path):
    told = refused(make_rows(24), base=tmp_path / "base")
    assert told == f"{tmp_path / 'base'}: no such folder. Build it with `snakemake --cores all {tmp_path / 'base'}`."


# The report


@pytest.mark.parametrize("strategy", ["line-by-line", "join"])
def test_statistics_add_up(build, tmp_path, strategy):
    source = write_rows(tmp_path / "rows.json", make_rows(96) + make_rows(3))
    built = build(source, strategy=strategy)
    report = built.report
    splits = {"train": built.train, "eval": built.eval, "test": built.test}
    rows = report["rows"]
    assert rows["read"] == 99
    assert rows["read"] == rows["train"] + rows["eval"] + rows["test"] + report["duplicates"]["removed_from_train"]
    assert report["sequences"] == {name: len(split) for name, split in splits.items()}
    assert report["tokens"] == {name: sum(len(row["input_ids"]) for row in split) for name, split in splits.items()}
    assert report["answer_tokens"] == {
        name: sum(label != -100 for row in split for label in row["labels"]) for name, split in splits.items()
    }
    lengths = sorted(len(row["input_ids"]) for split in splits.values() for row in split)
    histogram = {int(size): count for size, count in report["length"]["histogram"].items()}
    assert histogram == Counter(lengths)
    assert (report["length"]["min"], report["length"]["max"]) == (lengths[0], lengths[-1])
    assert sum(size * count for size, count in histogram.items()) == sum(report["tokens"].values())
    for name in splits:
        assert set(report["labels"][name]) == set(TONES)
        assert sum(report["labels"][name].values()) == rows[name]
    content = source.read_bytes()
    assert report["source"]["train"] == {
        "source": str(source),
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
    }


def test_lengths_summary():
    assert tokenize.lengths_summary(Counter({9: 1, 3: 2, 5: 1})) == {
        "min": 3,
        "median": 3,
        "p95": 9,
        "max": 9,
        "histogram": {"3": 2, "5": 1, "9": 1},
    }
    assert tokenize.lengths_summary(Counter()) == {"min": 0, "median": 0, "p95": 0, "max": 0, "histogram": {}}


# The store


def test_store_gives_rows_back_in_batches(tmp_path):
    rows = [Row(file="f", line=i, prompt=f"p {i}", answer="ab"[i % 2], text=f"text {i}") for i in range(1, 8)]
    with Store(tmp_path / "rows.sqlite", few_answers=2) as store:
        assert store.add(rows[:5]) == 5
        assert store.add(rows[5:]) == 2
        batches = list(store.batches(3))
        assert [indices.tolist() for indices, _ in batches] == [[0, 1, 2], [3, 4, 5], [6]]
        assert flat(found for _, found in batches) == rows
        assert store.row(4) == rows[4]
        assert store.answers() == ["b", "a"]
        assert store.answer_codes().tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert not (tmp_path / "rows.sqlite").exists()


def test_store_forgets_answers_when_there_are_many(tmp_path):
    with Store(tmp_path / "rows.sqlite", few_answers=2) as store:
        store.add(Row(file="f", line=i, prompt="p", answer=a, text=a) for i, a in enumerate("abca", 1))
        assert store.answers() is None
        assert store.answer_codes().tolist() == [0, 0, 0, 0]
        assert store.exact_duplicates(np.ones(4, dtype=bool)) == 1


# As a user runs it


def test_script_writes_dataset_report_and_log(tmp_path, tokenizer_folder):
    params = write_params(
        tmp_path / "params.yaml",
        prepare={**FIELDS, "source": str(write_rows(tmp_path / "rows.csv", make_rows(96)))},
    )
    places = ["--output", "build/dataset", "--report", "results/dataset.json", "--log", "logs/prepare.log"]
    done = run_script("prepare", "--params", params, "--base", tokenizer_folder, *places, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("prepare: 72 train")]
    assert lines[0].startswith(
        "prepare: 72 train, 4 eval and 20 test rows in build/dataset (0 duplicates removed, 0 prompts truncated, "
    )
    assert sorted(path.name for path in (tmp_path / "build/dataset").iterdir()) == [
        "eval.parquet",
        "prompt.json",
        "test.parquet",
        "train.parquet",
    ]
    assert "72 train, 4 eval and 20 test rows" in (tmp_path / "logs/prepare.log").read_text(encoding="utf-8")

    again = run_script("prepare", "--params", params, "--base", tokenizer_folder, *places, cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr == (
        "prepare: error: build/dataset already exists. Remove it first, or let `snakemake` decide whether to build it again.\n"
    )


def test_script_tells_bad_rows_and_leaves_nothing(tmp_path, tokenizer_folder):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"phrase": "a", "tone": "x"}\n{"phrase": "b", "tone"}\n', encoding="utf-8")
    params = write_params(tmp_path / "params.yaml", prepare={**FIELDS, "source": str(source)})
    places = ["--output", "dataset", "--report", "report.json", "--log", "logs/prepare.log"]
    done = run_script("prepare", "--params", params, "--base", tokenizer_folder, *places, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"prepare: error: {source}: row 2: malformed JSON: ")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "params.yaml", "rows.jsonl"]


def test_help_loads_no_torch(tmp_path):
    """--help and wrong arguments are answered without the heavy libraries."""
    done = run_script("prepare", "--help", env={"PATH": "/usr/bin:/bin", "PYTHONPROFILEIMPORTTIME": "1"}, cwd=tmp_path)
    assert done.returncode == 0
    assert "python -m scripts.prepare --params params.yaml --base build/base" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "datasets", "pyarrow"})
