"""The adapter's answers: asked on some rows, and taken from the merged model, the same function, on rows that are clear.

Rounding alone sets the two apart. How far is measured on the rows that both answer; an answer can differ only where a token or
a label leads by little more than that. Such rows are asked, too, and all rows if the two differ where they cannot.
"""

from collections.abc import Iterable

import numpy as np

from slmake.scoring.questions import Questions
from slmake.scoring.run import Run

SAFETY = 10  # times the largest difference that was seen; twice would do if no other row differed more


def rows_to_ask(questions: Questions, count: int) -> list[int]:
    """`count` rows, evenly spread over those that parity compares; all of these if there are fewer."""
    return np.linspace(0, questions.compared - 1, min(count, questions.compared)).astype(int).tolist()


def unclear(adapter: Run, merged: Run, asked: list[int]) -> list[int]:
    """The rows that were not asked and to which the adapter may give another answer than the merged model.

    Args:
        adapter: its run on the rows `asked`.
        merged: its run on all rows.
    """
    largest = np.max([np.abs(adapter.logits[i] - merged.logits[i]).max() for i in asked])
    clear = merged.margins > SAFETY * largest  # never of a difference that is not a number
    if any(clear[i] and _answer(adapter, i) != _answer(merged, i) for i in asked):
        clear[:] = False
    return sorted(set(np.flatnonzero(~clear).tolist()) - set(asked))


def fill(run: Run, source: Run, rows: Iterable[int]) -> None:
    """Copy the merged model's answers to `rows`, with their likelihoods; not its logits: parity compares what both computed."""
    for i in rows:
        run.texts[i], run.answer_nll[i] = source.texts[i], source.answer_nll[i]
        run.choices[i : i + 1] = source.choices[i : i + 1]


def join(run: Run, again: Run, rows: list[int]) -> None:
    """Add what the adapter, asked again, answered to `rows`, and what that took."""
    fill(run, again, rows)
    for i in rows:
        run.logits[i : i + 1] = again.logits[i : i + 1]  # of a row behind those compared there are none
    for name in ("load_s", "score_s"):
        run.timings[name] += again.timings[name]
    run.timings["peak_memory_bytes"] = max(each.timings["peak_memory_bytes"] for each in (run, again))


def _answer(run: Run, index: int) -> tuple:
    return run.texts[index], run.choices[index : index + 1]
