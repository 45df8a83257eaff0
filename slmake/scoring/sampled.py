"""Sampled answers: several to every row, scored by their mean, beside the greedy ones."""

from dataclasses import replace

import numpy as np

from slmake import cli
from slmake.generation import Exported
from slmake.params.evaluate import AnswerSampling
from slmake.params.metrics import AnswerMetric
from slmake.scoring import answer_metrics
from slmake.scoring.metrics import is_right, rouge_l
from slmake.scoring.questions import Questions


def ask(
    model: Exported, sampling: AnswerSampling, questions: Questions, new_tokens: int, job: cli.Job, name: str
) -> list[list[str]]:
    """The exported model's texts, [n][scored rows]; every answer has a seed of its own, so it depends on no other."""
    texts: list[list[str]] = []
    with job.progress(sampling.n * questions.scored, f"answers of {name}, sampled") as bar:
        for _ in range(sampling.n):
            texts.append([])
            for i in range(questions.scored):
                seed = sampling.seed + (len(texts) - 1) * questions.scored + i
                chosen = replace(model.sampling, temperature=sampling.temperature, top_p=sampling.top_p, seed=seed)
                prompt = questions.runtime_prompt(model, i)
                texts[-1].append(model.decode(model.generate(prompt, new_tokens, sampling=chosen)))
                bar.update(1)
    return texts


def answers_of(questions: Questions, texts: list[list[str]]) -> list[list[str]]:
    """The answers in sampled texts, as those in greedy ones are read; both [n][scored rows]."""
    return [list(map(questions.read, row)) for row in texts]


def values_of(questions: Questions, texts: list[list[str]], more: list[AnswerMetric]) -> dict[str, np.ndarray]:
    """Of every row the mean over its answers, float64 [rows], by figure; NaN where a metric has nothing to say of any of them.

    Args:
        more: what `evaluate.metrics` asks for beside accuracy.
    """
    expected = questions.expected[: questions.scored]
    answers = answers_of(questions, texts)
    each = [
        {"accuracy": np.array([float(is_right(e, a)) for e, a in zip(expected, given, strict=True)])}
        | answer_metrics.values_of(more, questions, given)
        for given in answers
    ]
    means = {}
    for figure in each[0]:
        numbers = np.stack([values[figure] for values in each])
        count = (~np.isnan(numbers)).sum(axis=0)
        means[f"sampled_{figure}"] = np.divide(
            np.nansum(numbers, axis=0), count, out=np.full(len(expected), np.nan), where=count > 0
        )
    return means


def score(questions: Questions, texts: list[list[str]], weights: np.ndarray, more: list[AnswerMetric]) -> dict:
    """The figures for metrics.json: means over rows of `values_of` with their intervals; for open text ROUGE-L."""
    scores = answer_metrics.score(values_of(questions, texts, more), weights)
    if not questions.form["labels"]:
        expected = questions.expected[: questions.scored]
        means = [rouge_l(expected, answers) for answers in answers_of(questions, texts)]
        scores["sampled_rouge_l"] = round(float(np.mean(means)), 6)
    return scores
