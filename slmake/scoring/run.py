"""What one model answered, what it cost in time and memory, and what every runner has in common."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from slmake import cli
from slmake.errors import UserError
from slmake.machine_errors import is_of_machine
from slmake.scoring.questions import Questions

WARM_UP = 3


@dataclass
class Run:
    """One model's answers to the questions.

    Attributes:
        texts: generated text of every prompt.
        choices: index of the most likely label of every prompt; empty for open text.
        answer_nll: negative log likelihood in nats of every expected answer (all its tokens).
        logits: one float32 array [positions, vocabulary] per prompt that parity compares (`Questions.positions`).
        timings: seconds, milliseconds, tokens per second and bytes, for benchmark.json.
        sampled: sampled texts [n][scored rows], where `evaluate.sampling` asks for them.
        margins: float64 [prompts], how much lower the second-best token (in logits) or label (in log probability) is, the
            least of the answer's steps; infinite where it is not measured.
    """

    texts: list[str]
    choices: list[int]
    answer_nll: np.ndarray
    logits: list[np.ndarray]
    timings: dict = field(default_factory=dict)
    sampled: list[list[str]] = field(default_factory=list)
    margins: np.ndarray = field(default_factory=lambda: np.zeros(0))


class Runner(Protocol):
    """A model on the runtime that it ships on."""

    def ask(self, questions: Questions, new_tokens: int, job: cli.Job, name: str) -> Run:
        """Greedy answers, label choices, answer likelihoods and logits for all questions.

        Args:
            new_tokens: the largest number of tokens of an answer.
            name: the model's name on the progress bar.
        """
        ...


def empty_run(questions: Questions) -> Run:
    count = len(questions.prompts)
    choices = [-1] * count if questions.label_tokens else []
    return Run([""] * count, choices, np.zeros(count), [None] * questions.compared, margins=np.full(count, np.inf))


def reset_peak() -> None:
    """Reset the process's peak memory (Linux only; elsewhere the peak is that of the whole run)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Largest resident memory of this process since `reset_peak`, in bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def percentiles(milliseconds: list[float]) -> dict:
    """Latency p50, p95 and p99 in milliseconds."""
    p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99])
    return {"latency_ms_p50": p50, "latency_ms_p95": p95, "latency_ms_p99": p99}


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn a library's error about a damaged model into one that names the folder and the next command.

    Raises:
        UserError: the folder cannot be loaded.
    """
    try:
        yield
    except Exception as error:
        if is_of_machine(error) or getattr(error, "errno", None):
            raise
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{folder} cannot be loaded: {type(error).__name__}: {reason[0] if reason else 'no message'} "
            "Remove the folder and run snakemake: it is built again."
        ) from error
