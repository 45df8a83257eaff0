"""What `evaluate.metrics` can name: scores of one answer, and the files that they read."""

from typing import NamedTuple

from slmake.patterns import compiled

# Each metric's argument; the functions are in slmake/scoring/answer_metrics.py.
ARGUMENTS: dict[str, str | None] = {
    "contains": None,
    "json_valid": None,
    "json_schema": "a JSON Schema file",
    "regex": "a pattern",
    "numeric": "a tolerance",
    "tool_name": None,
    "tool_arguments": None,
}
WITH_FILE = ("json_schema",)


class AnswerMetric(NamedTuple):
    """One entry of `evaluate.metrics`.

    Attributes:
        figure: its name in results/metrics.json.
        kind: its name in ARGUMENTS; None for a user's own function.
        argument: pattern, tolerance or file; None where the metric has none.
    """

    figure: str
    kind: str | None
    argument: str | float | None

    @property
    def file(self) -> str | None:
        """The file that it reads, if any."""
        return str(self.argument) if self.kind is None or self.kind in WITH_FILE else None


def parse(entry: str | dict[str, str | float]) -> AnswerMetric:
    """`json_valid`, `{regex: PATTERN}` or `path/to/file.py:function`.

    Raises:
        ValueError: none of these.
    """
    if isinstance(entry, str) and ".py:" in entry:
        file, _, function = entry.rpartition(":")
        if not file.endswith(".py") or not function.isidentifier():
            raise ValueError(f"`{entry}`: a function of your own is written path/to/file.py:function")
        return AnswerMetric(function, None, file)
    pairs = [(entry, None)] if isinstance(entry, str) else list(entry.items())
    if len(pairs) != 1:
        raise ValueError("one metric per entry: start a new `- ` for each")
    name, argument = pairs[0]
    if name not in ARGUMENTS:
        raise ValueError(
            f"unknown metric `{name}`; known: {', '.join(ARGUMENTS)}, or your own path/to/file.py:function"
        )
    wanted = ARGUMENTS[name]
    if wanted is None and argument is not None:
        raise ValueError(f"{name} takes no argument: write `- {name}`")
    if wanted is not None and argument is None:
        raise ValueError(f"{name} needs {wanted}: write `- {name}: …`")
    if name == "numeric" and not (isinstance(argument, int | float) and argument >= 0):
        raise ValueError("numeric needs a tolerance of at least 0, such as `- numeric: 0.01`")
    if name in ("regex", *WITH_FILE) and not isinstance(argument, str):
        raise ValueError(f"{name} needs {wanted} as text: put {argument} in quotes")
    if name == "regex":
        try:
            compiled(argument, dotall=True)
        except ValueError as error:
            raise ValueError(f"regex: {error}") from None
    return AnswerMetric(name, name, argument)
