"""The gates of a build before it is trained: judged by the figures that `evaluate` will write, if every answer is right."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from slmake import params
from slmake.scoring import constrained, gates
from slmake.scoring.harness import SKIPPED
from slmake.scoring.measure import compare, measure
from slmake.scoring.questions import Questions
from slmake.scoring.run import Run, percentiles

ENDS = ("", "_low", "_high")


def judge(everything: params.Params, dataset: Path, tried: dict[str, Run], of_tasks: dict[str, float]) -> None:
    """Find gates that could not be judged: on a figure that is not measured, of a model that is not scored, or by too few rows.

    Args:
        tried: runs of the twin, at least one, which say what is measured of which model.
        of_tasks: figures of `evaluate.lm_eval` by their names.

    Raises:
        UserError: there is such a gate.
    """
    section, onnx = everything.evaluate, everything.quantize.precision
    questions = Questions(dataset, section.max_samples)
    questions.extend_for_parity(section.parity_prompts)
    if not questions.form["labels"]:  # long texts take long to be compared, and all answers are right
        questions.expected = [str(number) for number in range(len(questions.expected))]
    runs = {name: _right(questions, run) for name, run in _scored(everything, tried).items()}
    weights = np.ones((1, questions.scored))
    answers, scores = measure(questions, next(iter(runs.values())), weights)
    counted = (
        {"test_rows": 0, "texts": questions.scored} if questions.without_dataset else {"test_rows": questions.scored}
    )
    metrics = counted | compare(questions, runs, dict.fromkeys(runs, answers), weights)
    more = [metric.figure for metric in section.answer_metrics]
    for name, run in runs.items():
        metrics[name] = scores | {"size_bytes": 1} | (of_tasks if name not in SKIPPED else {})
        starts = ["", *(["sampled_"] if section.sampling else [])]
        if section.constrain != "none" and name == onnx:
            starts.append("constrained_")
            held = constrained.Constrained(answers, {}, lambda answer, row: True)
            metrics[name] |= constrained.measure(questions, held, answers, weights)[1]
            run.timings |= {f"constrained_{key}": value for key, value in percentiles([1.0]).items()}
        metrics[name] |= {f"{start}{figure}{end}": 1.0 for start in starts for figure in more for end in ENDS}
        # Whether there is a ratio to a figure is not known yet: none is 0.
        metrics[name], run.timings = (
            {key: value or 1.0 for key, value in figures.items()} for figures in (metrics[name], run.timings)
        )
    benchmark = {name: run.timings for name, run in runs.items()}
    judged = everything.gates
    if not of_tasks:  # the names of their figures are not known
        known = [gate for gate in judged.checks if "lm_eval." not in gate.metric]
        judged = judged.model_copy(update={"checks": known})
    gates.judge(judged, metrics, benchmark, gates.read_published(judged))


def _scored(everything: params.Params, tried: dict[str, Run]) -> dict[str, Run]:
    """A run for each model that `evaluate` will score. The twin has not got an adapter from elsewhere, nor what is merged with it."""
    stages, models = set(everything.stages), everything.evaluate.models
    made = {"adapter": {"finetune", "merge"}, "merged": {"merge"}}
    absent = [name for name in made if name in models and made[name] & stages and name not in tried]
    if not absent:
        return tried
    some = tried.get("base") or next(iter(tried.values()))
    untimed = replace(
        some, timings={key: value for key, value in some.timings.items() if not key.startswith("latency")}
    )
    runs = tried | dict.fromkeys(absent, untimed)
    if "merged" in absent:  # of it and base, it is the one that is timed
        runs |= {"merged": some} | ({"base": untimed} if "base" in tried else {})
    return {name: runs[name] for name in gates.MODELS if name in runs}


def _right(questions: Questions, run: Run) -> Run:
    """A run with the expected answers, and the figures of another."""
    count, labels = len(questions.expected), questions.form["labels"]
    return Run(
        texts=list(questions.expected),
        choices=[labels.index(answer) for answer in questions.expected] if labels else [],
        answer_nll=np.zeros(count),
        logits=[np.zeros((len(questions.positions(i)), 2), dtype=np.float32) for i in range(questions.compared)],
        timings=dict(run.timings),
        sampled=[list(questions.expected[: questions.scored]) for _ in run.sampled],
    )
