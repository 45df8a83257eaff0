"""What the exported model's answers are held to, as guidance for onnxruntime-genai (https://github.com/guidance-ai/llguidance)."""

import json
import re
from pathlib import Path

from slmake.errors import UserError
from slmake.tool_calls import json_guidance


def guidance(constraint: str | dict[str, str], form: dict, where: str) -> tuple[str, str] | None:
    """Kind and text of the guidance that a constraint asks for; None for `none`.

    Args:
        constraint: `none`, `labels`, `{regex: PATTERN}` or `{json_schema: FILE}`.
        form: prompt.json, for the labels.
        where: the parameter, for errors.

    Raises:
        UserError: there are no labels, or the file is not there or no JSON object.
    """
    if constraint == "none":
        return None
    if constraint == "labels":
        if not form["labels"]:
            raise UserError(f"{where}: labels: the dataset has no labels. Use none, a regex or a json_schema.")
        return (
            "regex",
            f" ?(?:{'|'.join(map(re.escape, form['labels']))})",
        )  # a template may leave the space to the answer
    if "regex" in constraint:
        return "regex", constraint["regex"]
    file = Path(constraint["json_schema"])
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{where}: {file}: no such file. Correct the name of the JSON Schema.") from None
    except ValueError as error:
        raise UserError(f"{where}: {file}: not JSON: {error}. Correct the file.") from None
    if not isinstance(schema, dict):
        raise UserError(f"{where}: {file}: not a JSON Schema: an object is expected. Correct the file.")
    return json_guidance(schema)


def tokens_needed(constraint: str | dict[str, str], form: dict) -> int:
    """Tokens that an answer with a constraint may need: for labels one per byte and the end, because guidance leaves the model free to
    write them in other tokens than those of training; for other constraints as many as a free answer."""
    longest = form["longest_answer_tokens"]
    return max(longest, *(len(label.encode()) + 2 for label in form["labels"])) if constraint == "labels" else longest


def constrained(form: dict, constraint: str | dict[str, str], where: str = "package.constrain") -> dict:
    """prompt.json with the guidance that a constraint asks for, as `generation.Exported` reads it."""
    chosen = guidance(constraint, form, where)
    if not chosen:
        return form
    tokens = tokens_needed(constraint, form)
    return form | {"guidance": {"kind": chosen[0], "data": chosen[1]}, "longest_answer_tokens": tokens}
