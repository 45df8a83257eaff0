"""Ask an exported model: python run.py "your text" (needs only: pip install onnxruntime-genai).

The pipeline scores an export with this very code, and `package` copies this file as run.py: what is scored is what ships.
"""

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # this file's own folder: no file of a package may take a module's place

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

PROVIDERS = {"cuda": "CUDA", "dml": "DirectML", "webgpu": "WebGPU"}


class Exported:
    """An exported model with its tokenizer: text in, text out.

    Where the execution provider that it was exported for is not installed, it runs on the CPU.

    Args:
        folder: what the model builder wrote.
        form: prompt.json, which says how a text becomes a prompt; without it, text is encoded as it is.

    Attributes:
        provider: the execution provider it was exported for.
        runs_on: the execution provider it runs on here.
        context_length: tokens of prompt and answer together that it can read.

    Raises:
        RuntimeError: ONNX Runtime cannot load it.
    """

    def __init__(self, folder: Path, form: dict | None = None):
        import onnxruntime_genai as og

        self.folder, self.form = folder, form or {}
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.context_length = config["context_length"]
        # ONNX Runtime GenAI refuses a cache that is smaller than a sliding window.
        self.smallest_cache = config["decoder"].get("sliding_window", {}).get("window_size", 0)
        providers = config["decoder"]["session_options"].get("provider_options", [])
        self.provider = self.runs_on = next((name.lower() for entry in providers for name in entry), "cpu")
        try:
            self.model = og.Model(str(folder))
        except Exception:
            if self.provider == "cpu":
                raise
            settings = og.Config(str(folder))
            settings.clear_providers()
            self.model, self.runs_on = og.Model(settings), "cpu"
        self.tokenizer = og.Tokenizer(self.model)

    def prompt(self, *arguments: str) -> str:
        """The text that the model continues.

        Args:
            arguments: a text for each field of the template; for a model of chats, what the user says, or the messages
                so far as JSON.

        Raises:
            ValueError: too few or too many of them, or a text that the runtime cannot read.
        """
        fields = self.form["fields"] if self.form["prompt"] is not None else ["text"]
        if len(arguments) != len(fields):
            asked = " ".join(f'"{name}"' for name in fields)
            raise ValueError(
                f"this model takes {len(fields)} text{'s' * (len(fields) > 1)}: {asked}. Given: {len(arguments)}."
            )
        if any("\0" in text for text in arguments):
            raise ValueError("the text holds a NUL character, which ends a text for the runtime. Take it out.")
        if self.form["prompt"] is not None:
            return self.form["prompt"].format(**dict(zip(fields, arguments, strict=True)))
        chat = self.form.get("chat", {})
        text = self.tokenizer.apply_chat_template(
            json.dumps(_messages(arguments[0])), template_str=self._template(chat), add_generation_prompt=True
        )
        return text + chat.get("answer_prefix", "")

    def _template(self, chat: dict) -> str | None:
        """The chat template with the options and the date of training; None for the template as it is."""
        file = self.folder / "chat_template.jinja"
        if not chat or not file.exists():
            return None
        options = "".join(
            f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in chat["template_kwargs"].items()
        )
        day, today = date.fromisoformat(chat["date"]), r"strftime_now\(\s*(['\"])(.*?)\1\s*\)"
        template = re.sub(today, lambda call: json.dumps(day.strftime(call[2])), file.read_text(encoding="utf-8"))
        return options + template.replace("strftime_now is defined", "true")

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, as in training: normalized, behind the begin token, cut at its start if it is too long."""
        if "normalization" in self.form:
            text = unicodedata.normalize(self.form["normalization"], text)
        ids = [*self.form.get("begin_token_ids", []), *map(int, self.tokenizer.encode(text))]
        return (
            truncate(ids, self.form["max_prompt_tokens"], self.form["kept_token_id"])
            if "max_prompt_tokens" in self.form
            else ids
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without its end token and outer white space."""
        end = self.form.get("end_token_id")
        return self.tokenizer.decode([token for token in ids if token != end]).strip()

    def generate(
        self, prompt: Sequence[int], new_tokens: int, look: Callable | None = None, room: int = 0
    ) -> list[int]:
        """The most likely continuation of a prompt, token by token.

        Args:
            prompt: token ids.
            new_tokens: the largest number of tokens to generate; the model's end token ends the answer earlier.
            look: called with the `onnxruntime_genai.Generator` before each token is chosen, when its logits are there.
            room: tokens that the generator must be able to hold behind the prompt, if more than `new_tokens`.

        Returns:
            The new token ids; onnxruntime-genai leaves out an end token.
        """
        import onnxruntime_genai as og

        settings = og.GeneratorParams(self.model)
        length = max(len(prompt) + max(new_tokens, room), self.smallest_cache)
        settings.set_search_options(max_length=length, do_sample=False)
        generator = og.Generator(self.model, settings)
        generator.append_tokens(list(prompt))
        made = 0
        while made < new_tokens and not generator.is_done():
            if look:
                look(generator)
            generator.generate_next_token()
            made += 1
        return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]

    def answer(self, *arguments: str, new_tokens: int | None = None) -> str:
        """The model's answer to a text (see `prompt`).

        Args:
            new_tokens: the largest number of tokens; as many as the longest answer of the training data by default.

        Raises:
            ValueError: the text does not fit the template or the model.
        """
        new_tokens = new_tokens or self.form["longest_answer_tokens"]
        ids = self.encode(self.prompt(*arguments))
        if len(ids) + new_tokens > self.context_length:
            raise ValueError(
                f"the text is too long: {len(ids)} tokens with the template, and {new_tokens} for the answer; "
                f"the model reads {self.context_length}. Shorten it."
            )
        return self.decode(self.generate(ids, new_tokens))


def truncate(ids: Sequence[int], limit: int, kept: int | None) -> Sequence[int]:
    """The last `limit` tokens of a prompt; its first token stays if it is `kept`, the begin token."""
    if len(ids) <= limit:
        return ids
    first = ids[:1] if ids[0] == kept else ids[:0]
    return [*first, *ids[len(ids) - limit + len(first) :]]


def _messages(text: str) -> list[dict]:
    """The turns of a chat: those that a JSON list of messages holds, or the text as the user's only turn."""
    try:
        turns = json.loads(text)
    except ValueError:
        turns = None
    if (
        isinstance(turns, list)
        and turns
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns)
    ):
        return turns
    return [{"role": "user", "content": text}]


def main() -> None:
    here = Path(__file__).resolve().parent
    try:
        model = Exported(here, json.loads((here / "prompt.json").read_text(encoding="utf-8")))
        print(model.answer(*sys.argv[1:]))
        if model.runs_on != model.provider:
            print(f"run.py: {PROVIDERS[model.provider]} is not available here; the CPU answered", file=sys.stderr)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"run.py: error: {error}")


if __name__ == "__main__":
    main()
