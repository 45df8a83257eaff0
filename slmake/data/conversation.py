"""Conversations as datasets hold them: turns, tools and tool calls, checked and brought into the one form that chat templates take."""

import hashlib
import json
from typing import NamedTuple

from slmake import prompts
from slmake.data import json_values
from slmake.generation import MEDIA, THOUGHTS, UNREAD, without_closing
from slmake.text import one_line

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
ROLES["developer"] = "system"  # as the server reads it
HALF_PAIR = "holds half a surrogate pair: text that was cut inside a character"
REPLACED = "holds the replacement character U+FFFD: text that was not UTF-8 was decoded wrongly"
SWITCHES = (
    "train",
    "training",
    "loss",
)  # of a turn: whether it is trained; `training` is Axolotl's name, `loss` ms-swift's
FLAGS = (*SWITCHES, "weight")  # `weight` is OpenAI's
# Fields of a row: Claude's, Bedrock's and LLaMA-Factory's name, OpenHermes', and what others use.
SYSTEM = ("system", "system_prompt", "system_message")
MARKS = ("label", "kto_tag")  # of a row: whether its answer is a good one (TRL's and LLaMA-Factory's names)
BAD = ("false", "0", "0.0")  # such a mark as text
WITHOUT_TEXT = "has a message without text in `role` and `content`"


class Conversation(NamedTuple):
    """The turns of one row.

    Attributes:
        turns: each with `role` and `content` (text); an assistant's may have `tool_calls`, whose arguments are objects.
        tools: JSON schemas of the functions that the assistant may call.
        trained: indices of the assistant's turns that have a loss, in order; never empty.
    """

    turns: list[dict]
    tools: list[dict] | None
    trained: list[int]

    @classmethod
    def parse(cls, text: str) -> "Conversation":
        """The conversation whose `to_json` a text is."""
        return cls(*json.loads(text))

    def to_json(self) -> str:
        """The conversation as JSON text."""
        return json.dumps(self, default=str)  # dates of Parquet files, in fields that no chat template reads

    @property
    def starts(self) -> list[int]:
        """Indices of the turns that the conversation may begin at when its earliest turns are dropped: 0 and every user's turn."""
        users = [number for number, turn in enumerate(self.turns) if turn["role"] == "user"]
        return [0, *users[1:]]

    def since(self, start: int, end: int) -> list[dict]:
        """The turns before `end` without the earliest ones before `start`; a system turn stays."""
        system = self.turns[:1] if start and self.turns[0]["role"] == "system" else []
        return system + self.turns[start:end]

    def text(self) -> str:
        """What was said before the last turn, for duplicates.

        A system turn counts as one word: most often all rows share it, and it would make short conversations near copies of each other.
        """
        said = []
        for turn in self.turns[:-1]:
            system = turn["role"] == "system"
            said += [hashlib.sha256(turn["content"].encode()).hexdigest()[:16] if system else turn["content"]]
            said += [
                json.dumps(call["function"], ensure_ascii=False, sort_keys=True) for call in turn.get("tool_calls", [])
            ]
        return "\n".join(said)


def special_tokens(tokenizer) -> dict[int, str]:
    """The texts of a tokenizer's special tokens, which the runtime leaves out of an answer, by their numbers."""
    added = tokenizer.added_tokens_decoder
    return {number: token.content for number, token in added.items() if token.special and token.content}


def refuse_unread(row: dict, options: dict | None = None) -> None:
    """Refuse a field of a row of chats or instructions that changes what must be trained, and that is not read.

    Args:
        options: `prepare.chat_template_kwargs`, where a chat template is applied.

    Raises:
        ValueError: what is wrong, as the end of a sentence that begins with the answer's field.
    """
    for name in MARKS:
        mark = row.get(name)  # text in CSV
        if str(mark).strip().lower() in BAD:
            raise ValueError(
                f"stands beside `{name}`: {str(mark).lower()}, which marks a bad answer (KTO), and would be trained. Remove such rows, or "
                f"the field `{name}` where it means something else"
            )
    if row.get("functions"):
        raise ValueError(
            "stands beside `functions`, the old form of `tools`. Write them as `tools`, and each `function_call` as `tool_calls`"
        )
    for name in MEDIA:
        if row.get(name):
            raise ValueError(
                f"stands beside `{name}`, which is not read: only text is trained. Remove such rows, or the field `{name}` where the texts do "
                "not refer to it"
            )
    if row.get("documents") and options is not None:
        raise ValueError(
            "stands beside `documents`, which no chat template is given: the answer would be trained without them. Write them into a message, or "
            "remove the field `documents` where the answers do not refer to it"
        )
    own = row.get("chat_template_kwargs")
    if own and options is not None and not (isinstance(own, dict) and {**options, **own} == options):
        raise ValueError(
            f"stands beside `chat_template_kwargs` {json.dumps(own, default=str)[:60]}, which differ from prepare.chat_template_kwargs: one chat template with "
            "the same options is applied to all rows. Set them there, and remove the field from the rows"
        )


def system_text(row: dict) -> tuple[str, str] | None:
    """The field that holds a row's system text, and this text; None without any.

    Raises:
        ValueError: it is not text, or two fields hold different ones.
    """
    found = None
    for name in filter(row.get, SYSTEM):
        try:
            text = _content(1, row[name])
        except ValueError:
            raise ValueError(
                f"stands beside `{name}`, which is not text: {json.dumps(row[name], default=str)[:60]}"
            ) from None
        if found and text.strip() and text.strip() != found[1].strip():
            raise ValueError(f"stands beside two system texts that differ, `{found[0]}` and `{name}`. Keep one of them")
        found = found or ((name, text) if text.strip() else None)
    return found


def with_system(row: dict, turns: object) -> object:
    """A row's turns behind its system text, where they do not begin with it.

    Raises:
        ValueError: they begin with another, or see `system_text`.
    """
    system = system_text(row)
    if not system or not isinstance(turns, list) or not turns:
        return turns
    name, text = system
    first = turns[0] if isinstance(turns[0], dict) else {}
    if ROLES.get(str(first.get("role"))) != "system":
        return [{"role": "system", "content": text}, *turns]
    if _content(1, first.get("content")).strip() != text.strip():
        raise ValueError(f"begins with a system turn that differs from `{name}` of the row. Keep one of them")
    return turns


def read_conversation(
    turns: object, tools: object = None, train_on: str = "all", closing: tuple[str, ...] = ()
) -> Conversation:
    """Check a row's turns and tools.

    Args:
        turns: a list of messages; `content` is text, a list of parts of type text, or absent beside `tool_calls`.
        tools: a list of JSON schemas, the same as JSON text, or None.
        train_on: `all` or `last`; `train`, `training` or `loss: false` or `weight: 0` leaves an assistant's turn out.
        closing: special tokens with which the chat template closes the assistant's turns: those at the end of a turn go.

    Raises:
        ValueError: what is wrong, as the end of a sentence that begins with the field's name.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError("is not a list of messages")
    read = [_turn(number, turn, closing) for number, turn in enumerate(turns, 1)]
    if read[-1]["role"] != "assistant":
        raise ValueError("does not end with the assistant's turn")
    if _is_empty(read[-1]):
        raise ValueError("ends with an empty answer")
    if len(read) == 1:
        raise ValueError("has no turn before the assistant's, so there is no prompt")
    _check_order(read)
    text = json.dumps(read, ensure_ascii=False, default=str)
    if not prompts.encodes(text):
        raise ValueError(HALF_PAIR)
    if "\ufffd" in text:
        raise ValueError(REPLACED)
    answers = [number for number in range(1, len(read)) if read[number]["role"] == "assistant"]
    chosen = answers if train_on == "all" else answers[-1:]
    trained = [number for number in chosen if _is_trained(number + 1, turns[number])]
    if not trained:
        raise ValueError(
            "has no turn to train on: `train`, `training`, `loss` or `weight` leaves out every answer that prepare.train_on asks for"
        )
    schemas = read_tools(tools)
    unlike = json_values.unlike([schemas, [turn.get("tool_calls") for turn in read]])
    if unlike is not None:
        what = "number" if isinstance(unlike, int | float) else type(unlike).__name__
        raise ValueError(
            f"has the {what} {one_line(str(unlike), 60)} in its tools or calls, which the runtime writes in another way. Give it as text"
        )
    return Conversation(read, schemas, trained)


def _turn(number: int, turn: object, closing: tuple[str, ...]) -> dict:
    """One turn with text as content, without the keys that say whether it is trained."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise ValueError(WITHOUT_TEXT)
    if turn["role"] not in ROLES:
        raise ValueError(
            f"has the role {one_line(repr(turn['role']), 60)} in turn {number}; known are {', '.join(ROLES)}"
        )
    role = ROLES[turn["role"]]
    if role == "assistant" and (thought := next((key for key in THOUGHTS if turn.get(key)), None)):
        raise ValueError(
            f"has {thought} in turn {number}, which chat templates treat differently; write it into content, as the model shall write it"
        )
    if unread := next((key for key in UNREAD if turn.get(key) and key not in (*THOUGHTS, "function_call")), None):
        raise ValueError(f"has {unread} in turn {number}, which is not read: only text is trained")
    if turn.get("function_call"):
        raise ValueError(f"has function_call in turn {number}, the old form of tool calls; write it as tool_calls")
    if turn.get("train_detail"):
        raise ValueError(
            f"has train_detail in turn {number}, which trains parts of a turn (Axolotl); a turn is trained whole, or not, with `train`: false"
        )
    kept = {
        key: value
        for key, value in turn.items()
        if value is not None and key not in FLAGS and (value or key not in UNREAD)  # an empty thought is none
    }
    if "tool_calls" in kept:
        if role != "assistant":
            raise ValueError(f"has tool_calls in turn {number}, of the {role}; only the assistant calls tools")
        kept["tool_calls"] = [
            _call(number, call) for call in listed(kept["tool_calls"], f"tool_calls in turn {number}")
        ]
        if not kept["tool_calls"]:
            del kept["tool_calls"]
    kept["role"] = role
    kept["content"] = _content(number, kept.get("content", "" if "tool_calls" in kept else None))
    if role == "assistant":
        kept["content"] = without_closing(kept["content"], closing)
    return kept


def _content(number: int, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(WITHOUT_TEXT)
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"has a part of type {kind} in turn {number}; only parts of type text can be trained on")
    return "".join(part["text"] for part in content)


def _call(number: int, call: object) -> dict:
    """A tool call of the form {type: function, function: {name, arguments: object}}."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"has a tool call without a function's name in turn {number}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # which some servers leave empty where there are none
        arguments = _parsed(arguments or "{}", f"a call of {function['name']} in turn {number} whose arguments are")
    if not isinstance(arguments, dict):
        raise ValueError(f"has a call of {function['name']} in turn {number} whose arguments are not a JSON object")
    whole = call if "function" in call else {}
    return {**whole, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _parsed(text: str, what: str) -> object:
    try:
        return json_values.read_json(text)
    except json_values.Refused as error:
        raise ValueError(f"has {what} not JSON: {error}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"has {what} not JSON: {text[:60]!r}") from None


def turns_in(value: object) -> object:
    """What a column of conversations holds, also of its JSON text, as in CSV.

    Raises:
        ValueError: it is other text.
    """
    try:
        return _parsed(value, "text that is") if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"is not a list of messages: it {error}") from None


def listed(value: object, what: str) -> list:
    """A list, also of its JSON text.

    Raises:
        ValueError: it is neither.
    """
    value = _parsed(value, f"{what} as text that is") if isinstance(value, str) else value
    if not isinstance(value, list):
        raise ValueError(f"has {what} that are not a list")
    return value


def read_tools(tools: object) -> list[dict] | None:
    """A row's tools in OpenAI's form, {type: function, function: JSON schema}, with their keys in the order given; None without any.

    Bare schemas, as LLaMA-Factory writes them, are brought into this form, the only one that clients of the server can send.

    Raises:
        ValueError: they are something else.
    """
    if tools is None or tools == "":
        return None
    schemas = []
    for number, schema in enumerate(listed(tools, "`tools`"), 1):
        function = schema.get("function", schema) if isinstance(schema, dict) else None
        given = function if isinstance(function, dict) else {}
        if not isinstance(given.get("name"), str) or not isinstance(given.get("parameters"), dict | None):
            raise ValueError(
                f"has `tools` whose item {number} is not a function's JSON schema (an object with `name` and `parameters`, an object) but {json.dumps(schema, default=str)[:60]}"
            )
        if "function" not in schema:
            schema = {"function": {key: value for key, value in schema.items() if (key, value) != ("type", "function")}}
        schemas.append(schema if "type" in schema else {"type": "function", **schema})
    return schemas or None


def _is_empty(turn: dict) -> bool:
    return not turn["content"].strip() and "tool_calls" not in turn


def _check_order(turns: list[dict]) -> None:
    """Raise ValueError where no assistant could have been asked so."""
    for number, (before, turn) in enumerate(zip([None, *turns], turns, strict=False), 1):
        role, calls = turn["role"], before is not None and "tool_calls" in before
        if role == "assistant" and _is_empty(turn):
            raise ValueError(f"has an empty turn of the assistant (turn {number})")
        if role == "system" and before is not None:
            raise ValueError(f"has a system turn behind others (turn {number}); it must be the first")
        if role == "tool" and (before is None or before["role"] not in ("assistant", "tool")):  # a call may be text
            raise ValueError(f"has a tool's turn (turn {number}) that follows no call of the assistant")
        if role != "tool" and calls:
            raise ValueError(f"has a tool call in turn {number - 1} and no tool's turn behind it")
        if role == "assistant" and before and before["role"] == "assistant":
            raise ValueError(f"has two turns of the assistant in a row (turns {number - 1} and {number})")


def _is_trained(number: int, turn: dict) -> bool:
    weight = turn.get("weight")
    for flag in SWITCHES:
        if not isinstance(turn.get(flag), bool | None):
            raise ValueError(f"has {one_line(repr(turn[flag]), 60)} as `{flag}` in turn {number}; it is true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise ValueError(f"has {one_line(repr(weight), 60)} as `weight` in turn {number}; it is 0 or 1")
    return all(turn.get(flag) is not False for flag in SWITCHES) and weight != 0
