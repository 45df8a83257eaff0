"""From a row of fields to a prompt and an answer: `text_template` or chat messages."""

import difflib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from slmake import params, prompts
from slmake.data.rows import read_rows
from slmake.data.store import Row
from slmake.errors import UserError

SHOWN = 20  # row errors printed before "and N more"
HALF_PAIR = "holds half a surrogate pair: text that was cut inside a character"


class Form:
    """How a row becomes prompt and answer text: a text template, chat templates, or a column of messages."""

    def __init__(self, section: params.Prepare, tokenizer):
        self.said = section.messages[-1].content if isinstance(section.messages, list) else None
        self.column = section.messages if isinstance(section.messages, str) else None
        self.tokenizer = tokenizer
        self.special_tokens = True  # the tokenizer adds its own begin token, as for any text
        if section.messages is not None:
            if not section.messages:
                raise UserError(
                    "prepare.messages: an empty name. Name the column that holds each row's list of messages, or set it to null."
                )
            if not tokenizer.chat_template:
                raise UserError(
                    "prepare.messages: the base model's tokenizer has no chat template. Use text_template instead."
                )
            self.special_tokens = False  # the chat template writes them
        if self.column:
            self.fields, self.head, self.tail, self.answer = [self.column], None, None, None
        elif section.messages is not None:
            self.head, self.tail = self._chat(section.messages)
            self.fields = list(dict.fromkeys(prompts.fields_of(self.head) + prompts.fields_of(self.tail)))
            self.answer = prompts.fields_of(self.tail)[0] if prompts.fields_of(self.tail) else None
        else:
            self.head, self.tail, self.answer = prompts.split_at_answer(section.text_template, section.answer)
            self.fields = list(dict.fromkeys(prompts.fields_of(section.text_template)))
        self.prompt_fields = list(dict.fromkeys(prompts.fields_of(self.head))) if self.head else []

    def _chat(self, messages: list[params.Message]) -> tuple[str, str]:
        """Apply the chat template once, to the templates themselves, so that inference needs no chat engine."""
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        for turn in turns:
            prompts.fields_of(turn["content"], "prepare.messages")
        # The chat template's own braces must survive str.format; the contents keep theirs.
        marks = {turn["content"]: f"\x00{number}\x00" for number, turn in enumerate(turns)}
        marked = [{"role": turn["role"], "content": marks[turn["content"]]} for turn in turns]
        if not marked[:-1]:
            raise UserError("prepare.messages: nothing stands before the answer, so there is no prompt.")
        try:
            head, whole = self._apply(marked)
        except ValueError as error:
            raise UserError(f"prepare.messages: {error}") from None
        pieces = []
        for text in (head, whole[len(head) :].rstrip("\n")):
            text = text.replace("{", "{{").replace("}", "}}")
            for content, mark in marks.items():
                text = text.replace(mark, content)
            pieces.append(text)
        return pieces[0], pieces[1]

    def _apply(self, turns: list[dict]) -> tuple[str, str]:
        """The chat template over the turns before the answer, and over all of them.

        Raises:
            ValueError: it does not take these turns (roles that do not alternate, for one).
            UserError: it changes earlier turns when the answer is added.
        """
        import jinja2

        try:
            head = self.tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
            whole = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the base model's chat template does not take it: {error}") from None
        if not whole.startswith(head):
            raise UserError(
                "prepare.messages: this chat template changes earlier turns when the answer is added. Use text_template."
            )
        return head, whole

    def render(self, row: dict) -> tuple[str, str, str, str]:
        """Prompt, answer, text for duplicates, answer with what closes it; the prompt's own text (without the template) of a validated row.

        Raises:
            ValueError: messages that the chat template does not take.
        """
        if self.column is None:
            values = {name: row[name] for name in self.fields}
            own = "\n".join(values[name] for name in self.prompt_fields)
            tail = self.tail.format(**values)
            answer = self.said.format(**values) if self.said else tail.rstrip("\n")
            return self.head.format(**values), answer, own if self.prompt_fields else answer, tail
        turns = row[self.column]
        try:
            head, whole = self._apply(turns)
        except ValueError as error:
            raise ValueError(f"field `{self.column}`: {error}") from None
        own = "\n".join(turn["content"] for turn in turns[:-1])
        return head, turns[-1]["content"], own, whole[len(head) :].rstrip("\n")


def problems(row: object, form: Form) -> list[str]:
    """What is wrong with one row, each as `field: reason`."""
    if not isinstance(row, dict):
        return [f"not an object but {type(row).__name__}"]
    found = []
    for name in form.fields:
        value = row.get(name)
        if value is None:
            found.append(f"field `{name}` is missing")
        elif name == form.column:
            found += _chat_problems(name, value)
        elif not isinstance(value, str):
            found.append(f"field `{name}` is {type(value).__name__}, not text: {json.dumps(value, default=str)[:60]}")
        elif "\ufffd" in value:
            found.append(
                f"field `{name}` holds the replacement character U+FFFD: text that was not UTF-8 was decoded wrongly"
            )
        elif not prompts.encodes(value):
            found.append(f"field `{name}` {HALF_PAIR}")
        elif name == form.answer and not value.strip():
            found.append(f"field `{name}` is an empty answer")
    return found


def _chat_problems(name: str, value: object) -> list[str]:
    if not isinstance(value, list) or not value:
        return [f"field `{name}` is not a list of messages"]
    for turn in value:
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            return [f"field `{name}` has a message without text in `role` and `content`"]
    if value[-1]["role"] != "assistant":
        return [f"field `{name}` does not end with the assistant's turn"]
    if not value[-1]["content"].strip():
        return [f"field `{name}` ends with an empty answer"]
    if len(value) == 1:
        return [f"field `{name}` has no turn before the assistant's, so there is no prompt"]
    if not all(prompts.encodes(turn[key]) for turn in value for key in ("role", "content")):
        return [f"field `{name}` {HALF_PAIR}"]
    return []


def read_valid(file: str, form: Form, path: Path | None = None) -> Iterator[Row]:
    """Rows of one file, rendered; every bad row is collected and told at once.

    Args:
        file: the name by which errors call it.
        path: where it lies, if that is another place.

    Raises:
        UserError: no rows, a field that no row has, or bad rows (file, row number and field of each).
    """
    bad, count, seen = [], 0, Counter()
    columns: dict[str, None] = {}
    number = 0
    for number, raw in enumerate(read_rows(path or Path(file)), 1):
        if isinstance(raw, dict):
            seen.update(name for name in form.fields if raw.get(name) is not None)
            if number <= 1000:
                columns.update(dict.fromkeys(raw))
        found = problems(raw, form)
        if not found and not bad:
            try:
                row = Row(file, number, *form.render(raw))
            except ValueError as error:
                found = [str(error)]
            else:
                yield row
        if found:
            count += len(found)
            bad += [f"  {file}: row {number}: {problem}" for problem in found][: SHOWN - len(bad)]
    if not number:
        raise UserError(f"{file}: no rows in it.")
    for name in form.fields if columns else []:
        if not seen[name]:
            near = difflib.get_close_matches(name, columns, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise UserError(
                f"{file}: the template's field `{name}` is in no row. Fields there: {', '.join(columns) or 'none'}.{hint}"
            )
    if bad:
        more = f"\n  and {count - len(bad)} more" if count > len(bad) else ""
        raise UserError(
            f"{file}: {count} bad value{'s' if count > 1 else ''} in {number} rows; mend them and run again.\n"
            + "\n".join(bad)
            + more
        )
