"""Arithmetic of the results: ratios of alternating runs, bars met or missed, fitted exponents; and where they are kept."""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path


def ratios(over: Iterable[float], under: Iterable[float]) -> list[float]:
    """Ratio of each round; both were measured in the same rounds.

    Raises:
        ValueError: they have different numbers of rounds, or nothing was measured.
    """
    values = [a / b for a, b in zip(over, under, strict=True)]
    if not values:
        raise ValueError("no round was measured")
    return values


def bar(name: str, values: list[float], at_least: float | None = None, at_most: float | None = None, **more) -> dict:
    """One line of the table: median, minimum and maximum of some runs, and whether the median meets what is asked.

    Args:
        values: ratios (or, with `unit`, amounts), one per round.
        more: `unit` of the values (default: "x", a ratio), `note` for the reader.

    Returns:
        A JSON object; `met` is None where nothing is asked.
    """
    values = [float(value) for value in values]  # NumPy's own do not go into JSON
    middle = statistics.median(values)
    met = None
    if at_least is not None:
        met = middle >= at_least
    if at_most is not None:
        met = middle <= at_most and met is not False
    return {
        "name": name,
        "median": middle,
        "min": min(values),
        "max": max(values),
        "runs": len(values),
        "at_least": at_least,
        "at_most": at_most,
        "met": met,
        **more,
    }


def exponent(sizes: list[float], times: list[float]) -> float:
    """The b of time = a size^b, by least squares on logarithms: 1 is linear, below 1 better than that.

    Raises:
        ValueError: fewer than two sizes.
    """
    x, y = [math.log(value) for value in sizes], [math.log(value) for value in times]
    return statistics.linear_regression(x, y).slope


def save(path: Path, content: dict) -> None:
    """Write a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def load(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """The results that are there, by benchmark, in the order asked."""
    files = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}
