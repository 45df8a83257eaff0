"""data/workshop.jsonl: what its README says of it, and that it goes through prepare."""

import csv
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from prepared import CHAT, other_chat
from test_conversation import TOOLS, learned
from tiny import ROOT, write_params

from scripts import evaluate, finetune, prepare
from slmake.data.conversation import read_conversation
from tools import workshop

FILE = ROOT / "data" / "workshop.jsonl"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def test_the_generator_gives_these_bytes(tmp_path):
    workshop.main(["--output", str(tmp_path / "rows.jsonl")])
    assert (tmp_path / "rows.jsonl").read_bytes() == FILE.read_bytes()
    assert FILE.stat().st_size < 850_000


def test_conversations_are_many_and_distinct(rows):
    assert len(rows) >= 400
    said = Counter(tuple(turn["content"] for turn in row["messages"] if turn["role"] == "user") for row in rows)
    assert max(said.values()) == 1
    lengths = [len(row["messages"]) for row in rows]
    assert (min(lengths), max(lengths)) == (3, 23)
    assert sum(length > 3 for length in lengths) > 0.9 * len(rows)


def test_every_tool_and_every_outcome_is_there(rows):
    turns = [turn for row in rows for turn in row["messages"]]
    calls = Counter(call["function"]["name"] for turn in turns for call in turn.get("tool_calls", []))
    assert set(calls) == {tool["function"]["name"] for tool in workshop.TOOLS}
    assert min(calls.values()) > 50
    results = [json.loads(turn["content"]) for turn in turns if turn["role"] == "tool"]
    errors = Counter(result["error"] for result in results if "error" in result)
    assert set(errors) == {"slot taken", "closed", "unknown item", "booking system not reachable"}
    assert min(errors.values()) >= 10
    assert 0.1 < sum(errors.values()) / len(results) < 0.3


def test_every_row_is_a_valid_conversation(rows):
    for row in rows:
        read_conversation(row["messages"], row["tools"])


def test_every_figure_of_the_assistant_has_a_source(rows):
    """A time, price or number stands in a tool's answer, the system turn, or what the user said before."""
    for row in rows:
        known = ""
        for turn in row["messages"]:
            if turn["role"] == "assistant":
                text = turn["content"].replace(".00", "")
                for figure in re.findall(r"K?\d+(?:[:.]\d+)?", text):
                    hours_of_minutes = any(
                        figure in workshop._duration(int(minutes)) for minutes in re.findall(r'"minutes": (\d+)', known)
                    )
                    offered = any(figure in size for sizes in workshop.STOCK.values() for size in sizes)
                    short = figure.rstrip("0").rstrip(".") if "." in figure else figure
                    assert figure in known or short in known or hours_of_minutes or offered, (turn, known)
            known += turn["content"]


def test_it_goes_through_prepare(build, tokenizer, tokenizer_folder, tmp_path):
    """Hardly a conversation is a near copy of a held-out one; every answer is trained and every test turn asked."""
    base = other_chat(tokenizer_folder, tmp_path / "base", TOOLS)
    built = build(FILE, base=base, max_seq_len=4096, test_fraction=0.1, eval_fraction=0.05, **CHAT)
    counts, report = built.report["rows"], built.report
    assert counts["read"] == 408
    assert report["duplicates"]["removed_from_train"] < 0.05 * counts["read"]
    assert (report["truncated"], report["dropped_turns"]["turns"]) == (0, 0)
    assert len(built.train) == counts["train"]
    assert len(built.test) > 3 * counts["test"]
    for example in built.train[:20]:
        assert len(learned(tokenizer, example)) == len(example["turns"])


def test_a_model_is_trained_and_scored_on_it(base, tmp_path):
    """prepare, two steps over packed conversations, and every answer of the test split in predictions.csv."""
    model = Path(shutil.copytree(base, tmp_path / "base"))
    other_chat(base, model, TOOLS)
    section = {"source": str(FILE), "text_template": None, "answer": None, "max_seq_len": 512, "max_samples": 24}
    section |= {"strategy": "packing", "eval_fraction": 0.1, "test_fraction": 0.1}
    tune = {"max_steps": 2, "per_device_train_batch_size": 1, "eval_steps": 0}
    score = {"latency_rows": 0, "bootstrap_samples": 100, "max_new_tokens": 4}
    file = write_params(
        tmp_path / "params.yaml", all={"stages": ["finetune"]}, prepare=section, finetune=tune, evaluate=score
    )

    def run(script, **paths: object) -> None:
        pairs = {"params": file, **paths}
        script.main([str(part) for name, path in pairs.items() for part in (f"--{name.replace('_', '-')}", path)])

    run(prepare, base=model, output=tmp_path / "dataset", report=tmp_path / "report.json")
    curves = {"train_loss": tmp_path / "train.csv", "eval_loss": tmp_path / "eval.csv"}
    common = {"base": model, "dataset": tmp_path / "dataset"}
    run(finetune, **common, output=tmp_path / "adapter", checkpoints=tmp_path / "checkpoints", **curves)
    outputs = {name: tmp_path / f"{name}.out" for name in ("metrics", "benchmark", "predictions")}
    run(evaluate, **common, adapter=tmp_path / "adapter", **outputs)
    with open(outputs["predictions"], newline="", encoding="utf-8") as handle:
        lines = list(csv.DictReader(handle))
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["dropped_turns"]["conversations"] > 0  # the test tokenizer knows no English: 512 tokens are few
    assert len({line["row"] for line in lines}) == report["rows"]["test"] < len(lines)
    assert any(line["expected"].startswith("<call>") for line in lines)
    assert {"base", "adapter"} <= lines[0].keys()
