"""Score several models on the same questions, and compare each with the one before it."""

import gc
from itertools import pairwise
from pathlib import Path

import numpy as np

from slmake import cli, params
from slmake.params.metrics import AnswerMetric
from slmake.scoring import adapter_answers, answer_metrics, constrained, metrics, sampled, tokenizers
from slmake.scoring.onnx_runner import OnnxRunner
from slmake.scoring.questions import Questions
from slmake.scoring.run import Run
from slmake.scoring.transformers_runner import TransformersRunner


def measure(
    questions: Questions, run: Run, weights: np.ndarray, more: list[AnswerMetric] | None = None
) -> tuple[list[str], dict]:
    """One model's answers to the scored rows, and its entry in metrics.json (without its size).

    Args:
        more: what `evaluate.metrics` asks for beside accuracy.

    Raises:
        UserError: one of these metrics cannot be computed.
    """
    count, labels = questions.scored, questions.form["labels"]
    expected = questions.expected[:count]
    answers = list(map(questions.read, run.texts[:count]))
    tokens = sum(len(answer) for answer in questions.answers[:count])
    perplexity = round(float(np.exp(min(run.answer_nll[:count].sum() / tokens, 700))), 4)
    if questions.without_dataset:
        return answers, {"perplexity": perplexity}
    scores = metrics.score(expected, answers, labels, weights)
    values = answer_metrics.values_of(more or [], questions, answers)
    scores |= answer_metrics.score(values, weights)
    if run.sampled:
        scores |= sampled.score(questions, run.sampled, weights, more or [])
    if labels:
        chosen = [labels[index] for index in run.choices[:count]]
        scores["restricted_accuracy"] = round(metrics.accuracy(expected, chosen), 6)
        scores["restricted_macro_f1"] = round(metrics.macro_f1(expected, chosen, labels), 6)
    scores["answer_perplexity"] = perplexity
    return answers, scores


def drop(
    questions: Questions,
    before: list[str],
    after: list[str],
    weights: np.ndarray,
    more: list[AnswerMetric] | None = None,
) -> dict:
    """What every score of answers loses from one model to the next, with intervals; arguments as of `measure`."""
    expected, labels = questions.expected[: questions.scored], questions.form["labels"]
    values = [answer_metrics.values_of(more or [], questions, answers) for answers in (before, after)]
    return metrics.drop(expected, before, after, labels, weights) | answer_metrics.drop(*values, weights)


def compare(
    questions: Questions,
    runs: dict[str, Run],
    answers: dict[str, list[str]],
    weights: np.ndarray,
    more: list[AnswerMetric] | None = None,
) -> dict:
    """`parity` and `drop` of every model against the one before it, from which it was made."""
    names, more = list(runs), more or []
    compared: dict = {"parity": {}, "drop": {}}
    for before, after in pairwise(names):
        if (before, after) not in (("base", "adapter"), ("base", "merged")):  # these are meant to differ
            logits = zip(runs[before].logits, runs[after].logits, strict=True)
            asked = zip(*(pair for pair in logits if pair[0] is not None), strict=True)  # of an adapter not all rows
            compared["parity"][f"{after}_vs_{before}"] = metrics.parity(*map(np.vstack, asked))
    whole = [("base", names[-1])] if "base" in names and len(names) > 2 else []
    for before, after in [] if questions.without_dataset else [*pairwise(names), *whole]:
        lost = drop(questions, answers[before], answers[after], weights, more)
        if runs[before].sampled:
            values = (sampled.values_of(questions, runs[name].sampled, more) for name in (before, after))
            lost |= answer_metrics.drop(*values, weights)
        compared["drop"][f"{after}_vs_{before}"] = lost
    return {key: value for key, value in compared.items() if value}


def ask_all(
    section: params.Evaluate,
    folders: dict[str, Path],
    onnx: str,
    quantized: params.Finetune | None,
    questions: Questions,
    new_tokens: int,
    job: cli.Job,
) -> tuple[dict[str, Run], dict]:
    """Every model's run, and facts: how far the exported model's tokenizer agrees with training's, its answers with
    `evaluate.constrain`, its execution provider where it was scored on another one, and how many rows the adapter was asked.

    Args:
        folders: the models by name, in the order they are made; `adapter_base` is the base of the adapter.
        onnx: the exported model's name.
        quantized: the settings of QLoRA, where the adapter belongs to its 4-bit base; else None.
    """
    runs: dict[str, Run] = {}
    facts: dict = {}
    if onnx in folders:  # first: its memory is measured before torch is loaded
        exported = OnnxRunner(folders[onnx])
        runs[onnx] = exported.ask(questions, new_tokens, job, onnx)
        if section.constrain != "none":
            facts["constrained"] = constrained.ask(exported.model, section.constrain, questions, new_tokens, job, onnx)
            runs[onnx].timings |= facts["constrained"].timings
        if section.sampling:
            runs[onnx].sampled = sampled.ask(exported.model, section.sampling, questions, new_tokens, job, onnx)
        facts["tokenizer"] = tokenizers.compare(exported.model, _tokenizer(folders, onnx), questions)
        if exported.model.runs_on != exported.model.provider:
            facts["provider"] = {"exported_for": exported.model.provider, "scored_on": exported.model.runs_on}
        del exported  # one model is in memory at a time
    timed = "merged" if "merged" in folders else "base"
    some_rows = "adapter" in folders and "merged" in folders and not section.sampling
    asked = adapter_answers.rows_to_ask(questions, section.parity_prompts) if some_rows else None
    model = None
    for name in ("base", "adapter", "merged"):
        if name not in folders:
            continue
        if name != "adapter" or folders["adapter_base"] != folders.get("base"):
            model = None
            gc.collect()
        if name == "adapter":
            model = _with_adapter(model, section, folders, quantized)
        else:
            rows = section.latency_rows if name == timed else 0
            model = TransformersRunner(folders[name], section.batch_size, rows)
        runs[name] = model.ask(questions, new_tokens, job, name, asked if name == "adapter" else None)
        if section.sampling:
            runs[name].sampled = model.sample(questions, new_tokens, section.sampling, job, name)
    if asked is not None:
        unclear = adapter_answers.unclear(runs["adapter"], runs["merged"], asked)
        adapter_answers.fill(runs["adapter"], runs["merged"], set(range(len(questions.rows))) - {*asked, *unclear})
        if unclear:
            del model
            gc.collect()
            again = _with_adapter(None, section, folders, quantized).ask(questions, new_tokens, job, "adapter", unclear)
            adapter_answers.join(runs["adapter"], again, unclear)
        facts["adapter_rows_asked"] = len(asked) + len(unclear)
    return {name: runs[name] for name in ("base", "adapter", "merged", onnx) if name in runs}, facts


def _with_adapter(
    model: TransformersRunner | None,
    section: params.Evaluate,
    folders: dict[str, Path],
    quantized: params.Finetune | None,
) -> TransformersRunner:
    """The adapter on its base: on the model that is in memory, or else on a new one."""
    model = model or TransformersRunner(folders["adapter_base"], section.batch_size)
    model.add_adapter(folders["adapter"], quantized)
    model.latency_rows = 0
    return model


def _tokenizer(folders: dict[str, Path], onnx: str):
    """Training's tokenizer: that of the model that the export was made from, of which the export has a copy."""
    from transformers import AutoTokenizer

    folder = folders.get("merged") or folders.get("base") or folders[onnx]
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
