"""A tiny exported model of chats with tools, and a server for it in this process."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from slmake import generation, params, serve
from slmake.export import builder

# As Hermes and Qwen write tools and calls.
TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHAT = {"prompt": None, "answer": None, "fields": [], "labels": None, "end_token": "<|end|>", "end_token_id": 0}
CHAT |= {"longest_answer_tokens": 12, "chat": {"template_kwargs": {}, "date": "2024-01-01", "answer_prefix": ""}}
TEXT = {**CHAT, "prompt": "### Text: {phrase}\n### The tone is:\n", "fields": ["phrase"], "longest_answer_tokens": 3}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city, größer als nichts.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def export(base: Path, folder: Path, template: str = TEMPLATE) -> Path:
    """A tiny model as ONNX in float32, with a chat template."""
    folder.mkdir(parents=True)
    section = params.Quantize(precision="fp32", algo_config="rtn", matmul_mixed_precision=None)
    builder.export(section, base, folder, folder.parent / "cache")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@contextlib.contextmanager
def serving(model: generation.Exported, name: str = "tiny", **options: object) -> Iterator[tuple[str, serve.Server]]:
    """A server for a model on a free port of loopback: its address, and what it is made of."""
    import uvicorn

    server = serve.Server(model, name, **options)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(serve.app(server, serve.LOOPBACK), log_level="critical", timeout_graceful_shutdown=1)
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: web.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        web.should_exit = True
        thread.join(30)
        listener.close()


def wait_until(condition, seconds: float = 60) -> None:
    """Wait for a condition.

    Raises:
        AssertionError: it does not hold in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
