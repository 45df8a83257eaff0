"""Score several models on the same questions, and compare each with the one before it."""

import gc
from itertools import pairwise
from pathlib import Path

import numpy as np

from slmake import cli, params
from slmake.scoring import metrics, onnx_runner, transformers_runner
from slmake.scoring import run as run_module
from slmake.scoring.questions import Questions


def measure(questions: Questions, run: run_module.Run, weights: np.ndarray) -> tuple[list[str], dict]:
    """One model's answers to the scored rows, and its entry in metrics.json (without its size)."""
    count, labels = questions.scored, questions.form["labels"]
    expected = questions.expected[:count]
    answers = [questions.read(text, i) for i, text in enumerate(run.texts[:count])]
    found = metrics.score(expected, answers, labels, weights)
    if labels:
        chosen = [labels[index] for index in run.choices[:count]]
        found["restricted_accuracy"] = round(sum(a == e for a, e in zip(chosen, expected, strict=True)) / count, 6)
        found["restricted_macro_f1"] = round(metrics.macro_f1(expected, chosen, labels), 6)
    tokens = sum(len(answer) for answer in questions.answers[:count])
    found["answer_perplexity"] = round(float(np.exp(min(run.answer_nll[:count].sum() / tokens, 700))), 4)
    return answers, found


def compare(
    questions: Questions, runs: dict[str, run_module.Run], answers: dict[str, list[str]], weights: np.ndarray
) -> dict:
    """`parity` and `drop` of every model against the one it was made from (the one before it; adapter's is left to merged)."""
    count, labels = questions.scored, questions.form["labels"]
    names = list(runs)
    found: dict = {"parity": {}, "drop": {}}
    for before, after in pairwise(names):
        key = f"{after}_vs_{before}"
        if (before, after) not in (("base", "adapter"), ("base", "merged")):  # these are meant to differ
            found["parity"][key] = metrics.parity(np.stack(runs[before].logits), np.stack(runs[after].logits))
        found["drop"][key] = metrics.drop(questions.expected[:count], answers[before], answers[after], labels, weights)
    if "base" in names and len(names) > 2:
        last = names[-1]
        found["drop"][f"{last}_vs_base"] = metrics.drop(
            questions.expected[:count], answers["base"], answers[last], labels, weights
        )
    return {key: value for key, value in found.items() if value}


def ask_all(
    section: params.Evaluate, folders: dict[str, Path], onnx: str, questions: Questions, new_tokens: int, job: cli.Job
) -> dict[str, run_module.Run]:
    """Every model's run. The exported one is first: its memory is measured before torch is there."""
    runs = {}
    if onnx in folders:
        runs[onnx] = onnx_runner.ask_onnx(folders[onnx], questions, new_tokens, job, onnx)
    timed = "merged" if "merged" in folders else "base"
    model = None
    for name in ("base", "adapter", "merged"):
        if name not in folders:
            continue
        if name == "adapter":
            model = model or transformers_runner.Transformers(folders["adapter_base"])
            model.add_adapter(folders[name])
        else:
            del model
            gc.collect()
            model = transformers_runner.Transformers(folders[name])
        rows = section.latency_rows if name == timed else 0
        runs[name] = model.ask(questions, new_tokens, section.batch_size, rows, job, name)
    return {name: runs[name] for name in ("base", "adapter", "merged", onnx) if name in runs}
