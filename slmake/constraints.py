"""What the exported model's answers are held to, as guidance for onnxruntime-genai (https://github.com/guidance-ai/llguidance)."""

import re
from collections.abc import Callable
from pathlib import Path

from slmake import json_schemas
from slmake.errors import UserError
from slmake.generation import Exported, Sampling
from slmake.tool_calls import CallForm, json_guidance

MISSING = {
    "labels": "the dataset has no labels. Use none, tools, a regex or a json_schema",
    "tools": "the dataset's rows have no tools. Use none, labels, a regex or a json_schema",
}


def check(constraint: str | dict[str, str], form: dict, where: str) -> dict | None:
    """Refuse a constraint that asks for what is not there.

    Args:
        constraint: `none`, `labels`, `tools`, `{regex: PATTERN}` or `{json_schema: FILE}`.
        form: prompt.json, for labels and tools.
        where: the parameter, for errors.

    Returns:
        The JSON Schema, where the constraint names one.

    Raises:
        UserError: there are no labels or no tools, or the file is not there or no JSON Schema.
    """
    if isinstance(constraint, str) and constraint in MISSING and form.get(constraint) is None:
        raise UserError(f"{where}: {constraint}: {MISSING[constraint]}.")
    return json_schemas.read(Path(constraint["json_schema"]), where)[0] if "json_schema" in constraint else None


def guidance(constraint: str | dict[str, str], form: dict, where: str) -> tuple[str, str] | None:
    """Kind and text of the guidance that a constraint asks for; None for `none`, and for `tools` (see `tool_guidance`).

    Args:
        constraint, form, where: see `check`, which raises the same errors.
    """
    schema = check(constraint, form, where)
    if constraint in ("none", "tools"):
        return None
    if constraint == "labels":
        # A template may leave the space to the answer.
        return "regex", f" ?(?:{'|'.join(map(re.escape, form['labels']))})"
    if "regex" in constraint:
        return "regex", constraint["regex"]
    try:
        return json_guidance(schema)
    except ValueError as error:
        raise UserError(f"{where}: {constraint['json_schema']}: {error}") from None


def tool_guidance(model: Exported, tools: list[dict] | None, where: str) -> tuple[str, str] | None:
    """What holds an answer to text or calls of some tools; None without tools.

    Raises:
        UserError: the model's chat template writes no calls.
    """
    if not tools:
        return None
    try:
        return CallForm.of(model).guidance(model, tools, optional=True)
    except ValueError as error:
        raise UserError(f"{where}: tools: {error}") from None


def refuse_unfollowed(model: Exported, chosen: tuple[str, str] | None, where: str) -> None:
    """Let the runtime make some guidance, without asking.

    Raises:
        UserError: it cannot.
    """
    try:
        model.generator([0], 1, Sampling(guidance=chosen))
    except ValueError as error:
        reason = str(error).rstrip(".:")  # a first line of several may end so
        raise UserError(f"{where}: {reason}. Write it in another way, or set it to none.") from None


def tokens_needed(constraint: str | dict[str, str], form: dict) -> int:
    """Tokens that an answer with a constraint may need: for labels one per byte and the end, because guidance leaves the model free to
    write them in other tokens than those of training; for other constraints as many as a free answer."""
    longest = form["longest_answer_tokens"]
    return max(longest, *(len(label.encode()) + 2 for label in form["labels"])) if constraint == "labels" else longest


def constrained(
    form: dict,
    constraint: str | dict[str, str],
    load: Callable[[dict], Exported] | None = None,
    where: str = "package.constrain",
) -> dict:
    """prompt.json with the guidance that a constraint asks for, as `generation.Exported` reads it.

    With `constrain: tools` the server holds answers to the tools of each request; the guidance is for those that all rows have.

    Args:
        load: gives the exported model, with prompt.json as its `form`; called for `tools` that all rows have.
    """
    chosen = guidance(constraint, form, where)
    if constraint == "tools":
        form = form | {"constrain": "tools"}
        chosen = tool_guidance(load(form), form["tools"], where) if form["tools"] else None
    if not chosen:
        return form
    tokens = tokens_needed(constraint, form)
    return form | {"guidance": {"kind": chosen[0], "data": chosen[1]}, "longest_answer_tokens": tokens}
