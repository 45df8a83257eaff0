"""Chat with the exported model in a terminal.

    python -m tools.chat

Answers appear as they are generated. /system TEXT sets the system message, /reset starts a new chat, /quit (or Ctrl-D) ends. Ctrl-C stops
an answer. A model that was not trained on chats takes each line as one text, by itself.
"""

import contextlib
import json
import sys
import time

from slmake import cli, exported_model
from slmake.answer_stream import Stream
from slmake.errors import UserError
from slmake.generation import Exported, shown
from slmake.openai_api import field_texts

HELP = "/system TEXT sets the system message, /reset starts a new chat, /quit ends"


class Chat:
    """A conversation with a model.

    Attributes:
        turns: its messages so far, the system message first if there is one.
    """

    def __init__(self, model: Exported, new_tokens: int | None = None):
        self.model, self.new_tokens = model, new_tokens or model.form["longest_answer_tokens"]
        self.turns: list[dict] = []

    @property
    def remembers(self) -> bool:
        """Whether the model was trained on chats, so that earlier turns count."""
        return self.model.form["prompt"] is None

    def reset(self, system: str | None = None) -> None:
        """Begin a new conversation; its system message stays, unless there is another one."""
        if system:
            self.turns = [{"role": "system", "content": system}]
        else:
            self.turns = [turn for turn in self.turns[:1] if turn["role"] == "system"]

    def say(self, text: str) -> Stream:
        """The answer to what the user says, to be iterated over, then given to `keep`.

        Raises:
            ValueError: the text does not fit the template, or the conversation the model.
        """
        if self.remembers:
            turns = [*self.turns, {"role": "user", "content": text}]
            tools = self.model.form.get("tools")
            prompt = self.model.chat_prompt(self.model.shortened(turns, tools), tools)
        else:
            prompt = self.model.prompt(*field_texts(self.model.form, text))
        return Stream(self.model, self.model.fitting(self.model.encode(prompt), self.new_tokens), self.new_tokens)

    def keep(self, text: str, answer: str) -> None:
        """Add a turn of the user and the model's to the conversation."""
        if self.remembers:
            self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def command(chat: Chat, line: str) -> str:
    """Do what a line that begins with / asks for; returns what to print.

    Raises:
        EOFError: it ends the chat.
    """
    word, _, rest = line.partition(" ")
    if word == "/quit":
        raise EOFError
    if word == "/reset":
        chat.reset()
        return "new chat"
    if word == "/system" and rest.strip():
        if not chat.remembers:
            return "this model was not trained on chats: it takes no system message"
        chat.reset(rest.strip())
        return "new chat with this system message"
    return HELP


def reply(chat: Chat, line: str) -> None:
    """Print the answer to a line piece by piece, and its speed."""
    try:
        stream, began = chat.say(line), time.perf_counter()
    except ValueError as error:
        print(f"{error} {HELP}." if chat.turns else str(error))
        return
    with contextlib.suppress(KeyboardInterrupt):
        for piece in stream:
            print(shown(piece), end="", flush=True)
    rate = len(stream.tokens) / (time.perf_counter() - began)
    print(f"\n  ({len(stream.tokens)} tokens, {rate:.0f} tokens/s{', cut' * (stream.finish == 'length')})")
    chat.keep(line, stream.text)


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    exported_model.add_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, help="length of an answer (default: the longest in the data)")
    parser.add_argument("--system", help="the system message")
    args = parser.parse_args(argv)
    with cli.job("chat", args.log, interactive=True):
        chat = Chat(exported_model.load(args), args.max_new_tokens)
        if args.system:
            if not chat.remembers:
                raise UserError("--system: this model was not trained on chats: it takes no system message.")
            chat.reset(args.system)
        if sys.stdin.isatty():
            import readline  # noqa: F401 (input() then edits lines and remembers them)
        fields = chat.model.form["fields"]
        if not chat.remembers and len(fields) > 1:
            print(f"each line is a JSON object, such as {json.dumps(dict.fromkeys(fields, '...'))}")
        print(HELP)
        with contextlib.suppress(EOFError):
            while True:
                line = input("> " if sys.stdin.isatty() else "").strip()
                if line.startswith("/"):
                    print(command(chat, line))
                elif line:
                    reply(chat, line)


if __name__ == "__main__":
    main()
