"""questions: what the model is asked is what it was trained on."""

import json
import shutil
import unicodedata

import pytest
from evaluate_script import TONES, make_dataset
from tiny import make_rows

from slmake.scoring import onnx_runner
from slmake.scoring.questions import Questions


def test_questions_are_the_prompt_tokens_of_training(base, dataset):
    """Decoded, they are the prompt; with the answer's tokens behind them, they are the sequence trained on."""
    import pyarrow.parquet
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    questions = Questions(dataset)
    rows = pyarrow.parquet.read_table(dataset / "test.parquet").to_pylist()
    assert len(rows) == len(questions.prompts) > 15
    for row, ids, text, expected in zip(rows, questions.prompts, questions.texts, questions.expected, strict=True):
        assert tokenizer.decode(ids) == text == row["prompt"]
        assert text.endswith("### The tone is:\n")
        assert expected == row["answer"].strip()
        assert expected in TONES
        answer = [label for label in row["labels"] if label != -100]
        assert row["input_ids"] == [*ids, *answer]
        assert answer[-1] == questions.end == 0


def test_questions_of_a_padded_dataset_are_the_same(tmp_path, base, dataset):
    padded = make_dataset(tmp_path / "data", base, make_rows(96), pad_to_max_len=True, max_seq_len=80)
    plain, found = Questions(dataset), Questions(padded, None)
    assert [ids.tolist() for ids in found.prompts] == [ids.tolist() for ids in plain.prompts]
    assert found.expected == plain.expected


def test_rows_of_joined_sequences_are_asked_by_their_tokens(tmp_path, base, exported):
    """The text of a joined sequence is that of all its rows, so it is none of the last row's."""
    folder = make_dataset(tmp_path / "data", base, make_rows(96), strategy="join", max_seq_len=100)
    questions = Questions(folder, None, ("train",))
    assert None in questions.texts
    runner = onnx_runner.OnnxRunner(exported["fp32"])
    runner.model = onnx_runner.load(exported["fp32"], questions.form)
    for i, text in enumerate(questions.texts):
        assert questions.runtime_prompt(runner.model, i) == questions.prompts[i].tolist(), text


def test_max_samples_takes_the_first_rows(dataset):
    whole, some = Questions(dataset), Questions(dataset, 5)
    assert some.rows == whole.rows[:5]
    assert some.expected == whole.expected[:5]
    assert Questions(dataset, 10_000).rows == whole.rows


def test_an_open_answer_is_read_whole(tmp_path, base):
    """As `run.py` and `make ask` give it: an answer that runs on is not right."""
    rows = [{"text": f"Say {i}", "reply": f"first {i}\nsecond {i}"} for i in range(40)]
    folder = make_dataset(tmp_path / "data", base, rows, text_template="{text}\n{reply}", answer="reply")
    questions = Questions(folder, None)
    assert questions.read(f" {questions.expected[0]}\n") == questions.expected[0]
    assert questions.read(f"{questions.expected[0]}\nthird") == f"{questions.expected[0]}\nthird"


def test_labels_of_several_lines_are_read_whole(tmp_path, base):
    """One that begins with another is not right for it, nor is one with another call behind it."""
    rows = [{"text": f"Say {i}", "tone": ("joy", "joy\nfear")[i % 2]} for i in range(40)]
    questions = Questions(make_dataset(tmp_path / "data", base, rows, text_template="{text}\n{tone}"), None)
    assert questions.form["labels"] == ["joy", "joy\nfear"]
    assert questions.read(" joy\nfear\n") == "joy\nfear"
    assert questions.read("joy\nfear\nsad") == "joy\nfear\nsad"


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "open text"])
@pytest.mark.parametrize(("normalizer", "form"), [({"type": "NFC"}, "NFC"), (None, "NFD")])
def test_answers_are_expected_as_the_models_tokens_have_them(tmp_path, base, normalizer, form, labels):
    """Whatever Unicode form the data has them in; a tokenizer that keeps the form is expected to write it."""
    from transformers import AutoTokenizer

    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": normalizer}), encoding="utf-8")
    answers = [unicodedata.normalize("NFD", text) for text in ("fête", "été")]
    rows = [{"text": f"Say {i}", "tone": answers[i % 2] + ("" if labels else f" {i}")} for i in range(40)]
    folder = make_dataset(tmp_path / "data", tmp_path / "base", rows, text_template="{text}\n{tone}")
    questions = Questions(folder, None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    for ids, expected in zip(questions.answers, questions.expected, strict=True):
        assert questions.read(tokenizer.decode(ids, skip_special_tokens=True)) == expected
        assert unicodedata.is_normalized(form, expected)
    assert not labels or {*questions.form["labels"]} == {*questions.expected}
