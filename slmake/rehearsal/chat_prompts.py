"""Compare the prompts that the runtime's template engine writes of chats with those of training: users are asked by the former."""

from collections.abc import Iterator
from pathlib import Path

from slmake.data.chat import ChatTemplate
from slmake.data.tokenize import load_tokenizer
from slmake.errors import UserError
from slmake.generation import Exported
from slmake.outputs import read_json
from slmake.prompts import CHATS_FILE

BEFORE, SHOWN = 20, 60  # characters shown before a difference, and in all
SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there?"}
THOUGHT = {"role": "assistant", "content": "<think>\nwell\n</think>\n\nHi."}
# What people ask, whatever the rows have: one text, a system message, a chat of several turns.
MADE_UP = {
    "a chat of one turn": [ASKED],
    "a chat with a system turn": [SYSTEM, ASKED],
    "a chat of three turns": [ASKED, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": " So?\n"}],
    "a chat with an earlier thought": [SYSTEM, ASKED, THOUGHT, ASKED],
}


def compare(base: Path, dataset: Path, exported: Exported) -> int:
    """Let the runtime write the prompts of the rows that the dataset keeps and of a few made-up chats.

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
    for name, turns, tools in _chats(dataset, form):
        own = "system" not in form or turns[0]["role"] == "system"
        try:
            trained = chat.asked(turns if own else [form["system"], *turns], tools) + settings.get("answer_prefix", "")
        except ValueError:  # no chat of this template
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
