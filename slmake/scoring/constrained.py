"""The exported model's answers when guidance holds them to a constraint, beside its free ones."""

from dataclasses import replace

import numpy as np

from slmake import cli
from slmake.constraints import guidance, tokens_needed
from slmake.errors import UserError
from slmake.generation import Exported
from slmake.scoring import answer_metrics, metrics
from slmake.scoring.onnx_runner import OnnxRow
from slmake.scoring.questions import Questions
from slmake.scoring.run import WARM_UP, percentiles

WHERE = "evaluate.constrain"
FIGURES = ("accuracy", "macro_f1", "rouge_l")


def ask(
    model: Exported, constraint: str | dict[str, str], questions: Questions, new_tokens: int, job: cli.Job, name: str
) -> tuple[list[str], dict]:
    """Texts of the scored rows' answers, and the latency in milliseconds, measured as that of the free answers.

    Raises:
        UserError: the constraint cannot be made into guidance, or the tokenizer cannot write what it asks for.
    """
    sampling = replace(model.sampling, guidance=guidance(constraint, questions.form, WHERE))
    new_tokens = max(new_tokens, tokens_needed(constraint, questions.form))
    texts, waits = [], []
    try:
        with job.progress(questions.scored, f"rows of {name}, constrained") as bar:
            for i in [*range(min(WARM_UP, questions.scored)), *range(questions.scored)]:
                prompt = questions.runtime_prompt(model, i)
                row = OnnxRow(len(prompt))
                texts.append(model.decode(model.generate(prompt, new_tokens, row.look, sampling=sampling)))
                waits.append(1000 * row.elapsed())
                bar.update(1)
    except ValueError as error:
        raise UserError(f"{WHERE}: {error}") from None
    timings = percentiles(waits[-questions.scored :])
    return texts[-questions.scored :], {f"constrained_{key}": value for key, value in timings.items()}


def measure(
    questions: Questions, texts: list[str], free: list[str], constraint: str | dict[str, str], weights: np.ndarray
) -> tuple[list[str], dict]:
    """The constrained answers, their figures under names that begin with `constrained_`, and the share of valid answers of both kinds.

    Args:
        texts: generated with the constraint.
        free: answers without it.
    """
    labels, count = questions.form["labels"], questions.scored
    expected = questions.expected[:count]
    answers = [questions.read(text, i) for i, text in enumerate(texts)]
    scores = metrics.score(expected, answers, labels, weights)
    kept = {
        f"constrained_{key}": value
        for key, value in scores.items()
        if key.removesuffix("_low").removesuffix("_high") in FIGURES
    }
    valid = _validity(constraint, labels)
    shares = {"valid": [valid(answer) for answer in free], "constrained_valid": [valid(text) for text in texts]}
    return answers, kept | {name: round(sum(flags) / count, 6) for name, flags in shares.items()}


def _validity(constraint: str | dict[str, str], labels: list[str] | None):
    """Whether an answer meets a constraint, judged without the runtime."""
    if constraint == "labels":
        return lambda answer: answer in labels
    (kind, argument) = next(iter(constraint.items()))
    score = getattr(answer_metrics, kind)(argument)
    return lambda answer: bool(score("", "", answer))
