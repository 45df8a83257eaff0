"""Which rows are for training, evaluation and test; labels and duplicates."""

import json
from collections import Counter
from pathlib import Path

import pytest
from prepared import WHOLE, numbers, write_rows
from tiny import TONES, make_rows

from slmake.data import splits as splits_module


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


def test_more_answers_than_50_are_labels_where_they_are_named(build, capsys):
    """As those of Banking77 and CLINC150. Where they are not, it is said."""
    rows = [{"phrase": f"{row['phrase']} {i * 7919 % 10007}", "tone": i % 60} for i, row in enumerate(make_rows(360))]
    warning = "60 different answers, more than 50, so they are scored as open text"
    built = build(rows, near_duplicate_threshold=1.0)
    assert built.prompt["labels"] is None
    assert warning in capsys.readouterr().err
    built = build(rows, near_duplicate_threshold=1.0, labels={str(i): f"word {i}" for i in range(60)}, name="named")
    assert sorted(built.prompt["labels"]) == sorted(f"word {i}" for i in range(60))
    assert warning not in capsys.readouterr().err
    assert set(built.report["labels"]["test"]) == set(built.prompt["labels"])


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
    """Up to 50 different answers are distinguished, more are not; every row is in a split either way."""
    rows = [{"phrase": row["phrase"], "tone": f"class {i % answers}"} for i, row in enumerate(make_rows(96))]
    built = build(rows, near_duplicate_threshold=1.0)
    assert numbers(built.train) | numbers(built.eval) | numbers(built.test) == set(range(1, 97))
    assert built.report["rows"]["read"] == 96


def test_nothing_left_to_train_on(refused, tmp_path):
    """The same file for train and test: every training row repeats a test row."""
    source = write_rows(tmp_path / "rows.json", make_rows(24))
    message = refused({"train": source, "test": source}, eval_fraction=0.0)
    assert message.startswith("prepare: all 24 training rows repeat eval or test rows and were left out as duplicates.")
    assert "Or raise near_duplicate_threshold, up to 1.0 (exact copies only)" in message


@pytest.mark.parametrize(("count", "fields"), [(1, {}), (24, {"test_fraction": 0.0}), (24, {"max_samples": 1})])
def test_empty_test_split_where_evaluate_is_to_run(build, refused, count, fields):
    message = refused(make_rows(count), stages=["finetune", "evaluate"], **fields)
    assert message.startswith("prepare: the test split is empty, so evaluate (all.stages) could not score anything: ")
    for part in ("test_fraction is ", "max_samples ", f"there are {count} rows"):
        assert part in message
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
    message = refused(source)
    assert message.startswith(f'{source["test"]}: row 13: the answer "angr" is in test but in no training row')


def test_splits_of_more_rows_than_a_batch(build):
    """5,000 rows pass through prepare's batches of 2,048 complete and in order."""
    rows = [{"phrase": f"{i} {i * 31 % 997} {i * 17 % 613} {i * 7 % 411}", "tone": TONES[i % 4]} for i in range(5000)]
    built = build(rows, near_duplicate_threshold=1.0)
    assert [len(built.train), len(built.eval), len(built.test)] == [3752, 248, 1000]
    for split in (built.train, built.eval, built.test):
        assert [row["row"] for row in split] == sorted(row["row"] for row in split)
    assert all(row["answer"] == TONES[(row["row"] - 1) % 4] for row in built.test)


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
    message = refused(source, eval_fraction=0.0, duplicates="refuse").splitlines()
    assert message[0].startswith("prepare.duplicates: 24 rows repeat held-out rows.")
    assert len(message) == 1 + 20 + 1
    assert message[-1] == "  and 4 more"


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


# Labels that are not what they seem


@pytest.mark.parametrize("label", ["joy ", " joy", "\tjoy", "joy\u00a0"])
def test_label_with_white_space_around_it(refused, tmp_path, label):
    """A model's answer is compared without outer white space, so the label could never be right."""
    rows = make_rows(24)
    for row in rows[1::4]:
        row["tone"] = label
    source = write_rows(tmp_path / "rows.json", rows)
    message = refused(source, **WHOLE)
    assert message.startswith(
        f"{source}: row 2: the label {json.dumps(label, ensure_ascii=False)} has white space around it"
    )


def test_free_text_may_have_white_space_around_it(build):
    rows = [{"phrase": row["phrase"], "tone": f"reply number {i} "} for i, row in enumerate(make_rows(96))]
    assert build(rows).prompt["labels"] is None


@pytest.mark.parametrize("other", ["Joy", "JOY", "joy\u200b", "\ufeffjoy", "ｊoy", "jo\u00ady"])
def test_labels_that_look_alike_are_reported(build, capsys, other):
    rows = make_rows(96)
    for row in rows[1::8]:
        row["tone"] = other
    built = build(rows, **WHOLE)
    assert len(built.prompt["labels"]) == 5
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    first, second = sorted(["joy", other])
    assert lines == [
        f"prepare: warning: the labels {json.dumps(first)} and {json.dumps(second)} differ only in case, Unicode form or invisible "
        "characters, and are scored as different answers"
    ]


def test_composed_and_decomposed_labels_are_reported(build, capsys):
    rows = make_rows(96)
    for i, row in enumerate(rows):
        row["tone"] = ["gl\u00fccklich", "glu\u0308cklich"][i % 2]
    build(rows, **WHOLE)
    assert r'warning: the labels "glu\u0308cklich" and "gl\u00fccklich" differ only in' in capsys.readouterr().err


@pytest.mark.parametrize(("first", "second"), [("-0.0", "0.0"), ("1", "1.0"), ("100", "1e2")])
def test_labels_that_are_one_number_are_reported(build, capsys, first, second):
    rows = make_rows(96)
    for i, row in enumerate(rows):
        row["tone"] = [first, second, "7.5", "x"][i % 4]
    build(rows, **WHOLE)
    assert f'warning: the labels "{first}" and "{second}" are one number, and are' in capsys.readouterr().err


def test_different_labels_are_not_reported(build, capsys):
    build(make_rows(96), **WHOLE)
    assert "warning" not in capsys.readouterr().err
