"""OpenAI's API as far as it is served: requests, what they ask of a model, and how answers are written.

A field that is not served is refused by its name, since it may change the answer; null, or the value that changes nothing, is taken.
https://platform.openai.com/docs/api-reference/chat. `package` copies this file for serve.py.
"""

import argparse
import contextlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError, WrapValidator, model_validator  # noqa: F401 (serve.py catches it)
from pydantic_core import PydanticCustomError

from slmake import generation, tool_calls

# The runtime reads tools in a time that grows with the square of their text, while other requests wait: 16 kB take 2 s.
TOOLS, TOOLS_BYTES = 128, 2**14
# Every token of an answer is compared with these while other requests wait; four is OpenAI's limit, too.
Stop = Annotated[str, Field(max_length=256)]


def _as_given(value: Any, check: Callable[[Any], Any]) -> Any:
    """A value that is checked, and stays as it was sent: chat templates show the keys of tools in their order."""
    check(value)
    return value


def _unserved(value: object) -> None:
    if value is not None:
        raise PydanticCustomError("unserved", "it is not served, and may change the answer. Leave it out")


AsGiven = WrapValidator(_as_given)


class Served(BaseModel, extra="allow"):
    """Fields that are served, or say nothing about an answer; others must be null."""

    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_unserved)]] = Field(init=False)


class Options(Served):
    """What both kinds of requests may ask for."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)  # the same, by its newer name
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**31)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    n: Literal[1] | None = 1
    logprobs: Literal[False, 0] | None = None
    top_logprobs: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    # vLLM's
    top_k: Literal[0, -1] | None = None
    min_p: Literal[0] | None = None
    repetition_penalty: Literal[1] | None = None
    min_tokens: Literal[0] | None = None
    ignore_eos: Literal[False] | None = None
    # about the request, not the answer
    metadata: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None

    @property
    def stops(self) -> list[str]:
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]

    @property
    def with_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class Completion(Options):
    """A request to /v1/completions: the text that the model continues, as it is."""

    prompt: str
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Function(BaseModel):
    name: str = Field(min_length=1)
    arguments: str = "{}"


class ToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(BaseModel, extra="allow"):
    """A message; further fields, such as `name`, reach the chat template, as in training."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Annotated[Part, AsGiven]] | None = None
    tool_calls: list[Annotated[ToolCall, AsGiven]] | None = None

    @model_validator(mode="after")
    def _is_read(self) -> "Message":
        if unread := next(filter((self.model_extra or {}).get, generation.UNREAD), None):
            reason = "is not read. Write it into content or tool_calls, or leave it out"
            raise PydanticCustomError("unread", "{name} {reason}", {"name": unread, "reason": reason})
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("empty", "content is missing")
        return self


class Tool(BaseModel):
    class Described(BaseModel, extra="allow"):
        name: str = Field(min_length=1)
        parameters: dict[str, Any] | None = None

    type: Literal["function"]
    function: Described


class ToolChoice(BaseModel):
    class Named(BaseModel):
        name: str

    type: Literal["function"]
    function: Named


class ResponseFormat(Served):
    class Named(BaseModel):
        schema_: dict[str, Any] = Field(alias="schema")

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: Named | None = None

    def schema(self) -> dict | None:
        if self.type == "json_schema":
            if self.json_schema is None:
                raise ValueError("response_format: json_schema.schema is missing.")
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class Chat(Options):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    tools: Annotated[list[Annotated[Tool, AsGiven]], Field(max_length=TOOLS)] | None = None
    functions: Annotated[list, Field(max_length=0)] | None = None  # how tools were given once
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    # vLLM's
    chat_template_kwargs: dict[str, Any] | None = None  # those of training
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None


@dataclass
class Job:
    """A request as the model is asked it."""

    prompt: str
    new_tokens: int
    sampling: Any
    stops: list[str]
    strip: bool = True  # leave out outer white space
    calls: Any = None  # the form of calls, where the model may call a function
    tools: list[dict] = field(default_factory=list)


def chat_job(model, asked: Chat) -> Job:
    """What a chat request asks of a model.

    Raises:
        ValueError: the model cannot be asked this.
    """
    if not asked.tools and asked.tool_choice not in (None, "none", "auto"):
        raise ValueError("tool_choice: the request has no tools.")
    options = model.form.get("chat", {}).get("template_kwargs", {})
    if options != options | (asked.chat_template_kwargs or {}):
        raise ValueError(
            f"chat_template_kwargs: the model was trained with {json.dumps(options)}. Leave the field out."
        )
    turns = [generation.as_turn(number, dict(message)) for number, message in enumerate(asked.messages, 1)]
    if model.form["prompt"] is not None:
        if asked.tools or len(asked.messages) != 1 or asked.messages[0].role != "user":
            raise ValueError(
                "messages: this model takes one user message and nothing else; it was not trained on chats."
            )
        prompt, calls, tools = model.prompt(*field_texts(model.form, turns[0]["content"])), None, []
    else:
        tools = asked.tools if asked.tools and asked.tool_choice != "none" else []
        if (size := len(json.dumps(tools))) > TOOLS_BYTES:
            raise ValueError(f"tools: they have {size:,} bytes of JSON; at most {TOOLS_BYTES:,} are read.")
        calls = tool_calls.CallForm.of(model) if tools else None
        prompt = model.chat_prompt(model.shortened(turns, tools), tools)
    guidance = _package_guidance(model)
    if tools and _to_tools(model):
        guidance = calls.guidance(model, tools, optional=True)
    if asked.response_format and (schema := asked.response_format.schema()) is not None:
        guidance = tool_calls.json_guidance(schema)
    if tools and asked.tool_choice not in (None, "auto"):
        guidance = calls.guidance(model, _chosen(tools, asked.tool_choice))
    return Job(prompt, *_limits(model, asked, guidance), asked.stops, calls=calls, tools=tools)


def field_texts(form: dict, text: str) -> list[str]:
    """The text for each field of a model's template: for several fields, the values of a JSON object.

    Raises:
        ValueError: there are several fields, and this is no object of theirs.
    """
    fields = form["fields"]
    if form["prompt"] is None or len(fields) == 1:
        return [text]
    try:
        given = json.loads(text)
        return [_field_text(name, given[name]) for name in fields]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
        reason = f"the template has the fields {', '.join(fields)}: give a JSON object with each."
        raise ValueError(reason) from None


def _field_text(name: str, value: object) -> str:
    """The text of a field, which training's rows have as text only; a whole number or a truth value as JSON writes it."""
    if not isinstance(value, str | int):
        raise ValueError(f"the field {name} is {json.dumps(value)[:60]}: give it as a text, as the data has it.")
    return value if isinstance(value, str) else json.dumps(value)


def _chosen(tools: list[dict], choice: str | ToolChoice) -> list[dict]:
    """The tools of which one must be called."""
    if isinstance(choice, str):  # required
        return tools
    chosen = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
    if not chosen:
        raise ValueError(f"tool_choice: no tool is called {choice.function.name!r}.")
    return chosen


def completion_job(model, asked: Completion) -> Job:
    """What a completion request asks of a model: its text is read as it is, without a template."""
    if "\0" in asked.prompt or not asked.prompt:
        raise ValueError("prompt: it is empty or holds a NUL character.")
    return Job(asked.prompt, *_limits(model, asked, _package_guidance(model)), asked.stops, strip=False)


def _to_tools(model) -> bool:
    """Whether `package.constrain` holds answers to the tools of each request."""
    return model.form.get("constrain") == "tools"


def _package_guidance(model) -> tuple[str, str] | None:
    """What `package.constrain` holds every answer to, with tools in the request or without."""
    return None if _to_tools(model) else model.sampling.guidance


def _limits(model, asked: Options, guidance: tuple[str, str] | None) -> tuple[int, Any]:
    """The largest number of new tokens, and how they are chosen."""
    sampling = replace(
        model.sampling,
        temperature=asked.temperature or 0.0,
        top_p=asked.top_p or 1.0,
        seed=asked.seed,
        guidance=guidance,
    )
    return asked.max_completion_tokens or asked.max_tokens or model.form["longest_answer_tokens"], sampling


class Form:
    """How an answer to /v1/completions is written: as one object, or as events."""

    prefix, whole_kind, piece_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, job: Job, stream):
        self.job, self.stream = job, stream
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def usage(self) -> dict:
        prompt, answer = len(self.stream.prompt), len(self.stream.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def choice(self) -> dict:
        return {"text": self.stream.text, "finish_reason": self.stream.finish, "logprobs": None}

    def whole(self) -> dict:
        return {
            **self.head,
            "object": self.whole_kind,
            "choices": [{"index": 0, **self.choice()}],
            "usage": self.usage(),
        }

    def first(self) -> list[dict]:
        """What is sent before the first piece."""
        return []

    def piece(self, text: str) -> list[dict]:
        return [{"text": text, "finish_reason": None, "logprobs": None}]

    def last(self) -> list[dict]:
        """What is sent behind the last piece."""
        return [{"text": "", "finish_reason": self.stream.finish, "logprobs": None}]

    def _event(self, choices: list[dict], **more) -> str:
        return f"data: {json.dumps({**self.head, 'object': self.piece_kind, 'choices': choices, **more})}\n\n"

    async def events(self, pieces: AsyncIterator[str], with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events, each with one choice; the usage last, if it is asked for."""
        self.head |= {"usage": None} if with_usage else {}
        for choice in self.first():
            yield self._event([{"index": 0, **choice}])
        try:
            async with contextlib.aclosing(pieces):
                async for text in pieces:
                    for choice in self.piece(text):
                        yield self._event([{"index": 0, **choice}])
        except ValueError as error:  # the status was sent before
            yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'invalid_request_error'}})}\n\n"
            return
        for choice in self.last():
            yield self._event([{"index": 0, **choice}])
        if with_usage:
            yield self._event([], usage=self.usage())
        yield "data: [DONE]\n\n"


class ChatForm(Form):
    """How an answer to /v1/chat/completions is written. With tools, nothing is sent before the answer is whole: it may be a call."""

    prefix, whole_kind, piece_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def message(self) -> dict:
        """The answer's text, and the calls in it."""
        calls = []
        text = self.stream.text
        if self.job.calls:
            names = [tool["function"]["name"] for tool in self.job.tools]
            text, calls = self.job.calls.read(text, names)
        written = [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for name, arguments in calls
        ]
        return {"content": text or None, "tool_calls": written} if written else {"content": text}

    def choice(self) -> dict:
        message = self.message()
        finish = "tool_calls" if "tool_calls" in message else self.stream.finish
        return {"message": {"role": "assistant", **message}, "finish_reason": finish, "logprobs": None}

    def first(self) -> list[dict]:
        return [self._delta({"role": "assistant", "content": ""})]

    def piece(self, text: str) -> list[dict]:
        return [] if self.job.calls else [self._delta({"content": text})]

    def last(self) -> list[dict]:
        if not self.job.calls:
            return [self._delta({}, self.stream.finish)]
        message = self.message()
        for index, call in enumerate(message.get("tool_calls", [])):
            call["index"] = index
        return [self._delta(message), self._delta({}, "tool_calls" if "tool_calls" in message else self.stream.finish)]

    @staticmethod
    def _delta(delta: dict, finish: str | None = None) -> dict:
        return {"delta": delta, "finish_reason": finish, "logprobs": None}


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """What makes a whole number of an argument on the command line, within bounds."""

    def number(text: str) -> int:
        if not re.fullmatch("[0-9]{1,12}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text}: a whole number from {least} to {most} is expected")
        return int(text)

    return number
