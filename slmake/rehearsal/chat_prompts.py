"""Compare the prompts that the runtime's template engine writes of chats with those of training: users are asked by the former."""

from collections.abc import Iterator
from pathlib import Path

from slmake.data.chat import ChatTemplate
from slmake.data.tokenize import load_tokenizer
from slmake.errors import UserError
from slmake.generation import Exported
from slmake.outputs import read_json
from slmake.prompts import CHATS_FILE
from slmake.tool_calls import CALL_ID

BEFORE, SHOWN = 20, 60  # characters shown before a difference, and in all
SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there?"}
THOUGHT = {"role": "assistant", "content": "<think>\nwell\n</think>\n\nHi."}
# What people ask, whatever the rows have: one text, a system message, a chat of several turns.
MADE_UP = {
    "a chat of one turn": [ASKED],
    "a chat with a system turn": [SYSTEM, ASKED],
    "a chat of three turns": [
        ASKED,
        {"role": "assistant", "content": "Grüß dich 🙂"},
        {"role": "user", "content": " So?\n"},
    ],
    "a chat with an earlier thought": [SYSTEM, ASKED, THOUGHT, ASKED],
}

PARAMETERS = {
    "type": "object",
    "properties": {
        "thing": {"type": "object", "properties": {}, "required": []},
        "unit": {
            "type": ["string", "null"],
            "description": "Größe in \"m\" & <ft>,\nor 'cm'.",
            "enum": ["m", "ft", None],
        },
        "sizes": {"type": "array", "items": {"type": "number", "minimum": 0.5, "maximum": 100}, "default": []},
    },
    "required": ["thing"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "measure", "description": "Measures a thing.", "parameters": PARAMETERS}},
    {
        "type": "function",
        "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
    },
]
ARGUMENTS = {
    "thing": {"name": 'a "wheel" & <hub>, é\n', "parts": [], "weight": 2.5},
    "size": 1.5,
    "exact": True,
    "sizes": [1, {}],
}


def _called(name: str, arguments: dict) -> list[dict]:
    call = {"id": CALL_ID, "type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "tool_call_id": CALL_ID, "content": '{"size": 2}'},
    ]


# Tools and calls of requests, with the shapes of JSON that template engines write differently.
OF_TOOLS = {
    "a chat with tools": [ASKED],
    "a chat with a tool's result": _called("measure", ARGUMENTS),
    "a chat with a call without arguments": _called("now", {}),
}


def compare(base: Path, dataset: Path, exported: Exported) -> int:
    """Let the runtime write the prompts of the rows that the dataset keeps and of a few made-up chats, some with tools.

    Args:
        exported: that of the twin, whose tokenizer and chat template are those of the real one.

    Returns:
        The number of prompts that are the same; 0 where the prompts are no chats.

    Raises:
        UserError: the runtime writes another prompt than training, or none.
    """
    form, count = exported.form, 0
    if form["prompt"] is not None or "chat" not in form:
        return 0
    settings = form["chat"]
    chat = ChatTemplate(load_tokenizer(base), settings["template_kwargs"], settings["date"])
    chats = list(_chats(dataset, form))
    if any(tools for _, _, tools in chats):  # a model that has seen none in training is not asked with some
        chats += [(name, turns, TOOLS) for name, turns in OF_TOOLS.items()]
    for name, turns, tools in chats:
        own = "system" not in form or turns[0]["role"] == "system"
        try:
            trained = chat.asked(turns if own else [form["system"], *turns], tools) + settings.get("answer_prefix", "")
        except (ValueError, UserError):  # no chat of this template
            continue
        _refuse_other(name, trained, exported, turns, tools)
        count += 1
    return count


def _chats(dataset: Path, form: dict) -> Iterator[tuple[str, list[dict], list[dict] | None]]:
    """Name, turns and tools of each chat."""
    file = dataset / CHATS_FILE
    for kept in read_json(file, "chats", output=dataset)["chats"] if file.exists() else ():
        yield f"row {kept['row']} of {kept['file']}", kept["turns"], kept["tools"]
    for name, turns in MADE_UP.items():
        yield name, turns, form.get("tools")


def _refuse_other(name: str, trained: str, exported: Exported, turns: list[dict], tools: list[dict] | None) -> None:
    try:
        asked = exported.chat_prompt(turns, tools)
    except ValueError as error:
        reason = f"fails on {name}: {error}"
    else:
        if asked == trained:
            return
        pairs = enumerate(zip(trained, asked, strict=False))
        start = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(trained), len(asked)))
        part = slice(max(0, start - BEFORE), max(0, start - BEFORE) + SHOWN)
        reason = f"writes another prompt of {name}: training has {trained[part]!r}, the runtime {asked[part]!r}"
    raise UserError(
        f"the runtime's chat template engine {reason}. So the exported model would be asked in another way than it was trained. Write the "
        "chat template without what the engine does not know (fetch_model.chat_template), or use prepare.text_template."
    )
