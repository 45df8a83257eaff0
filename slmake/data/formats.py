"""Which format the rows have: a template over fields, or one of the usual layouts of chats and instructions.

template            any fields; text_template or messages says how they become text
messages            a list of {role, content, tool_calls}, and `tools` (OpenAI, TRL); a list may be its JSON text, here and below
sharegpt            `conversations`: a list of {from, value}, and `tools` (ShareGPT, LLaMA-Factory)
alpaca              `instruction`, an optional `input`, `output` (Stanford Alpaca), and an optional `history` (LLaMA-Factory)
prompt_completion   `prompt` and `completion`: texts, or lists of {role, content} (TRL)

A system text beside a conversation (`system`, `system_prompt`, `system_message`) is its first turn; `conversation.with_system` reads it.
"""

import contextlib
import json
from collections.abc import Callable

from slmake import params
from slmake.data.chat import ChatTemplate
from slmake.data.conversation import listed, refuse_unread, special_tokens, system_text, turns_in
from slmake.data.template import Conversations, FieldTemplate, PromptTemplate, label_text
from slmake.errors import UserError
from slmake.text import listing, one_line

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
ROLES |= {"model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool"}
ROLES |= {"developer": "system"}
ALPACA = "### Instruction:\n{instruction}\n\n### Response:\n{output}"
PROMPT_COMPLETION = "{prompt}{completion}"
CHATS = ("messages", "conversations", "conversation")  # columns that hold conversations


def prompt_template(
    section: params.Prepare, tokenizer, first_rows: Callable[[], list], say: Callable[[str], None]
) -> PromptTemplate:
    """The prompt template that params.yaml asks for; with `format: auto` and no template, what the first rows look like.

    Args:
        first_rows: reads some rows of the training file.
        say: takes one line for the user, where the format was detected.

    Raises:
        UserError: no chat template where one is needed, rows of no known format, or of two.
    """

    def chat() -> ChatTemplate:
        return ChatTemplate(tokenizer, section.chat_template_kwargs, section.chat_date)

    ends = {"special": special_tokens(tokenizer).values(), "closing": (tokenizer.eos_token, tokenizer.pad_token)}
    if section.text_template is not None:
        return FieldTemplate(section, **ends)
    if isinstance(section.messages, list):
        return FieldTemplate(section, template := chat(), special=template.closing)
    if section.messages is not None:
        return Conversations(section.messages, chat(), section.train_on)
    rows = [row for row in first_rows() if isinstance(row, dict)]
    name, column = _detected(rows) if section.format == "auto" else (section.format, _column(rows, section.format))
    if section.format == "auto":
        say(f"the rows are read as {name} (prepare.format)")
    if name == "messages":
        return Conversations(column, chat(), section.train_on)
    if name == "sharegpt":
        return Conversations(column, chat(), section.train_on, lambda row: sharegpt_turns(row, column))
    if name == "alpaca":
        if tokenizer.chat_template:
            return Conversations("output", chat(), section.train_on, alpaca_turns)
        return FieldTemplate(_with_template(section, ALPACA), convert=alpaca_fields, **ends)
    if any(isinstance(row.get("prompt"), list) or "role" in _first_turn(row, "prompt") for row in rows):
        return Conversations("completion", chat(), section.train_on, prompt_completion_turns)
    return FieldTemplate(_with_template(section, PROMPT_COMPLETION), convert=prompt_completion_fields, **ends)


def _with_template(section: params.Prepare, template: str) -> params.Prepare:
    return section.model_copy(update={"text_template": template})


def _detected(rows: list[dict]) -> tuple[str, str]:
    """Format and its column.

    Raises:
        UserError: none fits, or more than one.
    """
    columns = {key for row in rows for key, value in row.items() if value is not None}
    fits = []
    for column in CHATS:
        turn = next(filter(None, (_first_turn(row, column) for row in rows)), {})
        if {"role", "content"} <= turn.keys():
            fits.append(("messages", column))
        elif {"from", "value"} <= turn.keys():
            fits.append(("sharegpt", column))
    if {"instruction", "output"} <= columns:
        fits.append(("alpaca", ""))
    if {"prompt", "completion"} <= columns:
        fits.append(("prompt_completion", ""))
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UserError(
            f"prepare.format: the rows can be read as {' and as '.join(name for name, _ in fits)}. Set it to one of them."
        )
    texts = [column for column in CHATS if any(isinstance(row.get(column), str) for row in rows)]
    hint = f" `{texts[0]}` is text, and no JSON of a list of messages." if texts else ""
    raise UserError(
        f"prepare: no known format in the first rows, whose fields are {listing(sorted(columns)) or 'none'}.{hint} Give text_template (such as "
        "`{phrase}\\n{tone}`), or messages."
    )


def _turns(row: dict, column: str) -> object:
    """What a column holds, with JSON text as its value; other text as it is."""
    with contextlib.suppress(ValueError):
        return turns_in(row.get(column))
    return row[column]


def _first_turn(row: dict, column: str) -> dict:
    """The first of the turns in a column; empty where it holds something else."""
    turns = _turns(row, column)
    return turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}


def _column(rows: list[dict], name: str) -> str:
    preferred = "conversations" if name == "sharegpt" else "messages"
    return next(
        (key for key in (preferred, *CHATS) if any(key in row for row in rows)),
        preferred,
    )


def sharegpt_turns(row: dict, column: str) -> object:
    """ShareGPT's turns with the usual roles."""
    turns = turns_in(row[column])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    converted = []
    for turn in turns:
        role, value = turn.get("from"), turn.get("value")
        more = {key: turn[key] for key in turn if key not in ("from", "value")}  # `train`, and what is refused
        if role == "function_call":  # LLaMA-Factory's: one call as JSON text, or a list of them
            single = isinstance(value, str) and not value.lstrip().startswith("[")
            calls = f"[{value}]" if single else [value] if isinstance(value, dict) else value
            converted.append({**more, "role": "assistant", "content": None, "tool_calls": calls})
        elif isinstance(role, str) and role in ROLES:
            converted.append({**more, "role": ROLES[role], "content": value})
        else:
            raise ValueError(
                f"has a turn from {one_line(repr(role), 60)}; known are {', '.join([*ROLES, 'function_call'])}"
            )
    return converted


def alpaca_fields(row: dict) -> dict:
    """Instruction with its input, if it has one, and output.

    Raises:
        ValueError: one of them is not text (an output may be a number), or there is more in the row that a text cannot hold.
    """
    return _alpaca(prompt_completion_fields(row))


def _alpaca(row: dict) -> dict:
    row = {**row, "output": label_text(row.get("output"))}
    for name, needed in (("instruction", True), ("input", False), ("output", True)):
        if not isinstance(row.get(name), str) and (needed or row.get(name) is not None):
            raise ValueError(f"is there, but `{name}` is not text")
    given = [row["instruction"], (row.get("input") or "").strip()]
    return {"instruction": "\n\n".join(filter(str.strip, given)), "output": row["output"]}


def alpaca_turns(row: dict) -> list[dict]:
    """An instruction as the user's turn and its output as the assistant's, behind those of `history`.

    Raises:
        ValueError: one of them is not text, or `history` is no list of pairs.
    """
    fields, earlier = _alpaca(row), _list_in(row, "history")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in earlier):
        raise ValueError("has a `history` that is not a list of pairs, the user's text and the assistant's")
    pairs = [*earlier, [fields["instruction"], fields["output"]]]
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def prompt_completion_fields(row: dict) -> dict:
    """The row, whose prompt and completion are texts.

    Raises:
        ValueError: there is more in it that a text cannot hold.
    """
    refuse_unread(row)
    system = system_text(row)
    lost = [name for name in ("history", "tools") if isinstance(row.get(name), list | str) and _list_in(row, name)]
    lost += [system[0]] if system else []
    if lost:
        raise ValueError(
            f"stands beside `{lost[0]}`, which would be lost: these rows become plain text. Write them as `messages`, or use `format: alpaca`, "
            "with a base model with a chat template; where the prompt has this already, name its fields in text_template"
        )
    return row


def prompt_completion_turns(row: dict) -> list:
    """The turns of a prompt, which are not trained, with those of its completion.

    Raises:
        ValueError: they are not two lists.
    """
    prompt, completion = _turns(row, "prompt"), _turns(row, "completion")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise ValueError("and `prompt` are not two lists of messages")
    return [{**turn, "train": False} if isinstance(turn, dict) else turn for turn in prompt] + completion


def _list_in(row: dict, name: str) -> list:
    """LLaMA-Factory's earlier turns or tools of a row, also of their JSON text; other text in a field of this name is something else."""
    value = row.get(name)
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
        value = value if isinstance(value, list) else []
    return listed(value or [], f"`{name}`")
