"""The server, asked by OpenAI's own client: answers, streams, limits, errors, and clients that go away."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
from served import CHAT, CLOCK, TEXT, WEATHER, export, serving, wait_until

from slmake import generation, serve
from tools import serve as tool

HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"tone": {"enum": ["joy", "fear"]}},
    "required": ["tone"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory, base) -> generation.Exported:
    return generation.Exported(export(base, tmp_path_factory.mktemp("serve") / "onnx"), CHAT)


@pytest.fixture(scope="module")
def served(model):
    with serving(model) as (url, server):
        yield url, server


def connect(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return connect(served[0])


def chat(client: openai.OpenAI, **fields: object):
    return client.chat.completions.create(**{"model": "tiny", "messages": HI, **fields})


def post(url: str, content: bytes, kind: str = "application/json", **headers: str) -> tuple[int, dict]:
    """Status and JSON of a request that OpenAI's client would not send."""
    asked = urllib.request.Request(f"{url}/v1/chat/completions", content, {"Content-Type": kind, **headers})
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_an_answer_is_that_of_the_function_that_is_scored(client, model):
    answer = chat(client)
    prompt = model.chat_prompt(HI)
    assert answer.choices[0].message.content == model.answer("Hi")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(model.encode(prompt))
    assert (answer.usage.completion_tokens, answer.model, answer.object) == (12, "tiny", "chat.completion")


def test_a_stream_is_the_same_answer_in_pieces(client):
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"const": "We danced in the rain, wir ziehen um"}},
    }
    fields = {"temperature": 1.2, "top_p": 0.9, "seed": 3, "max_tokens": 100, "response_format": form}
    whole = chat(client, **fields)
    events = list(chat(client, stream=True, stream_options={"include_usage": True}, **fields))
    pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(pieces) == whole.choices[0].message.content == '"We danced in the rain, wir ziehen um"'
    assert sum(map(bool, pieces)) > 10
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert events[-1].usage == whole.usage
    assert len({event.id for event in events}) == 1
    assert not any(event.usage for event in events[:-1])
    assert not any(event.usage for event in chat(client, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_the_tokenizer_cannot_write_is_refused(client, stream):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "größer, 你好"}}}
    with pytest.raises(openai.APIError, match="a character that the model's tokenizer writes in several tokens"):
        list(chat(client, response_format=form, max_tokens=40, stream=stream))


def test_a_stop_string_ends_an_answer(client):
    fields = {"temperature": 1.2, "seed": 3, "max_tokens": 30}
    text = chat(client, **fields).choices[0].message.content
    stop = text[5:8]
    for given in (stop, ["never", stop]):
        choice = chat(client, stop=given, **fields).choices[0]
        assert (choice.message.content, choice.finish_reason) == (text[: text.index(stop)].rstrip(), "stop")


def test_completions_read_the_text_as_it_is(client, model):
    answer = client.completions.create(model="tiny", prompt="### Text: a", max_tokens=5)
    tokens = model.generate(model.encode("### Text: a"), 5)
    assert answer.choices[0].text == model.text(tokens), "white space included: it goes on with the text"
    assert answer.usage.prompt_tokens == len(model.encode("### Text: a"))
    events = client.completions.create(model="tiny", prompt="### Text: a", max_tokens=5, stream=True)
    assert "".join(event.choices[0].text for event in events) == answer.choices[0].text


@pytest.mark.parametrize("seed", [1, 2])
def test_a_schema_holds_a_random_model(client, seed):
    form = {"type": "json_schema", "json_schema": {"name": "tone", "schema": SCHEMA, "strict": True}}
    answer = chat(client, response_format=form, max_tokens=40, temperature=1.0, seed=seed).choices[0]
    assert json.loads(answer.message.content)["tone"] in ("joy", "fear")
    assert answer.finish_reason == "stop"
    anything = chat(client, response_format={"type": "json_object"}, max_tokens=2, temperature=1.0, seed=seed).choices[
        0
    ]
    assert anything.message.content.startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_tool_is_called_with_arguments_that_fit(client, choice):
    fields = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 80, "temperature": 1.0, "seed": 5}
    answer = chat(client, **fields).choices[0]
    (call,) = answer.message.tool_calls
    assert (answer.finish_reason, answer.message.content, call.function.name) == ("tool_calls", None, "weather")
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Rome", "Oslo")
    assert 1 <= arguments["days"] <= 7
    deltas = [event.choices[0] for event in chat(client, stream=True, **fields)]
    (streamed,) = [call for choice in deltas for call in choice.delta.tool_calls or []]
    assert json.loads(streamed.function.arguments) == arguments
    assert deltas[-1].finish_reason == "tool_calls"
    turns = [
        *HI,
        answer.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "12"},
    ]
    assert chat(client, messages=turns, tools=[WEATHER, CLOCK]).choices[0].finish_reason == "length"


def test_free_answers_with_tools_stay_text(client, model):
    plain = chat(client, tools=[WEATHER], tool_choice="none").choices[0].message
    assert plain.content == model.answer("Hi")
    free = chat(client, tools=[WEATHER]).choices[0].message
    asked = model.encode(model.chat_prompt(HI, [WEATHER]))
    assert (free.content, free.tool_calls) == (model.decode(model.generate(asked, 12)), None)


def test_the_model_is_listed(client):
    assert [entry.id for entry in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "slmake"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here, only 'tiny'"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "boss", "content": "Hi"}]}, "messages.0.role: Input should be 'system'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
        ),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "NUL character"),
        ({"n": 2}, "n: Input should be 1"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"frequency_penalty": 1}, "frequency_penalty: Input should be 0"),
        ({"logit_bias": {"5": 10}}, "logit_bias: Dictionary should have at most 0 items"),
        ({"top_logprobs": 2}, "top_logprobs: Input should be 0"),
        ({"functions": [{"name": "weather"}]}, "functions: List should have at most 0 items"),
        ({"tool_choice": "required"}, "tool_choice: the request has no tools"),
        ({"tools": [WEATHER] * 129}, "tools: List should have at most 128 items"),
        (
            {"tools": [{**WEATHER, "function": {"name": "f", "description": "x" * 17000}}]},
            "bytes of JSON; at most 16,384 are read",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"anyOf": [{"type": "array", "minItems": 10**9}]}},
                }
            },
            "minItems is 1000000000; at most 1000 can be followed",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "^a{100000000}$"}},
                }
            },
            "answers cannot be held to this",
        ),
        ({"max_tokens": 600}, "tokens with the template, and 600 for the answer; the model reads 512"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "the text is too long: "),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
            "answers cannot be held to this json_schema: Invalid type: no",
        ),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "no tool is called 'f'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "message 1 has a call without a name, or with arguments that are no JSON object.",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_refused_with_the_reason(client, fields, reason, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, stream=stream, **fields)
    assert reason in refused.value.body["message"]
    assert refused.value.body["type"] == "invalid_request_error"


def test_another_model_is_refused(client):
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt-4' here; this server has 'tiny'"):
        chat(client, model="gpt-4")


def test_requests_that_are_none_are_refused(served):
    url, _ = served
    assert post(url, b"{not json")[0] == 400
    assert "Invalid JSON" in post(url, b"{not json")[1]["error"]["message"]
    assert post(url, b"[]")[0] == 400
    assert post(url, json.dumps({"messages": HI}).encode(), "text/plain")[0] == 415  # what a page elsewhere may send
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(f"{url}/health", headers={"Host": "evil.example"}))
    for path, status in (("/v1/chat/completions", 405), ("/nowhere", 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url + path)
        assert refused.value.code == status
        assert path in json.load(refused.value)["error"]["message"]


def test_a_request_of_100_mb_is_refused_unread(served):
    """By its length, or while it is read where none is given."""
    url, _ = served
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: 100000000\r\n\r\n".encode())
        answer = connection.makefile("rb").read().decode()  # until the server closes the connection
    assert answer.startswith("HTTP/1.1 413 ")
    assert "the request has 100,000,000 bytes or more; at most 1,048,576 are read" in answer
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):  # it does not read on
            for _ in range(1600):
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        assert connection.recv(65536).decode().startswith("HTTP/1.1 413 ")
    assert chat(connect(url)).choices[0].finish_reason == "length"


def test_a_key_is_asked_for(model):
    with serving(model, key="secret") as (url, _):
        assert chat(connect(url, "secret")).choices[0].finish_reason == "length"
        for call in (chat, lambda client: client.models.list()):
            with pytest.raises(openai.AuthenticationError, match="the key is missing or wrong"):
                call(connect(url, "other"))
        assert json.load(urllib.request.urlopen(f"{url}/health"))["status"] == "ok"


def test_requests_at_once_take_turns(model):
    """A short answer does not wait for the end of a long one that came before it, and each gets its own."""
    with serving(model, slots=4) as (url, server):
        client, ends = connect(url), {}

        def ask(name: str, **fields: object) -> None:
            answer = chat(client, **fields).choices[0].message.content
            ends[name] = (time.monotonic(), answer)

        threads = [threading.Thread(target=ask, args=("long",), kwargs={"max_tokens": 450})]
        threads[0].start()
        wait_until(lambda: server.state()["active"])
        threads += [
            threading.Thread(target=ask, args=(seed,), kwargs={"max_tokens": 10, "temperature": 1.0, "seed": seed})
            for seed in range(3)
        ]
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert max(ends[seed][0] for seed in range(3)) < ends["long"][0]
        for seed in range(3):
            assert ends[seed][1] == chat(client, max_tokens=10, temperature=1.0, seed=seed).choices[0].message.content


def slow_steps(monkeypatch, made: list[int]) -> None:
    """Let every token take ten milliseconds more, and collect them."""
    steps = generation.Exported.steps

    def counted(self, *arguments, **options):
        for token in steps(self, *arguments, **options):
            made.append(token)
            time.sleep(0.01)
            yield token

    monkeypatch.setattr(generation.Exported, "steps", counted)


def test_too_many_requests_are_refused_and_none_is_lost(model, monkeypatch):
    slow_steps(monkeypatch, [])
    with serving(model, slots=1, waiting=1) as (url, server):
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(chat(connect(url), max_tokens=200))) for _ in range(2)
        ]
        threads[0].start()
        wait_until(lambda: server.state()["active"])
        threads[1].start()
        wait_until(lambda: server.state()["waiting"])
        with pytest.raises(openai.RateLimitError, match="too many requests wait already") as refused:
            chat(connect(url))
        assert refused.value.response.headers["retry-after"] == "5"
        for thread in threads:
            thread.join(60)
        assert [answer.usage.completion_tokens for answer in answers] == [200, 200]
        wait_until(lambda: not server.state()["active"] and not server.state()["waiting"])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_work(model, monkeypatch, stream):
    made: list[int] = []
    slow_steps(monkeypatch, made)
    with serving(model, slots=1) as (url, server):
        if stream:
            events = chat(connect(url), max_tokens=400, stream=True)
            next(iter(events))
            events.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                chat(connect(url), max_tokens=400, timeout=0.5)
        wait_until(lambda: not server.state()["active"])
        assert len(made) < 300
        count = len(made)
        time.sleep(0.2)
        assert len(made) == count
        assert chat(connect(url), max_tokens=5).usage.completion_tokens == 5


def test_a_model_of_texts_takes_one_user_message(model):
    text = generation.Exported(model.folder, TEXT)
    with serving(text, "tone") as (url, _):
        client = connect(url)
        answer = chat(
            client, model="tone", messages=[{"role": "user", "content": [{"type": "text", "text": "We danced"}]}]
        )
        assert answer.choices[0].message.content == text.answer("We danced")
        for turns in (
            [{"role": "system", "content": "Be kind"}, *HI],
            [*HI, *HI],
            [{"role": "assistant", "content": "a"}],
        ):
            with pytest.raises(openai.BadRequestError, match="takes one user message and nothing else"):
                chat(client, model="tone", messages=turns)
        with pytest.raises(openai.BadRequestError, match="takes one user message and nothing else"):
            chat(client, model="tone", tools=[WEATHER])
        assert json.load(urllib.request.urlopen(f"{url}/health"))["chat"] is False


def test_the_constraint_of_the_package_holds_unless_a_request_has_its_own(model):
    held = generation.Exported(model.folder, {**CHAT, "guidance": {"kind": "regex", "data": "yes|no"}})
    with serving(held) as (url, _):
        client = connect(url)
        assert chat(client).choices[0].message.content in ("yes", "no")
        form = {"type": "json_schema", "json_schema": {"name": "tone", "schema": SCHEMA}}
        assert "tone" in json.loads(chat(client, response_format=form, max_tokens=40).choices[0].message.content)


def options(**changes: object) -> list[str]:
    """Arguments of `make serve`, with a port that is free unless `port` is given."""
    return [f"--{name}={value}" for name, value in {"port": 0, **changes}.items()]


def test_an_open_address_needs_a_key(model, dataset, refused, monkeypatch):
    monkeypatch.delenv(serve.KEY, raising=False)
    message = refused(tool.main, [f"--model={model.folder}", f"--dataset={dataset}", *options(host="0.0.0.0")])
    assert message == (
        "serve: error: 0.0.0.0 is neither 127.0.0.1 nor localhost: set a key in the environment variable SLMAKE_API_KEY."
    )


def test_a_port_that_is_taken_is_named(model, dataset, refused, served):
    port = served[0].rpartition(":")[2]
    message = refused(tool.main, [f"--model={model.folder}", f"--dataset={dataset}", *options(port=port)])
    assert message.startswith(f"serve: error: cannot listen on port {port} of 127.0.0.1: Address already in use")


def test_without_its_packages_the_command_is_named(model, dataset, refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    message = refused(tool.main, [f"--model={model.folder}", f"--dataset={dataset}", *options()])
    assert message == "serve: error: uvicorn is not installed. Run `make serve`."
