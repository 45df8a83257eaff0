"""Ask an exported model: python run.py "your text" (needs only: pip install onnxruntime-genai).

The pipeline scores an export with this very code, and so do `ask`, `chat` and the server; `package` copies this file as run.py: what is
scored is what ships.
"""

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # this file's own folder: no file of a package may take a module's place

import bisect
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path

PROVIDERS = {"cuda": "CUDA", "dml": "DirectML", "webgpu": "WebGPU"}
ROLES = ("system", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "reasoning", "reasoning_details", "thinking")  # some templates write them, some do not
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
UNREAD = (*THOUGHTS, *MEDIA, "documents", "function_call", "prefix", "refusal")  # fields of a message that are not read
IN_PIECES = "it has a character that the model's tokenizer writes in several tokens. Leave it out or write it as ASCII."


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: share of the probability that is sampled from (nucleus sampling).
        seed: the same seed gives the same answer; None for another one each time.
        guidance: kind (`regex`, `json_schema` or `lark_grammar`) and text of what an answer must fit.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    guidance: tuple[str, str] | None = None

    def options(self, vocabulary: int) -> dict:
        """The runtime's search options; with 0 for top_k, more tokens would pass than top_p lets."""
        if not self.temperature:
            return {"do_sample": False}
        seed = {} if self.seed is None else {"random_seed": self.seed}
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": vocabulary if self.top_p < 1 else 0}
        return {"do_sample": True, **chosen, **seed}


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
        RuntimeError, ValueError: ONNX Runtime cannot load it, or genai_config.json is damaged.
    """

    def __init__(self, folder: Path, form: dict | None = None):
        import onnxruntime_genai as og

        self.folder, self.form = folder, form or {}
        settled = read(folder / "genai_config.json", _settings)
        self.context_length, self.smallest_cache, self.vocabulary, session, self.provider = settled
        settings = og.Config(str(folder))
        if "intra_op_num_threads" not in session:
            # As PyTorch does: OMP_NUM_THREADS, else a thread for each core (0). GenAI's own choice is half as fast on two cores.
            threads = os.environ.get("OMP_NUM_THREADS", "")
            options = {"intra_op_num_threads": int(threads) if threads.isdecimal() else 0}
            settings.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        try:
            self.model, self.runs_on = og.Model(settings), self.provider
        except Exception:
            if self.provider == "cpu":
                raise
            settings.clear_providers()
            self.model, self.runs_on = og.Model(settings), "cpu"
        self.tokenizer = og.Tokenizer(self.model)

    @property
    def sampling(self) -> Sampling:
        """How answers are chosen by default: the most likely one, that fits what `package.constrain` asks for."""
        guidance = self.form.get("guidance")
        return Sampling(guidance=(guidance["kind"], guidance["data"]) if guidance else None)

    def prompt(self, *arguments: str) -> str:
        """The text that the model continues.

        Args:
            arguments: a text for each field of the template; to a model of chats, what the user says, or messages as JSON.

        Raises:
            ValueError: too few or too many of them, or a text that the runtime cannot read.
        """
        fields = self.form["fields"] if self.form["prompt"] is not None else ["text"]
        if len(arguments) != len(fields):
            asked = f"{len(fields)} text{'s' * (len(fields) > 1)}: " + " ".join(f'"{name}"' for name in fields)
            raise ValueError(f"this model takes {asked}. Given: {len(arguments)}.")
        refuse_unreadable(list(arguments))
        if self.form["prompt"] is not None:
            return self.form["prompt"].format(**dict(zip(fields, arguments, strict=True)))
        tools = self.form.get("tools")
        return self.chat_prompt(self.shortened(_messages(arguments[0]), tools), tools)

    def chat_prompt(self, messages: list[dict], tools: list[dict] | None = None, answered: bool = False) -> str:
        """The text of a chat, by the chat template with the options and the date of training.

        Args:
            messages: turns with `role` and `content`, or `tool_calls`, whose arguments are objects; without a system turn, training's.
            tools: functions that the model may call, as JSON Schemas in OpenAI's form.
            answered: the last turn is the answer, so that none is asked for.

        Raises:
            ValueError: the template does not take these turns.
        """
        try:
            refuse_unreadable([messages, tools])
            chat = self.form.get("chat", {})
            own = "system" not in self.form or any(turn.get("role") in ("system", "developer") for turn in messages)
            turns = messages if own else [self.form["system"], *messages]
            text = json.dumps([_as_trained(turn, chat) for turn in turns])
        except RecursionError:
            raise ValueError("the arguments of a call are nested too deeply.") from None
        template = self._template(chat, tools)
        try:
            prompt = self.tokenizer.apply_chat_template(text, template_str=template, add_generation_prompt=not answered)
        except RuntimeError as error:
            raise ValueError(f"the chat template does not take these messages: {_first_line(error)}") from None
        return prompt if answered else prompt + chat.get("answer_prefix", "")

    def shortened(self, messages: list[dict], tools: list[dict] | None = None) -> list[dict]:
        """The turns of a chat without as many of the earliest ones as training drops where it is too long; a system turn stays."""
        limit = self.form.get("max_chat_tokens")
        starts = [number for number, turn in enumerate(messages) if turn.get("role") == "user"][1:]
        if limit is None or not starts or (whole := len(self._ids(self.chat_prompt(messages, tools)))) <= limit:
            return messages
        system = [turn for turn in messages[:1] if turn.get("role") in ("system", "developer")]
        # Tools, which are slow to render, have as many tokens whatever the turns behind them.
        beside = whole - len(self._ids(self.chat_prompt(messages))) if tools else 0

        def fits(start: int) -> bool:
            return len(self._ids(self.chat_prompt([*system, *messages[start:]]))) + beside <= limit

        return [*system, *messages[starts[min(bisect.bisect_left(starts, True, key=fits), len(starts) - 1)] :]]

    def _template(self, chat: dict, tools: list[dict] | None) -> str | None:
        """The chat template with the options, the tools and the date of training; None for the template as it is."""
        file = self.folder / "chat_template.jinja"
        if not (chat or tools) or not file.exists():
            return None
        # Tools are a variable, too: those that the runtime is given it rewrites ("string" becomes "str"), which training did not.
        variables = chat.get("template_kwargs", {}) | ({"tools": tools} if tools else {})
        options = "".join(f"{{%- set {name} = {literal(value)} -%}}" for name, value in variables.items())
        day, today = date.fromisoformat(chat.get("date", "2024-01-01")), r"strftime_now\(\s*(['\"])(.*?)\1\s*\)"
        template = re.sub(today, lambda call: json.dumps(day.strftime(call[2])), file.read_text(encoding="utf-8"))
        return options + template.replace("strftime_now is defined", "true")

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, as in training: normalized, behind the begin token, cut at its start if it is too long."""
        ids, limit = self._ids(text), self.form.get("max_prompt_tokens")
        return ids if limit is None else truncate(ids, limit, self.form["kept_token_id"])

    def _ids(self, text: str) -> list[int]:
        """Token ids of a text that is not cut."""
        if "normalization" in self.form:
            text = unicodedata.normalize(self.form["normalization"], text)
        return [*self.form.get("begin_token_ids", []), *map(int, self.tokenizer.encode(text))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without its end token and outer white space."""
        return self.text(ids).strip()

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, without its end token; with spaces where the runtime leaves what stands for one."""
        text = self.tokenizer.decode([token for token in ids if token != self.form.get("end_token_id")])
        return text.replace(self.form.get("space", " "), " ")

    def generator(self, prompt: Sequence[int], new_tokens: int, sampling: Sampling):
        """An `onnxruntime_genai.Generator` that has read a prompt, with room for `new_tokens`.

        Raises:
            ValueError: the runtime cannot make the guidance of its text.
        """
        import onnxruntime_genai as og

        settings = og.GeneratorParams(self.model)
        settings.set_search_options(max_length=max(len(prompt) + new_tokens, self.smallest_cache))
        settings.set_search_options(**sampling.options(self.vocabulary))
        if sampling.guidance:
            settings.set_guidance(*sampling.guidance)
        try:
            generator = og.Generator(self.model, settings)
        except RuntimeError as error:
            if not sampling.guidance:
                raise
            reason = _first_line(error).removeprefix("Error creating grammar: ")
            raise ValueError(f"answers cannot be held to this {sampling.guidance[0]}: {reason}") from None
        generator.append_tokens(list(prompt))
        return generator

    def generate(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        look: Callable | None = None,
        room: int = 0,
        sampling: Sampling | None = None,
    ) -> list[int]:
        """The continuation of a prompt, token by token.

        Args:
            prompt: token ids.
            new_tokens: the largest number of tokens to generate; the model's end token ends the answer earlier.
            look: called with the `onnxruntime_genai.Generator` before each token is chosen, when its logits are there.
            room: tokens that the generator must be able to hold behind the prompt, if more than `new_tokens`.
            sampling: how tokens are chosen; the most likely ones by default.

        Returns:
            The new token ids, without the end token.
        """
        generator = self.generator(prompt, max(new_tokens, room), sampling or Sampling())
        return list(self.steps(generator, new_tokens, look, bool(sampling and sampling.guidance)))

    def steps(self, generator, new_tokens: int, look: Callable | None = None, held: bool = False) -> Iterator[int]:
        """Token ids as they are generated, without an end token (see `generate`).

        Args:
            held: guidance holds the answer.

        Raises:
            ValueError: the runtime cannot follow the guidance; it may ask for a character that the tokenizer has in pieces only.
        """
        length = generator.token_count()
        for made in range(1, new_tokens + 1):
            try:
                if look:
                    look(generator)
                generator.generate_next_token()
            except RuntimeError as error:
                if not held:
                    raise
                reason = IN_PIECES if "satisfy the grammar" in str(error) else _first_line(error)
                raise ValueError(f"answers cannot be held to this: {reason}") from None
            if generator.token_count() < length + made:  # an end token, which onnxruntime-genai leaves out
                return
            yield int(generator.get_next_tokens()[0])

    def fitting(self, ids: Sequence[int], new_tokens: int) -> Sequence[int]:
        """The prompt's token ids.

        Raises:
            ValueError: prompt and answer are longer than what the model reads.
        """
        if len(ids) + new_tokens > self.context_length:
            counted = f"{len(ids)} tokens with the template, and {new_tokens} for the answer"
            raise ValueError(f"the text is too long: {counted}; the model reads {self.context_length}. Shorten it.")
        return ids

    def answer(self, *arguments: str, new_tokens: int | None = None) -> str:
        """The model's answer to a text (see `prompt`).

        Args:
            new_tokens: the largest number of tokens; as many as the longest answer of the training data by default.

        Raises:
            ValueError: the text does not fit the template or the model.
        """
        new_tokens = new_tokens or self.form["longest_answer_tokens"]
        ids = self.fitting(self.encode(self.prompt(*arguments)), new_tokens)
        return self.decode(self.generate(ids, new_tokens, sampling=self.sampling))


def truncate(ids: Sequence[int], limit: int, kept: int | None) -> Sequence[int]:
    """The last `limit` tokens of a prompt; its first token stays if it is `kept`, the begin token."""
    if len(ids) <= limit:
        return ids
    first = ids[:1] if ids[0] == kept else ids[:0]
    return [*first, *ids[len(ids) - limit + len(first) :]]


def read(file: Path, use: Callable):
    """What `use` makes of a package's JSON file; raises ValueError, which names it, if it is damaged."""
    try:
        return use(json.loads(file.read_text(encoding="utf-8")))
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: the file is damaged ({error!r}). Get the package again.") from None


def _settings(config: dict) -> tuple[int, int, int, dict, str]:
    """Of genai_config.json: lengths of context, smallest cache (a window) and vocabulary; session's options; execution provider."""
    decoder = (model := config["model"])["decoder"]
    names = [name.lower() for entry in decoder["session_options"].get("provider_options", []) for name in entry]
    window = decoder.get("sliding_window", {}).get("window_size", 0)
    session, provider = decoder["session_options"], (names or ["cpu"])[0]
    return model["context_length"] + 0, window, model["vocab_size"] + 0, session, provider


def as_form(form: dict) -> dict:
    """prompt.json; raises one of the errors that `read` takes for damage where it lacks what `Exported` needs."""
    chat = form.get("chat", {})
    _ = date.fromisoformat(chat.get("date", "2024-01-01")), {**chat.get("template_kwargs", {})} | form.get("system", {})
    return form | {"fields": list(form["fields"]), "longest_answer_tokens": form["longest_answer_tokens"] + 0}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]  # the runtime may go on with all of its state


def literal(value: object) -> str:
    """A JSON value for a template: the runtime's reader takes no exponents."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(name)}: {literal(part)}' for name, part in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, float):
        text = format(Decimal(repr(value)), "f")
        return text if "." in text else f"{text}.0"
    escape = r"(\\\\)|\\u(00[01].)"  # which the runtime does not know in a template
    return re.sub(escape, lambda found: found[1] or chr(int(found[2], 16)), json.dumps(value, ensure_ascii=False))


def shown(text: str) -> str:
    """A text as it may be printed: where a person's terminal would obey its control characters, without them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text) if sys.stdout and sys.stdout.isatty() else text


def refuse_unreadable(value: object) -> None:
    """Raise ValueError if a text or a number in a JSON value is none that the runtime reads and writes as training did."""
    if isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            refuse_unreadable(part)
    elif isinstance(value, str) and "\0" in value:
        raise ValueError("the text holds a NUL character, which ends a text for the runtime. Take it out.")
    elif isinstance(value, str) and re.search("[\ud800-\udfff]", value):  # as Python keeps bytes of another encoding
        raise ValueError("the text is not UTF-8. Convert it, or set a UTF-8 locale.")
    elif isinstance(value, float | int) and not written_alike(value):
        raise ValueError(f"the runtime writes the number {value} in another way than training. Give it as text.")


def written_alike(number: float) -> bool:
    """Whether the runtime's chat templates write a number as Python's do."""
    if isinstance(number, int):
        return -(2**63) <= number < 2**64
    return abs(number) < 1e15 or 1e16 <= abs(number) < float("inf")


def without_closing(answer: str, closing: Sequence[str]) -> str:
    """An answer without the special tokens at its end that close it and are no part of its text, as the runtime gives it.

    Args:
        closing: texts of these tokens, none of them empty.
    """
    kept = answer.rstrip()
    while kept.endswith(tuple(closing)):
        answer = kept = kept.removesuffix(next(filter(kept.endswith, closing))).rstrip()
    return answer


def _as_trained(turn: dict, chat: dict) -> dict:
    """A turn with the text that training had of it.

    An answer has none of the tokens that close it. Where the chat template strips outer white space, there is none: the runtime's
    engine leaves what is not ASCII.
    """
    content = turn.get("content")
    if not isinstance(content, str):
        return turn
    content = without_closing(content, chat.get("closing", ())) if turn.get("role") == "assistant" else content
    return {**turn, "content": content.strip() if turn.get("role") in chat.get("trimmed_roles", ()) else content}


def _messages(text: str) -> list[dict]:
    """The turns of a chat: those that a JSON list of messages holds, or the text as the user's only turn."""
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        turns = None
    if not turns or not isinstance(turns, list) or not all(map(_is_message, turns)):
        return [{"role": "user", "content": text}]
    return [as_turn(number, turn) for number, turn in enumerate(turns, 1)]


def _is_message(turn: object) -> bool:
    said = isinstance(turn, dict) and isinstance(turn.get("role"), str)
    return said and bool({"content", "tool_calls"} & turn.keys())


def as_turn(number: int, message: dict) -> dict:
    """A message in the form in which training had it: content is text, and the arguments of calls are objects.

    Raises:
        ValueError: training could have had no such message.
    """
    turn = {key: value for key, value in message.items() if value is not None and (value or key not in UNREAD)}
    turn["role"] = "system" if turn["role"] == "developer" else turn["role"]
    unread = [key for key in UNREAD if key in turn] + [turn["role"]] * (turn["role"] not in ROLES)
    if unread:
        raise ValueError(f"message {number} has {unread[0]!r}, which training never has. Roles are {', '.join(ROLES)}.")
    content = turn.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part.get("text") or "" for part in content)
    calls = turn.pop("tool_calls", [])
    if not isinstance("" if content is None and calls else content, str):
        raise ValueError(f"the content of message {number} is no text.")
    try:
        calls = [_call(call) for call in calls]
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        raise ValueError(
            f"message {number} has a call without a name, or with arguments that are no JSON object."
        ) from None
    return turn | {"content": content or ""} | ({"tool_calls": calls} if calls else {})


def _call(call: dict) -> dict:
    """A call of the form {type: function, function: {name, arguments: object}}."""
    function = call.get("function", call)
    given = function.get("arguments", {})
    arguments = {**(json.loads(given or "{}") if isinstance(given, str) else given)}
    named = {"name": str(function["name"]), "arguments": arguments}
    return {**(call if "function" in call else {}), "type": "function", "function": named}


def main() -> None:
    here = Path(__file__).resolve().parent
    try:
        model = Exported(here, read(here / "prompt.json", as_form))
        print(shown(model.answer(*sys.argv[1:])))
        if model.runs_on != model.provider:
            print(f"run.py: {PROVIDERS[model.provider]} is not available here; the CPU answered", file=sys.stderr)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"run.py: error: {error}")


if __name__ == "__main__":
    main()
