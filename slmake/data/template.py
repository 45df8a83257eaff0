"""From a row of fields to a prompt and an answer: a text template, chat templates, or a conversation in each row."""

import difflib
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

from slmake import params, prompts
from slmake.data.chat import Answer, ChatTemplate
from slmake.data.conversation import (
    HALF_PAIR,
    REPLACED,
    Conversation,
    read_conversation,
    refuse_unread,
    turns_in,
    with_system,
    without_closing,
)
from slmake.data.store import Row
from slmake.errors import UserError
from slmake.text import listing, one_line

MANY = 1000  # different answers, of which none is a label
SHOWN = 20  # row errors printed before "and N more"


class PromptTemplate(ABC):
    """How a row becomes prompt and answer text."""

    fields: list[str]  # that every row has
    left_out: set[str]  # special tokens that answers hold, maybe as text: the runtime leaves them out
    # Answers that rows end with different special tokens, and these tokens.
    alike: Mapping[str, list[str]] = MappingProxyType({})
    special_tokens: bool  # the tokenizer adds its own begin token, as for any text; a chat template writes it

    @abstractmethod
    def problems(self, row: dict) -> list[str]:
        """What is wrong with one row, each as `field: reason`."""

    @abstractmethod
    def render(self, row: dict) -> tuple:
        """What `Row` holds of a valid row, behind its file and number.

        Raises:
            ValueError: a conversation that the chat template does not take.
        """

    def answers(self, row: Row, start: int = 0, chosen: slice = slice(None)) -> list[Answer]:
        """The answers to learn from a row, each behind its prompt.

        Args:
            start: index of the turn that a conversation begins at.
            chosen: which answers of a conversation.
        """
        return [Answer(row.prompt, row.answer, row.tail)]

    @abstractmethod
    def inference(self) -> dict:
        """What prompt.json says of prompts: `prompt`, `answer`, `fields`, `add_special_tokens`, and `chat` for a chat template."""


class FieldTemplate(PromptTemplate):
    """A template over a row's fields: `text_template`, or the turns of `messages` within the chat template.

    The chat template is applied once, to the templates themselves, so that inference needs no chat engine.

    Args:
        convert: makes the template's fields of a row's; ValueError where it cannot.
        special: texts of special tokens, which are no part of an answer at its end (see `without_closing`).
        closing: those of them that close answers. An end of others, which may be meant as text, is noted in `left_out`.
    """

    def __init__(
        self,
        section: params.Prepare,
        chat: ChatTemplate | None = None,
        convert: Callable[[dict], dict] | None = None,
        special: Iterable[str] = (),
        closing: Iterable[str] = (),
    ):
        self.labels, self.chat, self.convert = section.labels, chat, convert
        self.special, self.closing, self.left_out = tuple(special), closing, set()
        self.ends: dict[str, frozenset[str]] = {}  # of the first answers, the tokens that are left out of their ends
        self.alike: dict[str, list[str]] = {}
        self.special_tokens = chat is None
        if chat:
            head, tail = self._framed(section.messages, chat)
            self.said = prompts.flattened(section.messages[-1].content)
            names = prompts.fields_of(tail)
            self.answer = names[0] if names else None
        else:
            head, tail, self.answer = prompts.split_at_answer(section.text_template, section.answer)
            self.said = prompts.flattened(tail)
        self.fields = list(dict.fromkeys(prompts.fields_of(head) + prompts.fields_of(tail)))
        self.head, self.tail = prompts.flattened(head), prompts.flattened(tail)
        self.prompt_fields = list(dict.fromkeys(prompts.fields_of(self.head)))
        names = {name.replace(".", "_") for name in self.fields}
        if len(names) < len(self.fields):
            raise UserError("prepare: two fields of the template differ in `.` and `_` only. Rename one of them.")

    @staticmethod
    def _framed(messages: list[params.Message], chat: ChatTemplate) -> tuple[str, str]:
        for turn in messages:
            prompts.fields_of(turn.content, "prepare.messages")
        if not messages[:-1]:
            raise UserError("prepare.messages: nothing stands before the answer, so there is no prompt.")
        # The chat template's own braces must survive str.format; the contents keep theirs.
        marks = {f"\x00{number}\x00": turn for number, turn in enumerate(messages)}
        try:
            pieces = chat.split([{"role": turn.role, "content": mark} for mark, turn in marks.items()])
        except ValueError as error:
            raise UserError(f"prepare.messages: {error}") from None
        for number, (mark, turn) in enumerate(marks.items(), 1):
            if mark not in pieces[number == len(marks)]:
                raise UserError(
                    f"prepare.messages: the chat template does not show turn {number}, of the {turn.role}. Use text_template, or leave "
                    "the turn out."
                )
        pieces = [text.replace("{", "{{").replace("}", "}}") for text in pieces]
        for mark, turn in marks.items():
            pieces = [text.replace(mark, turn.content) for text in pieces]
        return pieces[0], pieces[1]

    def problems(self, row: dict) -> list[str]:
        problems = []
        try:
            row = self.convert(row) if self.convert else row
        except ValueError as error:
            return [f"field `{self.answer}` {error}"]
        for name in self.fields:
            value = field(row, name)
            if value is None:
                problems.append(f"field `{name}` is missing")
                continue
            if name == self.answer:
                value = label_text(value)
                word = label_of(value, self.labels) if self.labels and isinstance(value, str) else value
                if word is None:
                    problems.append(
                        f"field `{name}` is {one_line(repr(value), 60)}, which prepare.labels does not name: {listing(self.labels)}"
                    )
                    continue
                value = word
            if not isinstance(value, str):
                problems.append(
                    f"field `{name}` is {type(value).__name__}, not text: {json.dumps(value, default=str)[:60]}"
                )
            elif "\ufffd" in value:
                problems.append(f"field `{name}` {REPLACED}")
            elif not prompts.encodes(value):
                problems.append(f"field `{name}` {HALF_PAIR}")
            elif name == self.answer and not without_closing(value, self.special).strip():
                problems.append(f"field `{name}` is an empty answer")
        return problems

    def render(self, row: dict) -> tuple:
        row = self.convert(row) if self.convert else row
        values = {name.replace(".", "_"): field(row, name) for name in self.fields}
        if self.answer:
            key = self.answer.replace(".", "_")
            text = label_text(values[key])
            values[key] = label_of(text, self.labels) if self.labels else text
        own = "\n".join(values[name] for name in self.prompt_fields)
        said, tail = self.said.format(**values), self.tail.format(**values)
        answer = without_closing(said if self.chat else said.rstrip("\n"), self.special)
        if not self.chat:
            self._note_end(said, answer)
        if self.chat:  # which closes the answer itself
            tail = tail.replace(said, answer, 1)
        return self.head.format(**values), answer, own if self.prompt_fields else answer, tail

    def _note_end(self, said: str, answer: str) -> None:
        """Note special tokens at an answer's end that close none, and answers that differ in them only."""
        closed = said.removeprefix(answer)
        ends = frozenset(token for token in self.special if token in closed and token not in self.tail)
        ends = ends.difference(self.closing)
        self.left_out |= ends
        if len(self.ends) < MANY and (other := self.ends.setdefault(answer, ends)) != ends:
            self.alike[answer] = sorted(ends | other)

    def inference(self) -> dict:
        written = {
            "prompt": self.head,
            "answer": self.tail,
            "fields": self.prompt_fields,
            "add_special_tokens": self.special_tokens,
        }
        return written | ({"chat": self.chat.settings()} if self.chat else {})


class Conversations(PromptTemplate):
    """A conversation in each row, whose assistant turns are the answers.

    Args:
        name: the row's field, for errors.
        train_on: `all` or `last` of the assistant's turns.
        turns_of: makes a list of turns with `role` and `content` of a row's content; ValueError where it cannot.
    """

    special_tokens = False

    def __init__(self, name: str, chat: ChatTemplate, train_on: str, turns_of: Callable[[dict], object] | None = None):
        if not name:
            raise UserError(
                "prepare.messages: an empty name. Name the column that holds each row's list of messages, or set it to null."
            )
        self.name, self.chat, self.train_on, self.fields = name, chat, train_on, [name]
        self.left_out = chat.left_out
        self.turns_of = turns_of or (lambda row: turns_in(field(row, name)))

    def conversation(self, row: dict) -> Conversation:
        """The conversation of a row.

        Raises:
            ValueError: what is wrong with it.
        """
        refuse_unread(row, self.chat.options)
        return read_conversation(
            with_system(row, self.turns_of(row)), row.get("tools"), self.train_on, self.chat.closing
        )

    def problems(self, row: dict) -> list[str]:
        if field(row, self.name) is None:
            return [f"field `{self.name}` is missing"]
        try:
            self.conversation(row)
        except ValueError as error:
            return [f"field `{self.name}` {error}"]
        return []

    def render(self, row: dict) -> tuple:
        conversation = self.conversation(row)
        try:
            last = self.chat.learn(conversation)
            self.chat.check_shown(conversation)
        except ValueError as error:
            raise ValueError(f"field `{self.name}`: {error}") from None
        # Prompts are rendered when they are tokenized: kept for every turn, they would need the square of a conversation's length.
        return "", last, conversation.text(), "", conversation.to_json(), len(conversation.trained)

    def answers(self, row: Row, start: int = 0, chosen: slice = slice(None)) -> list[Answer]:
        conversation = Conversation.parse(row.chat)
        conversation = conversation._replace(trained=conversation.trained[chosen])
        try:
            return self.chat.answers(conversation, start)
        except ValueError as error:
            raise UserError(f"{row.file}: row {row.line}: field `{self.name}`: {error}") from None

    def inference(self) -> dict:
        return {
            "prompt": None,
            "answer": None,
            "fields": [],
            "add_special_tokens": False,
            "chat": {
                **self.chat.settings(),
                "answer_prefix": self.chat.answer_prefix,
                "trimmed_roles": self.chat.trimmed_roles(),
                "closing": self.chat.closing,
            },
        }


def field(row: dict, name: str) -> object:
    """A row's field; `text.phrase` is the field `phrase` in the object `text`, unless a field has the very name. None if absent."""
    if name in row or "." not in name:
        return row.get(name)
    value: object = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def label_text(value: object) -> object:
    """A number or a truth value as text; anything else as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return value


def label_of(text: str, labels: dict[str, str]) -> str | None:
    """The word of a value by `prepare.labels`; a whole number may be written 1 or 1.0."""
    return labels.get(text, labels.get(text.removesuffix(".0")))


def read_valid(name: str, template: PromptTemplate, rows: Iterable[object], before: int = 0) -> Iterator[Row]:
    """Rows of one file, rendered; every bad row is collected, and all are reported at once.

    Args:
        name: the file, for errors.
        before: rows of other files that count before these.

    Raises:
        UserError: no rows, a field that no row has, or bad rows (file, row number and field of each).
    """
    bad, count, seen = [], 0, Counter()
    columns: dict[str, None] = {}
    number = 0
    for number, raw in enumerate(rows, 1):
        if isinstance(raw, dict):
            seen.update(key for key in template.fields if field(raw, key) is not None)
            if number <= 1000:
                columns.update(dict.fromkeys(raw))
            problems = template.problems(raw)
        else:
            problems = [f"not an object but {type(raw).__name__}"]
        if not problems and not bad:
            try:
                row = Row(name, number, *template.render(raw))._replace(before=before)
            except ValueError as error:
                problems = [str(error)]
            else:
                yield row
        if problems:
            count += len(problems)
            bad += [f"  {name}: row {number}: {problem}" for problem in problems][: SHOWN - len(bad)]
    if not number:
        raise UserError(f"{name}: no rows in it.")
    for key in template.fields if columns else []:
        if not seen[key]:
            if key in columns:
                raise UserError(
                    f"{name}: the template's field `{key}` has no value in any row: all are null. Fill it in."
                )
            near = difflib.get_close_matches(key, columns, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise UserError(
                f"{name}: the template's field `{key}` is in no row. Fields there: {listing(columns) or 'none'}.{hint}"
            )
    if bad:
        more = f"\n  and {count - len(bad)} more" if count > len(bad) else ""
        raise UserError(
            f"{name}: {count} bad value{'s' if count > 1 else ''} in {number} rows; correct them and run again.\n"
            + "\n".join(bad)
            + more
        )
