"""The exported model's answers when guidance holds them to a constraint, beside its free ones."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from slmake import cli, constraints
from slmake.constraints import guidance, tokens_needed, tool_guidance
from slmake.errors import UserError
from slmake.generation import Exported
from slmake.json_schemas import validator
from slmake.params.metrics import AnswerMetric
from slmake.scoring import answer_metrics, metrics
from slmake.scoring.onnx_runner import OnnxRow
from slmake.scoring.questions import Questions
from slmake.scoring.run import WARM_UP, percentiles
from slmake.tool_calls import CallForm, schema_of

WHERE = "evaluate.constrain"
FIGURES = ("accuracy", "macro_f1", "rouge_l")


class Constrained(NamedTuple):
    """The answers to the scored rows with a constraint."""

    texts: list[str]
    timings: dict[str, float]  # milliseconds, measured as those of the free answers
    valid: Callable[[str, int], bool]  # whether an answer to a row meets the constraint, judged without the runtime


def ask(
    model: Exported, constraint: str | dict[str, str], questions: Questions, new_tokens: int, job: cli.Job, name: str
) -> Constrained:
    """Ask the scored rows.

    Raises:
        UserError: the constraint cannot be made into guidance, or the tokenizer cannot write what it asks for.
    """
    held = guidance_of_rows(model, constraint, questions)
    new_tokens = max(new_tokens, tokens_needed(constraint, questions.form))
    texts, waits = [], []
    try:
        with job.progress(questions.scored, f"rows of {name}, constrained") as bar:
            for i in [*range(min(WARM_UP, questions.scored)), *range(questions.scored)]:
                chosen = held(i)
                prompt = questions.runtime_prompt(model, i)
                row, sampling = OnnxRow(model, prompt, new_tokens), replace(model.sampling, guidance=chosen)
                texts.append(model.decode(model.generate(prompt, new_tokens, row.look, sampling=sampling)))
                waits.append(1000 * row.elapsed())
                bar.update(1)
    except ValueError as error:
        raise UserError(f"{WHERE}: {error}") from None
    timings = percentiles(waits[-questions.scored :])
    calls = CallForm.of(model) if constraint == "tools" else None
    valid = _validity(constraint, questions, calls)
    return Constrained(
        texts[-questions.scored :], {f"constrained_{key}": value for key, value in timings.items()}, valid
    )


def guidance_of_rows(
    model: Exported, constraint: str | dict[str, str], questions: Questions
) -> Callable[[int], tuple[str, str] | None]:
    """What gives the guidance of a row: the same for all rows, or for those with the same tools.

    Raises:
        UserError: the constraint cannot be made into guidance; of tools when a row is asked for.
    """
    plain = guidance(constraint, questions.form, WHERE)
    by_tools = functools.cache(lambda tools: tool_guidance(model, json.loads(tools), WHERE))
    return lambda i: by_tools(json.dumps(questions.tools[i])) if constraint == "tools" else plain


def refuse_unfollowed(model: Exported, constraint: str | dict[str, str], questions: Questions) -> None:
    """Let the runtime make the guidance of all rows, without asking them.

    Raises:
        UserError: it cannot, or a row's tools have schemas that cannot be checked.
    """
    if constraint == "tools":
        refuse_uncheckable(questions)
    held = guidance_of_rows(model, constraint, questions)
    for chosen in dict.fromkeys(map(held, range(questions.scored))):
        constraints.refuse_unfollowed(model, chosen, WHERE)


def refuse_uncheckable(questions: Questions) -> None:
    """Refuse tools whose schemas cannot be checked here: the share of valid answers is not judged by the runtime's guidance.

    Raises:
        UserError: a schema is none, or has a pattern that Python does not read.
    """
    for tools in {json.dumps(tools): tools for tools in questions.tools[: questions.scored]}.values():
        for function in (tool["function"] for tool in tools or []):
            try:
                validator(schema_of(function))
            except ValueError as error:
                raise UserError(
                    f"{WHERE}: tools: the parameters of {function['name']!r} are no JSON Schema that can be checked: {error}. "
                    "Correct them in the dataset."
                ) from None


def measure(
    questions: Questions,
    asked: Constrained,
    free: list[str],
    weights: np.ndarray,
    more: list[AnswerMetric] | None = None,
) -> tuple[list[str], dict]:
    """The constrained answers, their figures under names that begin with `constrained_`, and the share of valid answers of both kinds.

    Args:
        free: answers without the constraint.
        more: what `evaluate.metrics` asks for.
    """
    labels, count = questions.form["labels"], questions.scored
    answers = list(map(questions.read, asked.texts))
    scores = metrics.score(questions.expected[:count], answers, labels, weights)
    kept = {key: value for key, value in scores.items() if key.removesuffix("_low").removesuffix("_high") in FIGURES}
    kept |= answer_metrics.score(answer_metrics.values_of(more or [], questions, answers), weights)
    shares = {
        name: round(sum(asked.valid(text, i) for i, text in enumerate(texts)) / count, 6)
        for name, texts in (("valid", free), ("constrained_valid", asked.texts))
    }
    return answers, {f"constrained_{key}": value for key, value in kept.items()} | shares


def _validity(
    constraint: str | dict[str, str], questions: Questions, calls: CallForm | None
) -> Callable[[str, int], bool]:
    """`Constrained.valid`."""
    if constraint == "labels":
        return lambda answer, i: answer in questions.form["labels"]
    if calls:
        return lambda answer, i: calls_fit(calls, questions.tools[i] or [], answer)
    (kind, argument) = next(iter(constraint.items()))
    score = getattr(answer_metrics, kind)(argument)
    return lambda answer, i: bool(score("", "", answer))


def calls_fit(form: CallForm, tools: list[dict], answer: str) -> bool:
    """Whether an answer is text, or calls tools with arguments that fit their schemas."""
    schemas = {function["name"]: schema_of(function) for function in (tool["function"] for tool in tools)}
    text, calls = form.read(answer, list(schemas))
    broken = form.mark in text if form.mark and form.mark not in form.hidden else text.startswith(f"{form.opening}{{")
    return not broken and all(validator(schemas[name]).is_valid(given) for name, given in calls)
