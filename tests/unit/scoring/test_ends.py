"""Where an answer ends: at every token that ends it in the export, in all models alike."""

import json
import shutil
import sys

import pytest
from evaluate_script import export

from slmake import cli
from slmake.scoring import onnx_runner
from slmake.scoring.questions import Questions
from slmake.scoring.transformers_runner import TransformersRunner


@pytest.mark.parametrize(
    ("where", "generation"),
    [
        ("generation_config.json", None),
        ("config.json", None),
        ("config.json", {"temperature": 0.6, "do_sample": True}),
        ("config.json", {"eos_token_id": None}),
    ],
)
def test_an_answer_ends_where_the_export_s_ends(tmp_path, taught, dataset, where, generation):
    """Phi-3's and Gemma's chats end turns with another token than the tokenizer's, which their configuration names beside it."""
    questions, job = Questions(dataset, 16), cli.Job("evaluate", sys.stderr, None)
    whole = TransformersRunner(taught, 4).ask(questions, 6, job, "base").texts
    within = questions.label_tokens[0][0]
    folder = tmp_path / "model"
    shutil.copytree(taught, folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    elif where == "config.json":
        (folder / "generation_config.json").unlink()
    named = json.loads((folder / where).read_text(encoding="utf-8"))
    (folder / where).write_text(json.dumps(named | {"eos_token_id": [0, within]}), encoding="utf-8")
    texts = TransformersRunner(folder, 4).ask(questions, 6, job, "base").texts
    assert (
        texts == onnx_runner.OnnxRunner(export(folder, tmp_path / "onnx", "fp32")).ask(questions, 6, job, "fp32").texts
    )
    shorter = [short != long for short, long in zip(texts, whole, strict=True)]
    assert 0 < sum(shorter) < len(texts)
    assert all(long.startswith(short) for short, long in zip(texts, whole, strict=True))
