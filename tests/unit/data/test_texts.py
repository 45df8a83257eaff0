"""The fixed texts as a dataset: what is written, how they are cut, and how a user's text becomes a prompt."""

import json

import pyarrow.parquet
import pytest
from prepared import other_chat
from tiny import write_params

from scripts import prepare
from slmake.data import texts
from slmake.data.tokenize import load_tokenizer
from slmake.errors import UserError


def written(folder, base):
    """prepare's output without a section prepare: the folder and the report."""
    params = write_params(
        folder / "params.yaml", prepare=None, all={"stages": ["quantize"]}, gates={"min_accuracy": None}
    )
    arguments = [
        "--params",
        params,
        "--base",
        base,
        "--output",
        folder / "dataset",
        "--report",
        folder / "dataset.json",
    ]
    prepare.main([str(argument) for argument in arguments])
    return folder / "dataset", json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def test_twenty_different_texts():
    assert len(set(texts.TEXTS)) == len(texts.TEXTS) == 20


def test_what_prepare_writes_without_a_dataset(tmp_path, base):
    folder, report = written(tmp_path, base)
    assert sorted(path.name for path in folder.iterdir()) == [
        "eval.parquet", "prompt.json", "test.parquet", "train.parquet",
    ]  # fmt: skip
    test, train, evaluation = (
        pyarrow.parquet.read_table(folder / f"{name}.parquet") for name in ("test", "train", "eval")
    )
    assert test.equals(train)
    assert evaluation.num_rows == 0
    assert report["source"] == {}
    assert report["texts"] == 20
    assert report["rows"] == {"read": 0, "train": 0, "eval": 0, "test": 0}
    tokenizer = load_tokenizer(base)
    for row, text in zip(test.to_pylist(), texts.TEXTS, strict=True):
        opening = tokenizer(row["prompt"])["input_ids"]
        assert text.startswith(row["prompt"] + row["answer"])
        assert row["labels"] == [-100] * len(opening) + row["input_ids"][len(opening) :]
        assert row["input_ids"] == tokenizer(row["prompt"] + row["answer"])["input_ids"]
        assert len(row["input_ids"]) <= texts.LONGEST
        assert len(opening) < len(row["input_ids"])


@pytest.mark.parametrize(
    ("template", "prompt", "fields"),
    [
        (
            "<|start|>{{ messages[0]['content'] }}<|end|>{% if messages[1] %}{{ messages[1]['content'] }}{% endif %}",
            None,
            [],
        ),
        (None, "{text}", ["text"]),
        ("{{ messages[0]['content'] }}", "{text}", ["text"]),  # it does not show the answer
        ("{{ raise_exception('no') }}", "{text}", ["text"]),
    ],
)
def test_a_chat_template_is_used_where_it_works(tmp_path, base, template, prompt, fields):
    folder = other_chat(base, tmp_path / "base", template)
    (folder / "config.json").write_text((base / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    dataset, _ = written(tmp_path, folder)
    form = json.loads((dataset / "prompt.json").read_text(encoding="utf-8"))
    assert (form["prompt"], form["fields"], "chat" in form) == (prompt, fields, prompt is None)
    assert form["labels"] is None
    assert form["longest_answer_tokens"] == 256
    assert form["texts"]["longest_answer_tokens"] == 32


def test_a_model_without_a_dataset_decides_itself_whether_it_thinks(tmp_path, base):
    """Nothing was trained, so nothing stands behind the generation prompt: as Qwen3 is asked by transformers."""
    thinks = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}{% endfor %}"
    )
    folder = other_chat(base, tmp_path / "base", thinks)
    (folder / "config.json").write_text((base / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    dataset, _ = written(tmp_path, folder)
    assert json.loads((dataset / "prompt.json").read_text(encoding="utf-8"))["chat"]["answer_prefix"] == ""


def test_a_tokenizer_that_changes_every_opening_is_refused():
    with pytest.raises(UserError, match="cuts no text in two"):
        texts.divided("a text", lambda text: [len(text)])
