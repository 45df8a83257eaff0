"""Requests of OpenAI's API: what would change an answer and is not served is refused by its name, all else is taken."""

import json
import re
from types import SimpleNamespace

import pytest

from slmake import generation, openai_api, serve

HI = [{"role": "user", "content": "Hi"}]
CALLED = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
OPTIONS = {"enable_thinking": False}


def asked(kind: type[openai_api.Options] = openai_api.Chat, **fields: object) -> openai_api.Options:
    """A request as the server reads it."""
    text = {"messages": HI} if kind is openai_api.Chat else {"prompt": "Hi"}
    return serve.Server.parse(SimpleNamespace(name="tiny"), json.dumps({**text, **fields}).encode(), kind)


def refusal(**fields: object) -> str:
    with pytest.raises(serve.ApiError) as refused:
        asked(**fields)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parallel_tool_calls", False),
        ("function_call", "auto"),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("top_k", 5),
        ("min_p", 0.1),
        ("repetition_penalty", 1.3),
        ("min_tokens", 5),
        ("ignore_eos", True),
        ("guided_json", {"type": "object"}),
        ("guided_choice", ["a"]),
        ("add_generation_prompt", False),
        ("continue_final_message", True),
        ("temprature", 1),
        ("response_format", {"type": "json_object", "schema": {"const": 1}}),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_by_its_name(name, value):
    assert refusal(**{name: value}).startswith(name)
    assert getattr(asked(**{name: None}), name) is None


def test_a_completion_has_no_fields_of_chats():
    assert refusal(kind=openai_api.Completion, chat_template_kwargs={"a": 1}).startswith(
        "chat_template_kwargs: it is not served, and may change the answer. Leave it out."
    )


@pytest.mark.parametrize("kind", [openai_api.Chat, openai_api.Completion])
def test_fields_with_the_value_that_changes_nothing_are_taken(kind):
    said = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "k"}
    same = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "n": 1,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    chats = {"parallel_tool_calls": True, "modalities": ["text"], "verbosity": "medium", "reasoning_effort": None}
    asked(kind, **said, **same, **(chats if kind is openai_api.Chat else {}))


@pytest.mark.parametrize(
    ("own", "taken"),
    [(None, True), ({}, True), (OPTIONS, True), ({"enable_thinking": True}, False), ({"tools_in_user": 1}, False)],
)
@pytest.mark.parametrize("prompt", [None, "{text}"])
def test_options_of_the_chat_template_are_those_of_training(own, taken, prompt):
    asks = SimpleNamespace(
        prompt=lambda text: text, chat_prompt=lambda turns, tools: "Hi", shortened=lambda turns, tools: turns
    )
    form = {"prompt": prompt, "fields": ["text"], "chat": {"template_kwargs": OPTIONS}, "longest_answer_tokens": 1}
    model = SimpleNamespace(**vars(asks), form=form, sampling=generation.Sampling())
    request = asked(chat_template_kwargs=own)
    if taken:
        assert openai_api.chat_job(model, request).prompt == "Hi"
    else:
        with pytest.raises(ValueError, match=re.escape("trained with " + json.dumps(OPTIONS))):
            openai_api.chat_job(model, request)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (
            {"role": "assistant", "content": None, "function_call": CALLED["function"]},
            "messages.1: function_call is not read",
        ),
        ({"role": "assistant", "content": None, "refusal": "I cannot."}, "messages.1: refusal is not read"),
        ({"role": "assistant", "content": None, "audio": {"id": "a"}}, "messages.1: audio is not read"),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "b"},
            "messages.1: reasoning_content is not read",
        ),
        ({"role": "assistant", "content": "a", "prefix": True}, "messages.1: prefix is not read"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages.1: content is missing"),
        ({"role": "user", "content": None}, "messages.1: content is missing"),
        ({"role": "function", "name": "f", "content": "r"}, "messages.1.role: Input should be"),
    ],
)
def test_turns_that_training_did_not_read_are_refused(turn, reason):
    assert refusal(messages=[*HI, turn]).startswith(reason)


def test_an_answer_goes_back_as_the_client_dumps_it():
    nothing = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "reasoning_content": ""}
    turns = [
        {**nothing, "role": "assistant", "content": None, "tool_calls": [CALLED]},
        {**nothing, "role": "assistant", "content": "Hello", "tool_calls": None},
    ]
    call = {**CALLED, "function": {"name": "f", "arguments": {}}}
    assert [generation.as_turn(1, dict(turn)) for turn in asked(messages=turns).messages] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "content": "Hello"},
    ]
