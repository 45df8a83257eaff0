"""Tokens and labels: the loss on the answer, sequences, truncation."""

import json
import re
import shutil
from collections import Counter

import pytest
from prepared import CHAT, END, TEMPLATE, WHOLE, flat, write_rows
from tiny import make_rows

from slmake.data import tokenize
from slmake.data.conversation import without_closing


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


@pytest.mark.parametrize("closing", ["<|end|>", "<|end|>\n", " <|end|><|end|>\n\n"])
def test_what_closes_the_template_is_not_part_of_the_answer(build, closing):
    """The runtime leaves special tokens out of an answer: with them in it, no answer would be right. Nor where the rows have them."""
    rows = [row | {"tone": row["tone"] + closing} for row in make_rows(96)]
    in_template = build(make_rows(96), name="template", text_template=TEMPLATE + closing)
    for built in (in_template, build(rows, name="rows", text_template=TEMPLATE)):
        assert {example["answer"] for example in built.train} == {"joy", "fear", "sadness", "surprise"}
        assert built.prompt["labels"] == ["fear", "joy", "sadness", "surprise"]


@pytest.fixture
def lower(tokenizer_folder, tmp_path):
    """The test tokenizer with a normalizer that makes all text small."""
    folder = shutil.copytree(tokenizer_folder, tmp_path / "lower")
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}), encoding="utf-8")
    return folder


def test_labels_that_no_answer_can_equal_are_refused(build, refused, lower):
    rows = [row | {"tone": row["tone"].upper()} for row in make_rows(24)]
    assert "the label 'FEAR' is 'fear' when its tokens are read back" in refused(rows, base=lower)
    for name, given, base in (("kept", rows, None), ("small", make_rows(24), lower)):
        assert len(build(given, name=name, base=base, **WHOLE).train) == 24


def test_other_answers_that_no_answer_can_equal_are_counted(build, lower, capsys):
    """Of those that are scored, and once for all: to train on them is no error."""
    rows = [row | {"tone": f"{'Two' if i % 2 else 'two'} \u00e9 {i}"} for i, row in enumerate(make_rows(80))]
    built = build(rows, base=lower)
    changed = [row for row in built.test if "T" in row["answer"]]
    text = changed[0]["answer"]
    line = f"warning: {len(changed)} answers of the test split are another text when their tokens are read back"
    printed = capsys.readouterr().err
    assert line in printed
    assert f": row {changed[0]['row']}: {text!r} is read back as {text.lower()!r}" in printed
    build(rows, name="plain")
    assert "read back" not in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["templates", "messages", "alpaca"])
def test_what_closes_the_answers_of_a_chat_is_trained_once(build, tokenizer, layout):
    """The chat template closes an answer: an end token that the rows bring, too, would be learned twice and expected of the runtime."""

    def rows(closing: str) -> list[dict]:
        given = [row | {"tone": row["tone"] + closing} for row in make_rows(24)]
        if layout == "templates":
            return given
        if layout == "alpaca":
            return [{"instruction": row["phrase"], "output": row["tone"]} for row in given]
        return [
            {"messages": [{"role": "user", "content": row["phrase"]}, {"role": "assistant", "content": row["tone"]}]}
            for row in given
        ]

    turns = [{"role": "user", "content": "{phrase}"}, {"role": "assistant", "content": "{tone}"}]
    fields = {**CHAT, **WHOLE, "messages": turns if layout == "templates" else None}
    plain, closed = build(rows(""), name="plain", **fields), build(rows(" <|end|><|end|>\n"), **fields)
    assert closed.train == plain.train
    assert [example["answer"] for example in closed.train] == [row["tone"] for row in make_rows(24)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("joy</s> <pad>\n", "joy"),
        ("joy </s>", "joy"),
        ("a</s>b \n", "a</s>b \n"),
        ("</s>", ""),
        (" ", " "),
        ("joy\u00a0</s>", "joy"),
    ],
)
def test_only_what_closes_an_answer_goes(text, answer):
    assert without_closing(text, ("<pad>", "</s>")) == answer
    assert without_closing(text, ()) == text


@pytest.mark.timeout(20)
def test_long_white_space_in_an_answer_takes_no_time():
    text = "a" + " " * 10**6 + "b"
    assert without_closing(text + "</s>" * 1000, ("</s>",)) == text


def test_answer_starts_at_the_named_field(build, tokenizer):
    """`answer` may be an earlier placeholder; what follows it belongs to the answer."""
    rows = [{**row, "why": f"because of {i}"} for i, row in enumerate(make_rows(96))]
    built = build(rows, text_template="Q: {phrase}\nA: {tone}\nWhy: {why}", answer="tone", **WHOLE)
    first = built.train[0]
    assert first["prompt"] == f"Q: {rows[0]['phrase']}\nA: "
    assert first["answer"] == "sadness\nWhy: because of 0"
    scored = [label for label in first["labels"] if label != -100]
    assert tokenizer.decode(scored) == "sadness\nWhy: because of 0<|end|>"


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


def test_lengths_summary():
    assert tokenize.lengths_summary(Counter({9: 1, 3: 2, 5: 1})) == {
        "min": 3,
        "median": 3,
        "p95": 9,
        "max": 9,
        "histogram": {"3": 2, "5": 1, "9": 1},
    }
    assert tokenize.lengths_summary(Counter()) == {"min": 0, "median": 0, "p95": 0, "max": 0, "histogram": {}}


def test_the_difference_of_long_answers_is_shown(build, lower, capsys):
    start = "an answer that is long enough to be cut where it is shown, " * 2
    build([row | {"tone": f"{start}number {i} of Two"} for i, row in enumerate(make_rows(80))], base=lower)
    assert re.search(r"'….*number \d+ of Two' is read back as '….*number \d+ of two'", capsys.readouterr().err)
