"""Requests that would cost a server too much, or are not of the API's form: each is refused, and the next one is answered."""

import argparse
import asyncio
import contextlib
import re
from collections import Counter

import httpx2
import pytest
from served import CHAT, WEATHER, export

from slmake import generation, serve, tool_calls
from slmake.answer_stream import Stream

HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory, base) -> generation.Exported:
    return generation.Exported(export(base, tmp_path_factory.mktemp("limits") / "onnx"), CHAT)


def post(server: serve.Server, *requests: dict) -> list[httpx2.Response]:
    """The answers to requests that come at once."""

    async def send() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(serve.app(server, ["*"]), raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            return await asyncio.gather(
                *(client.post("/v1/chat/completions", json=request, timeout=60) for request in requests)
            )

    return asyncio.run(send())


def state(server: serve.Server) -> tuple[int, int]:
    return server.state()["active"], server.state()["waiting"]


def test_no_more_requests_wait_than_may(model):
    server = serve.Server(model, "tiny", slots=1, waiting=2)
    answers = post(server, *[HI] * 8)
    assert Counter(answer.status_code for answer in answers) == {200: 3, 429: 5}
    assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 429} == {"5"}
    assert state(server) == (0, 0)
    refused = HI | {"messages": [{"role": "user", "content": "word " * 600}]}  # after it was counted
    assert [answer.status_code for answer in post(server, refused, refused, refused)] == [400] * 3
    assert state(server) == (0, 0)
    assert [answer.status_code for answer in post(server, HI, HI, HI)] == [200] * 3


def test_health_counts_the_requests_in_work_and_those_that_wait(model):
    server = serve.Server(model, "tiny", slots=1, waiting=2)

    async def count() -> tuple[int, int]:
        async with server.slots:
            return state(server)

    with server.admitted(), server.admitted():
        assert state(server) == (0, 2)
        assert asyncio.run(count()) == (1, 1)


@pytest.mark.parametrize(
    ("stop", "status"),
    [
        ("x" * 256, 200),
        (["x" * 256] * 4, 200),
        ("x" * 257, 400),
        (["x", "x" * 257], 400),
        (["x"] * 5, 400),
    ],
)
def test_stop_texts_are_few_and_short(model, stop, status):
    (answer,) = post(serve.Server(model, "tiny"), HI | {"stop": stop})
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["message"].startswith("stop.")


def test_a_stop_text_longer_than_the_answer_is_compared_as_far_as_the_answer_goes(model):
    sizes = []

    class Text(str):
        def __getitem__(self, part: slice) -> str:
            sizes.append(part.stop)
            return super().__getitem__(part)

    stream = Stream(model, model.encode("Hi"), 8, stop=[Text("\0" * 100_000)])
    assert "".join(stream) == stream.text
    assert max(sizes) <= len(model.text(stream.tokens))


def called(arguments: str) -> dict:
    """A request whose messages have the call of a function."""
    call = {"id": "call1", "function": {"name": "weather", "arguments": arguments}}
    turns = [*HI["messages"], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "12"}]
    return HI | {"messages": turns}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": "weather"}}, "tool_choice."),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice."),
        (called("[" * 100_000), "message 2 has a call without a name, or with arguments that are no JSON object."),
        (
            called("[" * 100_000 + "]" * 100_000),
            "message 2 has a call without a name, or with arguments that are no JSON object.",
        ),
        ({"max_completion_tokens": 0}, "max_completion_tokens: "),
        ({"response_format": "text"}, "response_format: "),
    ],
    ids=range(6),
)
def test_fields_of_another_form_are_refused(model, fields, reason):
    (answer,) = post(serve.Server(model, "tiny"), HI | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"].startswith(reason)


def test_arguments_that_can_be_read_but_not_written_are_refused(model):
    turn = None
    for depth in range(1000, 0, -1):  # the deepest that can be read
        with contextlib.suppress(ValueError):
            turn = generation.as_turn(1, called('{"a":' * depth + "1" + "}" * depth)["messages"][1])
            break
    with pytest.raises(ValueError, match=re.escape("the arguments of a call are nested too deeply.")):
        model.chat_prompt([turn])


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"max_completion_tokens": None, "max_tokens": 10}, 10),
        ({"max_completion_tokens": 3, "max_tokens": 10}, 3),
        ({"max_completion_tokens": None, "max_tokens": None}, 12),
        ({"response_format": None}, 2),
        (called('{"a": ' * 20 + "1" + "}" * 20), 2),
    ],
    ids=range(5),
)
def test_fields_that_are_null_have_their_default(model, fields, tokens):
    (answer,) = post(serve.Server(model, "tiny"), HI | fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == tokens


def test_an_answer_of_nested_braces_is_text():
    form = tool_calls.CallForm("<tool_call>", "</tool_call>", "name", "arguments")
    text = "<tool_call>" + '{"name":' * 100_000
    assert form.read(text, ["weather"]) == (text, [])


def test_the_six_characters_of_an_escape_are_no_nul(model):
    assert r"say \u0000" in model.chat_prompt([{"role": "user", "content": r"say \u0000"}])
    call = {"function": {"name": "weather", "arguments": {"a\0": 1}}}
    for turn in ({"role": "user", "content": "a\0"}, {"role": "assistant", "content": "", "tool_calls": [call]}):
        with pytest.raises(ValueError, match="NUL character"):
            model.chat_prompt([turn])


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "65536"),
        ("--port=-1",),
        ("--slots", "0"),
        ("--slots=-3",),
        ("--waiting=-9",),
        ("--body", "0"),
        ("--body", "1e9"),
    ],
)
def test_numbers_out_of_bounds_are_refused(arguments, capsys):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(arguments)
    assert stopped.value.code == 2
    name = arguments[0].partition("=")[0]
    assert re.search(
        rf"error: argument {name}: .*: a whole number from \d+ to \d+ is expected", capsys.readouterr().err
    )
