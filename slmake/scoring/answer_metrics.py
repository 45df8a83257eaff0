"""Scores of one answer that `evaluate.metrics` names, and their means with intervals."""

import functools
import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slmake import json_schemas
from slmake.errors import UserError
from slmake.params.metrics import AnswerMetric
from slmake.patterns import compiled
from slmake.scoring.metrics import interval
from slmake.scoring.questions import Questions
from slmake.text import parse_json
from slmake.user_reads import inputs_only

# Of (prompt, expected, answer) to a number; None where the metric has nothing to say of this row.
Score = Callable[[str, str, str], float | None]
LARGEST = 1e100  # a number of a metric, so that sums and squares of many are finite
# A number in a text, with the hyphen or Unicode's minus where it cannot be that of a range such as 3-5.
NUMBER = re.compile(
    r"""(?:(?<![^\W_])(?<!%)[-+\u2212])?
    (?:
        (?<!\d,)[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?:\.\d*)?  # 1,234,567.8
        | (?<!\d,)[1-9]\d?(?:,\d{2})+,\d{3}(?!,?\d)(?:\.\d*)?  # 12,34,567.8
        | (?<!\d,)(?P<comma>(?:[1-9]\d{0,2}(?:\.\d{3})+|\d+),\d+(?![,.]?\d))  # 3,14 or 1.234.567,8
        | (?<!\d[.'\u2019\xa0\u2009\u202f])(?P<other>  # 1.234.567 or 1'234.5
            [1-9]\d{0,2}(?:(?:\.\d{3}){2,}(?!\.?\d)|(?P<mark>['\u2019\xa0\u2009\u202f])\d{3}(?:(?P=mark)\d{3})*(?!(?P=mark)?\d))
            )(?:[.,]\d*)?
        | \d+(?:\.\d*)?
        | (?<!\d)\.\d+
    )
    (?:[eE][-+\u2212]?\d+)?""",
    re.VERBOSE,
)


def contains(prompt: str, expected: str, answer: str) -> float:
    """Whether the expected answer is part of the answer, letter case and white space apart."""
    return float(" ".join(expected.split()).casefold() in " ".join(answer.split()).casefold())


def json_valid(prompt: str, expected: str, answer: str) -> float:
    """Whether the answer is a JSON document (RFC 8259), alone or in a Markdown code block."""
    return float(read_json(answer) is not None)


def json_schema(file: str) -> Score:
    """Whether the answer is a JSON document that a schema accepts.

    Raises:
        UserError: the file is not there or is no JSON Schema.
    """
    _, accepted = json_schemas.read(Path(file), "evaluate.metrics")

    def score(prompt: str, expected: str, answer: str) -> float:
        document = read_json(answer)
        return float(document is not None and accepted.is_valid(document[0]))

    return score


def regex(pattern: str) -> Score:
    """Whether the whole answer, without outer white space, has this form (Python's `re`).

    Raises:
        UserError: (on a row) it cannot be told within a second.
    """
    form = compiled(pattern, dotall=True)

    def score(prompt: str, expected: str, answer: str) -> float:
        try:
            return float(form.fullmatch(answer.strip()))
        except ValueError as error:
            raise UserError(str(error)) from None

    return score


def numeric(tolerance: float) -> Score:
    """Whether the answer's last number is the expected one, up to a tolerance in the number's own unit.

    Raises:
        UserError: (on a row) the expected answer holds no number.
    """

    def score(prompt: str, expected: str, answer: str) -> float:
        wanted, given = last_number(expected), last_number(answer)
        if wanted is None:
            raise UserError("the expected answer holds no number")
        return float(given is not None and abs(given - wanted) <= tolerance)

    return score


def tool_name(prompt: str, expected: str, answer: str) -> float | None:
    """Whether the answer calls the expected tools, in any order; None where none is expected."""
    wanted = tool_calls(expected)
    names = [sorted(call["name"] for call in calls) for calls in (wanted, tool_calls(answer))]
    return float(names[0] == names[1]) if wanted else None


def tool_arguments(prompt: str, expected: str, answer: str) -> float | None:
    """Whether the answer calls the expected tools with the expected values, order apart; None where none is expected."""
    wanted = tool_calls(expected)
    if not wanted:
        return None
    try:
        calls = [Counter(map(json_schemas.hashable, both)) for both in (wanted, tool_calls(answer))]
    except RecursionError:  # nested as no expected answer is
        return 0.0
    return float(calls[0] == calls[1])


def read_json(answer: str) -> tuple[Any] | None:
    """The document in an answer as a tuple of one, since `null` is a document, too; None for no document."""
    text = answer.strip()
    if block := re.fullmatch(r"```(?:json)?[^\S\n]*\n(.*)```", text, re.DOTALL):
        text = block[1].strip()
    try:
        return (parse_json(text),)
    except (ValueError, RecursionError):
        return None


def last_number(text: str) -> float | None:
    """The last number in a text, as arithmetic datasets are scored.

    A comma before groups of three digits separates thousands; a single one before fewer or more is a decimal comma (3,14); of several, as
    in 1,2,3, each separates two numbers. An apostrophe or a space that breaks no line before groups of three digits separates thousands, and
    so do two dots; an ordinary space separates numbers.
    """
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return None
    written = numbers[-1][0].replace("\u2212", "-")
    if whole := numbers[-1]["other"]:
        written = written.replace(whole, re.sub(r"\D", "", whole)).replace(",", ".")
    elif numbers[-1]["comma"]:
        written = written.replace(".", "").replace(",", ".")
    return float(written.replace(",", ""))


def tool_calls(text: str) -> list[dict]:
    """Tool calls in an answer: name and arguments of every JSON object that has them, in whatever marks a chat template uses."""
    decoder, calls, position = json.JSONDecoder(), [], 0
    while (position := text.find("{", position)) >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        call = value.get("function", value)
        arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
        if isinstance(arguments, str):  # OpenAI's form: JSON as text
            arguments = (read_json(arguments) or (arguments,))[0]
        if arguments is not None and isinstance(call.get("name"), str):
            calls.append({"name": call["name"], "arguments": arguments})
        position = end
    return calls


PLAIN: dict[str, Score] = {
    "contains": contains,
    "json_valid": json_valid,
    "tool_name": tool_name,
    "tool_arguments": tool_arguments,
}
WITH_ARGUMENT: dict[str, Callable[[Any], Score]] = {"json_schema": json_schema, "regex": regex, "numeric": numeric}


@inputs_only()
def own_function(file: str, name: str) -> Score:
    """A user's function.

    Raises:
        UserError: no such file or function, the file cannot be run, or it reads what is no input.
    """
    where = f"evaluate.metrics: {file}:{name}"
    if not Path(file).is_file():
        raise UserError(f"{where}: no such file. Correct the path; it starts at the project's folder.")
    spec = importlib.util.spec_from_file_location(f"slmake_metric:{file}:{name}".replace(".", "_"), file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses, pydantic and pickle look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: the file cannot be run: {type(error).__name__}: {error}. Correct it.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{where}: there is no such function in the file. Define it, or correct the name.")
    return function


@functools.cache
def function_of(metric: AnswerMetric) -> Score:
    """The function that scores one answer.

    Raises:
        UserError: its file is not there or wrong.
    """
    if metric.kind is None:
        return own_function(str(metric.argument), metric.figure)
    return PLAIN[metric.kind] if metric.kind in PLAIN else WITH_ARGUMENT[metric.kind](metric.argument)


@inputs_only()
def numbers_of(metric: AnswerMetric, questions: Questions, answers: list[str]) -> np.ndarray:
    """One number per answer, float64 [answers], to the first rows; NaN where the metric has nothing to say.

    Raises:
        UserError: the function failed on a row, or gave no finite number; the row is named. Or it reads what is no input.
    """
    function, numbers = function_of(metric), np.full(len(answers), np.nan)
    for i, answer in enumerate(answers):
        where = f"evaluate.metrics: {metric.figure} on row {questions.rows[i]} (answer {answer[:80]!r})"
        try:
            number = function(questions.texts[i] or "", questions.expected[i], answer)
        except UserError as error:
            raise UserError(f"{where}: {error}. Take the metric out, or correct the row.") from None
        except (Exception, SystemExit) as error:
            raise UserError(f"{where}: {type(error).__name__}: {error}. Correct the function.") from error
        if number is None:
            continue
        if not isinstance(number, int | float | np.number | np.bool_) or not abs(number) <= LARGEST:  # not NaN either
            raise UserError(f"{where}: it returned {number!r}, not a finite number. Correct the function.")
        numbers[i] = float(number)
    return numbers


def values_of(wanted: list[AnswerMetric], questions: Questions, answers: list[str]) -> dict[str, np.ndarray]:
    """The numbers of every metric by its figure.

    Raises:
        UserError: as of `numbers_of`, or a metric has nothing to say of any row.
    """
    values = {metric.figure: numbers_of(metric, questions, answers) for metric in wanted}
    for figure, numbers in values.items():
        if np.isnan(numbers).all():
            raise UserError(f"evaluate.metrics: {figure} has nothing to score in any row. Take it out.")
    return values


def bootstrapped(numbers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of every resample, float64 [samples], over the rows that have a number; NaN where it has none of them."""
    there = ~np.isnan(numbers)
    drawn = weights[:, there]
    total = drawn.sum(axis=1)
    return np.divide(drawn @ numbers[there], total, out=np.full(len(weights), np.nan), where=total > 0)


def score(scored: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
    """Means with their intervals, for metrics.json.

    Args:
        scored: `values_of` them.
        weights: bootstrap weights [samples, rows].
    """
    figures = {}
    for figure, numbers in scored.items():
        figures[figure] = round(float(np.nanmean(numbers)), 6)
        figures[f"{figure}_low"], figures[f"{figure}_high"] = interval(bootstrapped(numbers, weights))
    return figures


def drop(before: dict[str, np.ndarray], after: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
    """What each figure loses from one model to the next, with intervals of paired resamples."""
    figures = {}
    for figure in before:
        figures[figure] = round(float(np.nanmean(before[figure]) - np.nanmean(after[figure])), 6)
        lost = bootstrapped(before[figure], weights) - bootstrapped(after[figure], weights)
        figures[f"{figure}_low"], figures[f"{figure}_high"] = interval(lost)
    return figures
