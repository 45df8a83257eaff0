"""Serve an exported model over HTTP, as OpenAI's API: python serve.py (pip install onnxruntime-genai starlette uvicorn pydantic).

`make serve` runs this code, and `package` copies it. The files beside it write the prompts, generate (run.py), and know the API.
Requests that come at once take turns token by token: onnxruntime-genai 0.18 batches only models whose graph was made for it
(docs/architecture.md).
"""

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # this file's own folder: no file of a package may take a module's place

import argparse
import contextlib
import os
import secrets
import socket
import types
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

LOOPBACK = ["127.0.0.1", "localhost"]
KEY = "SLMAKE_API_KEY"  # environment variable: the key that clients must send
BODY_SECONDS = 60  # to send a request in
# Seconds. Many clients keep a connection for 5: if the server closed it first, a request could meet the closing.
KEEP_ALIVE = 75
# The modules' files in a package.
FILES = {"generation": "run.py", **{name: f"{name}.py" for name in ("answer_stream", "tool_calls", "openai_api")}}


def _use_files_beside() -> None:
    """In a package, the modules of slmake are the files beside this one.

    An import would write bytecode into the package, or run bytecode that somebody put there: SHA256SUMS covers the source alone.
    """
    package = sys.modules["slmake"] = types.ModuleType("slmake")
    for name, file in FILES.items():
        module = sys.modules[f"slmake.{name}"] = types.ModuleType(f"slmake.{name}")
        module.__file__ = str(path := Path(__file__).resolve().with_name(file))
        setattr(package, name, module)
        try:
            exec(compile(path.read_bytes(), module.__file__, "exec"), module.__dict__)
        except ImportError as error:
            sys.exit(f"serve.py: error: {error}")


if not __package__:
    _use_files_beside()
from slmake import answer_stream, generation, openai_api  # noqa: E402


class ApiError(Exception):
    """What a client is answered instead: a status, and a message in OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", **headers: str):
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers

    def response(self):
        from starlette.responses import JSONResponse

        error = {"message": str(self), "type": self.kind, "param": None, "code": None}
        return JSONResponse({"error": error}, self.status, headers=self.headers)


class Server:
    """One model for many clients: a bounded number of answers at once, which take turns token by token.

    Args:
        model: a `slmake.generation.Exported`.
        name: what clients call it.
        key: what clients must send as bearer token; None for no key.
        slots: answers that are generated at once; each has a cache.
        waiting: requests that may wait for a slot.
        body: largest size of a request in bytes.
    """

    def __init__(self, model, name: str, key: str | None = None, slots: int = 8, waiting: int = 64, body: int = 2**20):
        import anyio

        self.model, self.name, self.key, self.waiting, self.body = model, name, key, waiting, body
        self.slots = anyio.CapacityLimiter(slots)
        self.turns = anyio.CapacityLimiter(1)  # first come, first served: each answer's next token waits its turn
        self.requests = 0  # in work or waiting

    async def run(self, work: Callable, *arguments):
        """Run what keeps the processor busy in a thread, when it is its turn."""
        import anyio

        return await anyio.to_thread.run_sync(work, *arguments, limiter=self.turns)

    def check_key(self, request) -> None:
        """Refuse a client without the key."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key and not secrets.compare_digest(given.encode(), self.key.encode()):
            raise ApiError(
                401, "the key is missing or wrong: send it as `Authorization: Bearer KEY`.", "authentication_error"
            )

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request until it is answered, and refuse it if too many are counted already.

        The limiters' own counts come too late: a request waits for its turn before it waits for a slot.
        """
        if self.requests >= self.slots.total_tokens + self.waiting:
            message = "too many requests wait already; try again later."
            raise ApiError(429, message, "rate_limit_error", **{"Retry-After": "5"})
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    async def read(self, request) -> bytes:
        """The body of a request.

        Raises:
            ApiError: it is too large, too slow, or not JSON.
        """
        import anyio

        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send the request as Content-Type: application/json.")
        content, size = b"", int(request.headers.get("content-length") or 0)
        try:
            with anyio.fail_after(BODY_SECONDS):
                chunks = request.stream()
                while size <= self.body and (chunk := await anext(chunks, None)) is not None:
                    content += chunk
                    size = max(size, len(content))
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {BODY_SECONDS} s.") from None
        if size > self.body:
            raise ApiError(
                413, f"the request has {size:,} bytes or more; at most {self.body:,} are read.", connection="close"
            )
        return content

    def parse(self, content: bytes, kind: type[openai_api.Options]) -> openai_api.Options:
        """A request of one kind.

        Raises:
            ApiError: a field is missing or has a value that is not served, or the model is another one.
        """
        try:
            asked = kind.model_validate_json(content)
        except openai_api.ValidationError as error:
            reasons = [f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}" for item in error.errors()[:5]]
            raise ApiError(400, "; ".join(reasons) + ".") from None
        if asked.model not in (None, "", self.name):
            raise ApiError(404, f"model: there is no {asked.model!r} here; this server has {self.name!r}.")
        return asked

    def start(self, job: openai_api.Job):
        """The answer to a job, to be iterated over.

        Raises:
            ValueError: it does not fit the model, or no answer can fit its schema.
        """
        ids = self.model.fitting(self.model.encode(job.prompt), job.new_tokens)
        return answer_stream.Stream(self.model, ids, job.new_tokens, job.sampling, job.stops, job.strip)

    def state(self) -> dict:
        return {
            "status": "ok",
            "model": self.name,
            "chat": self.model.form["prompt"] is None,
            "active": self.slots.borrowed_tokens,
            "waiting": self.requests - self.slots.borrowed_tokens,
        }


class Endpoint:
    """The ASGI application of one kind of request.

    Args:
        kind: its fields.
        make: makes a job of them.
        form: writes what clients read.
    """

    def __init__(self, server: Server, kind: type[openai_api.Options], make: Callable, form: type[openai_api.Form]):
        self.server, self.kind, self.make, self.form = server, kind, make, form

    async def __call__(self, scope, receive, send) -> None:
        from starlette.requests import ClientDisconnect, Request

        request, server = Request(scope, receive), self.server
        with contextlib.suppress(ClientDisconnect):
            try:
                server.check_key(request)
                asked = server.parse(await server.read(request), self.kind)
                with server.admitted():
                    job = await server.run(self.make, server.model, asked)
                    async with server.slots:
                        await self.answer(request, asked, job, send)
            except ValueError as error:
                await ApiError(400, str(error)).response()(scope, receive, send)
            except ApiError as error:
                await error.response()(scope, receive, send)

    async def answer(self, request, asked: openai_api.Options, job: openai_api.Job, send) -> None:
        """Generate, and send the answer, in pieces or as a whole."""
        from starlette.responses import JSONResponse, StreamingResponse

        if await request.is_disconnected():
            return
        stream = await self.server.run(self.server.start, job)
        form = self.form(self.server.name, job, stream)
        pieces = self.pieces(request, stream)
        if asked.stream:
            events = form.events(pieces, asked.with_usage)
            response = StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        else:
            async for _ in pieces:
                pass
            response = JSONResponse(form.whole())
        await response(request.scope, request.receive, send)

    async def pieces(self, request, stream) -> AsyncIterator[str]:
        """An answer's text, piece by piece, as long as its client is there."""
        steps: Iterator[str] = iter(stream)
        try:
            while (piece := await self.server.run(next, steps, None)) is not None:
                if await request.is_disconnected():
                    return
                if piece:
                    yield piece
        finally:
            steps.close()


def app(server: Server, hosts: list[str]):
    """The ASGI application.

    Args:
        hosts: names that clients may call this machine; so no page of another site can reach a server on loopback by a name of its own.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    described = {"id": server.name, "object": "model", "created": 0, "owned_by": "slmake"}

    async def page(request):
        return HTMLResponse(
            PAGE, headers={"Content-Security-Policy": "default-src 'none'; connect-src 'self'; " + INLINE}
        )

    async def health(request):
        return JSONResponse(server.state())

    async def models(request):
        server.check_key(request)
        return JSONResponse({"object": "list", "data": [described]})

    async def model(request):
        server.check_key(request)
        if request.path_params["name"] != server.name:
            raise ApiError(404, f"there is no model {request.path_params['name']!r} here, only {server.name!r}.")
        return JSONResponse(described)

    async def refused(request, error):
        return error.response()

    async def not_served(request, error):
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.").response()

    async def failed(request, error):
        return ApiError(500, "the server failed; its terminal says why.", "server_error").response()

    chat = Endpoint(server, openai_api.Chat, openai_api.chat_job, openai_api.ChatForm)
    completion = Endpoint(server, openai_api.Completion, openai_api.completion_job, openai_api.Form)
    return Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={ApiError: refused, HTTPException: not_served, Exception: failed},
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `make serve` and a package's serve.py take."""
    parser.add_argument(
        "--host", default="127.0.0.1", help=f"address to listen on; any but loopback needs {KEY} (default: 127.0.0.1)"
    )
    bounded, add = openai_api.whole_number, parser.add_argument
    add("--port", type=bounded(0, 65535), default=8000, help="port to listen on; 0 for a free one (default: 8000)")
    add("--slots", type=bounded(1, 1024), default=8, help="answers that are generated at once (default: 8)")
    add("--waiting", type=bounded(0, 65536), default=64, help="requests that may wait for a slot (default: 64)")
    add("--body", type=bounded(1, 2**30), default=2**20, help="largest request in bytes (default: 1 MiB)")


def serve(model, name: str, options: argparse.Namespace) -> None:
    """Serve a model until the process is stopped.

    Raises:
        ValueError: the address is open to others and there is no key.
        OSError: the port is taken, or the address is not this machine's.
    """
    import uvicorn

    key = os.environ.get(KEY)
    if options.host not in LOOPBACK and not key:
        raise ValueError(
            f"{options.host} is neither 127.0.0.1 nor localhost: set a key in the environment variable {KEY}."
        )
    hosts = LOOPBACK if options.host in LOOPBACK else ["*"]
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        raise OSError(
            f"cannot listen on port {options.port} of {options.host}: {error.strerror}. Choose another port."
        ) from None
    application = app(Server(model, name, key, options.slots, options.waiting, options.body), hosts)
    print(
        f"serve: {name} on http://{options.host}:{listener.getsockname()[1]}, its API under /v1; stop it with Ctrl-C",
        flush=True,
    )
    config = uvicorn.Config(
        application, log_level="warning", access_log=False, timeout_graceful_shutdown=5, timeout_keep_alive=KEEP_ALIVE
    )
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C, after the answers that were being generated
        uvicorn.Server(config).run(sockets=[listener])


INLINE = "img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Try the model</title>
<link rel="icon" href="data:,">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
#log div { white-space: pre-wrap; overflow-wrap: anywhere; padding: .5rem .8rem; margin: .4rem 0; border-radius: .5rem; background: #f2f2f2 }
#log .user { background: #e3edfb; margin-left: 4rem }
#log .error { background: #fbe3e3 }
textarea, input { font: inherit; width: 100%; box-sizing: border-box; padding: .4rem }
textarea { height: 5rem }
label { display: block; margin: .4rem 0 }
button { font: inherit; padding: .3rem 1rem }
#speed { color: #666; margin-left: 1rem }
</style>
<h1 id="name">Model</h1>
<div id="log" aria-live="polite"></div>
<form id="form">
<textarea id="text" aria-label="Message" placeholder="Message" autofocus></textarea>
<button>Send</button> <button type="button" id="stop" disabled>Stop</button> <button type="button" id="reset">New chat</button>
<span id="speed"></span>
<details><summary>Settings</summary>
<label>System message <input id="system"></label>
<label>Temperature <input id="temperature" type="number" min="0" max="2" step="0.1" value="0"></label>
<label>Largest number of tokens <input id="tokens" type="number" min="1"></label>
<label>JSON Schema of the answer <textarea id="schema"></textarea></label>
<label>Key <input id="key" type="password" autocomplete="off"></label>
</details>
</form>
<script>
const $ = id => document.getElementById(id);
let turns = [], abort = null, alone = false;
fetch("health").then(r => r.json()).then(state => { $("name").textContent = state.model; alone = !state.chat; });
function show(kind, text) {
  const box = document.createElement("div");
  box.className = kind;
  box.textContent = text;
  $("log").append(box);
  return box;
}
function request() {
  const system = $("system").value.trim();
  const body = { messages: [...(system ? [{ role: "system", content: system }] : []), ...turns], stream: true };
  body.temperature = Number($("temperature").value);
  body.stream_options = { include_usage: true };
  if ($("tokens").value) body.max_tokens = Number($("tokens").value);
  if ($("schema").value.trim())
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse($("schema").value) } };
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  abort = new AbortController();
  return fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal: abort.signal });
}
async function* events(response) {
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part; !(part = await reader.read()).done;) {
    const lines = (rest + part.value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}
async function send() {
  turns.push({ role: "user", content: $("text").value });
  const mine = show("user", $("text").value), box = show("assistant", ""), began = performance.now();
  $("text").value = "";
  $("stop").disabled = false;
  try {
    const response = await request();
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      box.textContent += event.choices[0]?.delta.content ?? "";
      const seconds = (performance.now() - began) / 1000;
      if (event.usage) $("speed").textContent = (event.usage.completion_tokens / seconds).toFixed(1) + " tokens/s";
    }
    if (alone) turns = []; else turns.push({ role: "assistant", content: box.textContent });
  } catch (error) {
    turns.pop();
    if (error.name === "AbortError") box.textContent += " (stopped)";
    else { box.className = "error"; box.textContent = error.message; $("text").value = mine.textContent; }
  }
  $("stop").disabled = true;
}
$("form").onsubmit = event => { event.preventDefault(); if ($("stop").disabled && $("text").value.trim()) send(); };
$("text").onkeydown = event => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("form").requestSubmit(); } };
$("stop").onclick = () => abort.abort();
$("reset").onclick = () => { turns = []; $("log").replaceChildren(); };
</script>
</html>
"""


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(
        prog="serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    options = parser.parse_args()
    try:
        model = generation.Exported(here, generation.read(here / "prompt.json", generation.as_form))
        name = generation.read(here / "inference_model.json", lambda model: model["Name"])
        serve(model, name, options)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"serve.py: error: {error}")


if __name__ == "__main__":
    main()
