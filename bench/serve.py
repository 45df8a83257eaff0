"""The server under load: 1, 8 and 32 clients of OpenAI's API, each of which asks again as soon as it has its answer.

A round asks with every number of clients for the same time; ratios are of one round. Prompts are those of the test split. Every answer must be
the one that the same prompt got from a single client, so nothing is lost or mixed up. Memory is that of the server's process.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench import measure
from bench.measure import ROOT, BenchError
from bench.results import bar, ratios

CLIENTS, PROMPTS = (1, 8, 32), 16


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--serve-seconds", type=float, default=120, help="serve: seconds of all rounds, for each number of clients"
    )


@contextlib.contextmanager
def serving(model: Path, dataset: Path) -> Iterator[tuple[str, int]]:
    """A server's address and process number.

    Raises:
        BenchError: it does not start.
    """
    command = [sys.executable, "-m", "tools.serve", "--port=0", f"--model={model}", f"--dataset={dataset}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            if " on http" not in line:
                raise BenchError("the server does not start: its message is above. Run `make serve` once.")
            yield line.split(" on ")[1].split(",")[0], process.pid
        finally:
            process.terminate()


def resident(process: int) -> int:
    """Resident memory of a process in bytes (Linux)."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Load:
    """Clients of one server, and what they were answered.

    Args:
        texts: what they ask, one after the other.
    """

    def __init__(self, url: str, texts: list[str]):
        import openai

        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self.model = self.client.models.list().data[0].id
        self.texts, self.expected = texts, {text: self.ask(text)[0] for text in texts}

    def ask(self, text: str) -> tuple[str, int]:
        """An answer, and its number of tokens."""
        answer = self.client.chat.completions.create(model=self.model, messages=[{"role": "user", "content": text}])
        return answer.choices[0].message.content, answer.usage.completion_tokens

    def run(self, clients: int, seconds: float) -> dict:
        """Answers a second, tokens a second, and latency in milliseconds of so many clients.

        Raises:
            BenchError: an answer was lost, or was another one.
        """
        waits, tokens, problems = [], [], []
        end = time.monotonic() + seconds

        def client(number: int) -> None:
            for text in itertools.islice(itertools.cycle(self.texts), number, None):
                if time.monotonic() >= end:
                    return
                began = time.perf_counter()
                try:
                    answer, count = self.ask(text)
                except Exception as error:
                    problems.append(f"{type(error).__name__}: {error}")
                    return
                waits.append(1000 * (time.perf_counter() - began))
                tokens.append(count)
                if answer != self.expected[text]:
                    problems.append(f"{text!r} was answered {answer!r}, not {self.expected[text]!r}")

        began = time.perf_counter()
        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
        if problems:
            raise BenchError(f"{clients} clients: {len(problems)} answers lost or wrong; the first: {problems[0]}")
        return {
            "answers": len(waits),
            "answers_per_s": len(waits) / took,
            "tokens_per_s": sum(tokens) / took,
            "p50_ms": statistics.median(waits),
            "p95_ms": statistics.quantiles(waits, n=20)[-1] if len(waits) > 1 else waits[0],
        }


def bench(args: argparse.Namespace) -> dict:
    import pyarrow.parquet

    model, dataset = measure.need(ROOT / "build" / "onnx-int4"), measure.need(ROOT / "build" / "dataset")
    from slmake.prompts import load_prompt

    before, after = load_prompt(dataset)["prompt"].split("{phrase}")
    prompts = pyarrow.parquet.read_table(dataset / "test.parquet", columns=["prompt"])["prompt"].to_pylist()
    texts = [prompt.removeprefix(before).removesuffix(after) for prompt in prompts[:PROMPTS]]
    with serving(model, dataset) as (url, process):
        load = Load(url, texts)
        memory = []

        def contender(clients: int):
            def run(_: int) -> dict:
                result = load.run(clients, args.serve_seconds / args.rounds)
                memory.append(resident(process))
                return result

            return run

        runs = measure.interleaved(args.rounds, **{f"{count} clients": contender(count) for count in CLIENTS})
    rates = {name: [run["answers_per_s"] for run in samples] for name, samples in runs.items()}
    alone = rates["1 clients"]
    bars = [
        *(bar(f"serve: answers a second, {name} over one", ratios(rates[name], alone)) for name in list(rates)[1:]),
        bar(
            "serve: memory at the end over that after the first round",
            [memory[-1] / memory[len(CLIENTS) - 1]],
            at_most=1.1,
        ),
    ]
    rows = [["clients", "answers", "answers a second", "tokens a second", "p50 ms", "p95 ms"]]
    for name, samples in runs.items():
        middle = {key: statistics.median(run[key] for run in samples) for key in samples[0]}
        total = sum(run["answers"] for run in samples)
        figures = (middle[key] for key in ("answers_per_s", "tokens_per_s", "p50_ms", "p95_ms"))
        rows.append([name.split()[0], f"{total:,}", *(f"{value:,.1f}" for value in figures)])
    notes = [
        f"No answer was lost or wrong. The server's memory after each run: {', '.join(f'{size / 1e6:,.0f}' for size in memory)} MB.",
    ]
    return {"bars": bars, "tables": [rows], "notes": notes, "runs": runs}
