"""The base model's chat template: from turns to the text of a prompt and of an answer."""

import contextlib
import datetime
import functools
import re
from typing import NamedTuple

from slmake import bounded_jinja
from slmake.data.conversation import Conversation, special_tokens
from slmake.errors import UserError
from slmake.tool_calls import CALL_ID

MARK = "\x00answer\x00"


class Answer(NamedTuple):
    """One answer to learn, or to score a model by."""

    prompt: str  # what the model sees
    answer: str  # what it shall say
    tail: str  # the answer with what closes it: the tokens behind the prompt
    turn: int = 0  # its number in the conversation, from 1


class ChatTemplate:
    """A tokenizer's chat template with the options of params.yaml and a fixed date.

    Args:
        options: `prepare.chat_template_kwargs`.
        date: `prepare.chat_date`, what a template reads as today (`strftime_now`), so that the bytes are the same tomorrow.

    Attributes:
        prefixes: the different texts that the template writes between its generation prompt and the trained answers; no more than two.

    Raises:
        UserError: the tokenizer has no chat template, or one that does not show the answer.
    """

    def __init__(self, tokenizer, options: dict, date: str):
        if not tokenizer.chat_template:
            raise UserError(
                "prepare.messages: the base model's tokenizer has no chat template. Use text_template instead."
            )
        self.tokenizer, self.options, self.date = tokenizer, options, datetime.date.fromisoformat(date)
        template = tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template]  # `default`, `tool_use`
        self.marks_answers = any(re.search(r"{%-?\s*generation\s*-?%}", text) for text in texts)
        self.kinds: set[tuple] = set()  # of conversations, that the template is known to show
        self.special = tuple(special_tokens(tokenizer).values())
        self.prefixes: set[str] = set()
        self.left_out: set[str] = set()  # special tokens within answers, which the runtime leaves out

    def split(self, turns: list[dict], tools: list[dict] | None = None) -> tuple[str, str]:
        """Prompt and answer text of a conversation that ends with the assistant's turn.

        What the template itself writes before an answer (an empty think block, white space) belongs to the prompt; what it writes
        behind it closes the answer, but for line ends. A template that marks answers by `{% generation %}` says itself where they
        begin and end.

        Raises:
            ValueError: the template does not take these turns.
            UserError: it changes earlier turns when the answer is added, does not show the answer, or does not end.
        """
        asked, before, tail = self._parts(turns, tools)
        return asked + before, tail

    def asked(self, turns: list[dict], tools: list[dict] | None = None) -> str:
        """The text of some turns with the generation prompt.

        Raises:
            ValueError: the template does not take these turns.
        """
        return self._render(turns, True, tools)[0]

    def _parts(self, turns: list[dict], tools: list[dict] | None) -> tuple[str, str, str]:
        """The prompt of `split` in two, the generation prompt's end between them, and the answer's text."""
        asked, (whole, spans) = self.asked(turns[:-1], tools), self._render(turns, False, tools)
        head = asked
        if not whole.startswith(head):
            raise UserError(
                "prepare.messages: this chat template changes earlier turns when the answer is added. Use text_template."
            )
        answer = turns[-1]["content"]
        if self.marks_answers:
            start, end = spans[-1] if spans else (0, 0)
            if end <= len(head):
                raise UserError(
                    "prepare.messages: this chat template marks no text of the answer by {% generation %}. Correct it."
                )
            start = max(start, len(head))
            return asked, whole[len(head) : start], whole[start:end].rstrip("\n")
        if not answer or not whole.startswith(answer, len(head)):
            before, shown, _ = self._render([*turns[:-1], {**turns[-1], "content": MARK}], False, tools)[0].partition(
                MARK
            )
            if answer and not shown:
                raise UserError("prepare.messages: this chat template does not show the answer. Use text_template.")
            if shown and whole.startswith(before) and before.startswith(head):
                head = before
            if "".join(answer.split()) not in "".join(whole[len(head) :].split()):
                raise UserError(
                    "prepare.messages: this chat template does not show all of the answer: the model could not learn it. Take out what the "
                    "template drops (such as a part in <think>), or use text_template."
                )
        return asked, head[len(asked) :], whole[len(head) :].rstrip("\n")

    @property
    def answer_prefix(self) -> str:
        """What all prompts have behind the generation prompt: what the template writes there before every answer that was `learn`ed.

        Where answers differ in it, such as those with and without a thought, nothing: whoever asks does not know the answer. What the
        template writes then (an empty think block) is a part of the answer, by which the model learns when to think.
        """
        return next(iter(self.prefixes)) if len(self.prefixes) == 1 else ""

    @property
    def mixed(self) -> bool:
        """Whether some answers begin with a text of the template that others do not have."""
        return len(self.prefixes) > 1 and any(prefix.strip() for prefix in self.prefixes)

    def learn(self, conversation: Conversation) -> str:
        """Take notice of what the template writes before a conversation's trained answers; returns the text of the last one.

        Raises:
            ValueError, UserError: see `split`.
        """
        texts = []
        for number in reversed(conversation.trained):
            _, before, tail = self._parts(conversation.since(0, number + 1), conversation.tools)
            texts.append(self._text(conversation.turns[number], "", tail))
            if len(self.prefixes) < 2:
                self.prefixes.add(before)
            if "" in self.prefixes or len(self.prefixes) == 2:
                break  # earlier ones cannot change `answer_prefix`
        return texts[0]

    def answers(self, conversation: Conversation, start: int = 0) -> list[Answer]:
        """The trained turns of a conversation, each behind what the model sees before it: `learn` has seen all conversations.

        Args:
            start: index of the turn that the conversation begins at (`Conversation.starts`); trained turns before it are left out.

        Raises:
            ValueError, UserError: see `split`; or without its earliest turns, the template writes something else before an answer.
        """
        answers, prefix = [], self.answer_prefix
        for number in conversation.trained:
            if number < start:
                continue
            asked, before, tail = self._parts(conversation.since(start, number + 1), conversation.tools)
            if not before.startswith(prefix):
                raise UserError(
                    "prepare.max_seq_len: it leaves out the earliest turns of a conversation, without which the chat template writes "
                    "something else before an answer. Raise it, or shorten the conversations."
                )
            before = before.removeprefix(prefix)
            text = self._text(conversation.turns[number], before, tail)
            answers.append(Answer(asked + prefix, text, before + tail, number + 1))
        return answers

    def _text(self, turn: dict, before: str, tail: str) -> str:
        """An answer as the runtime gives it, behind what the template writes `before` it."""
        text = turn["content"] if "tool_calls" not in turn else tail.strip()
        self.left_out.update(token for token in self.special if token in turn["content"])
        return self._decoded((before + text).lstrip() if before else text)

    def check_shown(self, conversation: Conversation) -> None:
        """Raise UserError where the template leaves out a turn, a tool or a tool call: it would be lost in silence.

        Only the first conversation of each kind is looked at: its texts are replaced by marks, which must come out again.
        """
        turns, tools = conversation.turns, conversation.tools
        kind = (
            *(
                (turn["role"], len(turn.get("tool_calls", ())), bool(turn["content"]), type(turn.get("tools")))
                for turn in turns
            ),
            bool(tools),
        )
        if kind in self.kinds:
            return
        marks: dict[str, str] = {}

        def mark(what: str) -> str:
            name = f"mark{len(marks)}x"
            marks[name] = what
            return name

        marked = []
        for number, turn in enumerate(turns, 1):
            shown = {**turn, "content": turn["content"] and mark(f"turn {number}, of the {turn['role']}")}
            if turn.get("tools") and isinstance(turn["tools"], str):  # as Phi-4-mini's template reads them
                shown["tools"] = mark(f"the tools of turn {number}")
            if "tool_calls" in turn:
                where = f"the tool calls of turn {number}"
                functions = [{"name": mark(where), "arguments": {mark(where): mark(where)}} for _ in turn["tool_calls"]]
                shown["tool_calls"] = [
                    {**call, "function": function} for call, function in zip(turn["tool_calls"], functions, strict=True)
                ]
            marked.append(shown)
        schema = {
            "name": mark("the tools"),
            "description": mark("the tools"),
            "parameters": {"type": "object", "properties": {}},
        }
        schemas = [{"type": "function", "function": schema}] if tools else None
        whole, _ = self._render(marked, False, schemas)
        for name, what in marks.items():
            if name not in whole and (tools or what != "the tools"):
                raise UserError(
                    f"prepare.messages: the base model's chat template does not show {what}. Use a model whose template does, or leave "
                    "this out of the rows."
                )
        self.kinds.add(kind)

    def _decoded(self, text: str) -> str:
        """A text without special tokens, as the runtime gives it."""
        for token in self.special:
            if token in text:
                text = text.replace(token, "").strip()
        return text

    @functools.cached_property
    def closing(self) -> tuple[str, ...]:
        """Special tokens that are no part of an answer at its end: what the template writes behind one, end token and padding."""
        whole = ""
        with contextlib.suppress(ValueError):  # a template that takes no such turns
            whole, _ = self._render([{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}], False)
        behind = {token for token in self.special if token in whole.partition(MARK)[2]}
        return tuple(sorted(behind | set(filter(None, [self.tokenizer.eos_token, self.tokenizer.pad_token]))))

    def trimmed_roles(self) -> list[str]:
        """Roles whose content the template strips. Python strips white space of all kinds, the runtime's template engine ASCII only."""
        space, question = "\u00a0", {"role": "user", "content": "?"}
        function = {"name": "f", "arguments": {}}
        tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}]
        calls = {"tool_calls": [{"id": CALL_ID, "type": "function", "function": function}]}
        trimmed = []
        for role, before, behind in (
            ("system", [], [question]),
            ("user", [], []),
            ("assistant", [question], [question]),
            ("tool", [question, {"role": "assistant", "content": "", **calls}], []),
        ):
            with contextlib.suppress(ValueError):  # a template without a system turn
                turn = {"role": role, "content": f"{space}{MARK}{space}"}
                turn |= {"name": "f", "tool_call_id": CALL_ID} if role == "tool" else {}
                text, _ = self._render([*before, turn, *behind], True, tools if role == "tool" else None)
                if MARK in text and space + MARK not in text and MARK + space not in text:
                    trimmed.append(role)
        return trimmed

    def settings(self) -> dict:
        """What inference needs to write the same prompts."""
        return {"template_kwargs": self.options, "date": self.date.isoformat()}

    def _render(self, turns: list[dict], generation: bool, tools: list[dict] | None = None) -> tuple[str, list]:
        """The text of some turns, and start and end of each part that the template marks by `{% generation %}`."""
        template = self.tokenizer.get_chat_template(tools=tools)
        variables = {**self.tokenizer.special_tokens_map, **self.options}
        return bounded_jinja.render(template, turns, tools, generation, variables, self.date.strftime)
