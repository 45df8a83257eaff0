"""Text templates over the fields of a row, and what counts as an answer. Shared by prepare, evaluate and ask."""

import re
import string
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from slmake.errors import UserError
from slmake.outputs import read_json

CHATS_FILE = "chats.json"  # some conversations of a prepared dataset, for `rehearse`


def fields_of(template: str, where: str = "prepare.text_template") -> list[str]:
    """Names of the placeholders of a template, in order; `text.phrase` is the field `phrase` in the object `text`.

    Raises:
        UserError: half a surrogate pair, unbalanced braces, or a placeholder that is not a plain field name.
    """
    if not encodes(template):
        raise UserError(f"{where}: holds half a surrogate pair: text that was cut inside a character. Write it again.")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{where}: {error}. Write {{{{ and }}}} for literal braces.") from None
    names = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not all(part.isidentifier() for part in name.split(".")) or spec or conversion or f"{{{name}:" in template:
            written = re.search(rf"{{{re.escape(name)}[!:][^}}]*}}", template)
            shown = written[0] if written else f"{{{name}}}"
            raise UserError(f"{where}: `{shown}` is not a plain field name such as {{phrase}}.")
        names.append(name)
    return names


def flattened(template: str) -> str:
    """A template whose nested fields have plain names: `{text.phrase}` becomes `{text_phrase}`, as `str.format` takes it."""
    return re.sub(r"{{|}}|{([\w.]+)}", lambda match: match[0].replace(".", "_") if match[1] else match[0], template)


def encodes(text: str) -> bool:
    """Whether a text can be written as UTF-8; half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def split_at_answer(template: str, answer: str | None) -> tuple[str, str, str]:
    """Cut a template before the placeholder of the answer.

    Args:
        template: text with `{field}` placeholders.
        answer: field that starts the answer; None for the last placeholder.

    Returns:
        Prompt template, answer template, and the name of the answer's field.

    Raises:
        UserError: no placeholder, the answer's field is not in the template, or the prompt part is empty.
    """
    names = fields_of(template)
    if not names:
        raise UserError("prepare.text_template: no placeholder such as {phrase} in it.")
    answer = answer or names[-1]
    if answer not in names:
        raise UserError(
            f"prepare.answer: `{answer}` is not a placeholder of text_template. Placeholders: {', '.join(names)}."
        )
    at = next(match.start() for match in re.finditer(r"{{|}}|{([\w.]*)}", template) if match[1] == answer)
    head, tail = template[:at], template[at + len(answer) + 2 :]
    if not head.strip():
        raise UserError("prepare.text_template: nothing stands before the answer, so there is no prompt.")
    return head, "{" + answer + "}" + tail, answer


def load_prompt(dataset: Path) -> dict:
    """`prompt.json` of a prepared dataset: prompt and answer templates, fields, labels as the model writes them, end token."""
    fields = ("prompt", "fields", "labels", "end_token_id", "longest_answer_tokens")
    form = read_json(dataset / "prompt.json", *fields, output=dataset)
    return form | {"labels": form["labels"] and [as_written(label, form) for label in form["labels"]]}


def as_written(answer: str, form: dict) -> str:
    """An answer of the data in the Unicode form in which the model's tokens have it, and so the model writes it.

    Args:
        form: prompt.json.
    """
    return unicodedata.normalize(form["normalization"], answer) if "normalization" in form else answer


def read_answer(text: str, labels: Iterable[str] | None) -> str:
    """What counts as the answer in generated text, without outer white space: all of it; where each label is one line, the first line."""
    if not labels or any("\n" in label for label in labels):
        return text.strip()
    return text.strip().partition("\n")[0].strip()
