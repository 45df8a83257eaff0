"""What prepare writes: dataset, prompt.json, report; the script as a user runs it."""

import hashlib
import subprocess
import sys
from collections import Counter

import pytest
from prepared import CHAT, FIELDS, TEMPLATE, write_rows
from tiny import ROOT, TONES, make_rows, run_script, write_params


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


def test_rows_longer_than_the_model_reads(refused, rows_file, base):
    assert refused(rows_file, base=base, max_seq_len=513) == (
        f"prepare.max_seq_len: 513 is more than the base model reads: 512 tokens (max_position_embeddings in {base}/config.json). Lower it."
    )


def test_base_model_that_is_not_there(refused, tmp_path):
    message = refused(make_rows(24), base=tmp_path / "base")
    assert message == f"{tmp_path / 'base'}: no such folder. Build it with `snakemake --cores all {tmp_path / 'base'}`."


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
    command = [sys.executable, "-X", "importtime", "-m", "scripts.prepare", "--help"]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "python -m scripts.prepare --params params.yaml --base build/base" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "datasets", "pyarrow"})
