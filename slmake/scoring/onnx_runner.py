"""Ask an exported model through onnxruntime-genai."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from slmake import cli
from slmake.errors import RELINK, UserError, first_line
from slmake.generation import Exported, Sampling
from slmake.machine_errors import is_of_machine
from slmake.scoring.metrics import log_softmax
from slmake.scoring.questions import Questions
from slmake.scoring.run import WARM_UP, Run, empty_run, peak_bytes, percentiles, reset_peak


def load(folder: Path, form: dict | None = None) -> Exported:
    """The exported model in `folder`.

    Raises:
        UserError: it is not there, or ONNX Runtime cannot load it.
    """
    if not (folder / "genai_config.json").exists():
        raise UserError(f"{folder}: no exported model. Build it with `make` or `snakemake --cores all`.")
    try:
        return Exported(folder, form)
    except Exception as error:
        if is_of_machine(error):
            raise
        linked = any(path.is_symlink() for path in folder.iterdir())
        again = RELINK if linked else "Build it again: remove the folder and run snakemake."
        raise UserError(f"{folder}: ONNX Runtime cannot load this model: {first_line(error)}. {again}") from error


class OnnxRunner:
    """An exported model, asked with text, one row at a time, as a user asks it.

    The clock runs from the prompt's tokens to the end of the answer; label and likelihood scores are computed after it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.model: Exported | None = None

    def ask(self, questions: Questions, new_tokens: int, job: cli.Job, name: str) -> Run:
        """See `Runner`."""
        reset_peak()
        began = time.monotonic()
        self.model = load(self.folder, questions.form)
        loaded = time.monotonic()
        run = empty_run(questions)
        prompts = [questions.runtime_prompt(self.model, i) for i in range(len(questions.prompts))]
        for prompt in prompts[:WARM_UP]:
            self.model.generate(prompt, new_tokens)
        waits, prefill, generated, room = [], 0.0, 0, max(map(len, questions.label_tokens or [[]]))
        with job.progress(len(prompts), f"rows of {name}") as bar:
            for i, prompt in enumerate(prompts):
                row = OnnxRow(self.model, prompt, max(new_tokens, room, len(questions.answers[i])))
                tokens = self.model.generate(prompt, new_tokens, row.look, row.room)
                waits.append(row.elapsed())
                prefill += row.prefill
                generated += len(tokens)
                run.texts[i] = self.model.decode(tokens)
                _score(questions, i, row, tokens, run)
                bar.update(1)
        total = sum(waits)
        run.timings = percentiles([1000 * wait for wait in waits]) | {
            "load_s": loaded - began,
            "score_s": total,
            "generated_tokens_per_s": generated / total,
            "prefill_tokens_per_s": sum(map(len, prompts)) / prefill,
            "decode_tokens_per_s": generated / max(total - prefill, 1e-9),
            "peak_memory_bytes": peak_bytes(),
        }
        return run


def _score(questions: Questions, i: int, row: "OnnxRow", tokens: list[int], run: Run) -> None:
    """Add a row's likelihood of the expected answer, its logits for parity, and its most likely label, to `run`."""
    logits = row.logits(questions.answers[i], tokens)
    best = log_probability(logits, questions.answers[i])
    run.answer_nll[i] = -best
    if i < questions.compared:
        run.logits[i] = np.stack([logits[k] for k in questions.positions(i)]).astype(np.float32)
    if not questions.label_tokens:
        return
    labels = questions.form["labels"]
    expected = choice = labels.index(questions.expected[i])
    first = log_softmax(row.steps[0])
    bounds = sorted(((first[ids[0]], k) for k, ids in enumerate(questions.label_tokens)), reverse=True)
    for bound, k in bounds:
        if bound <= best:  # no answer is more likely than its first token
            break
        if k != expected:
            value = row.score(questions.label_tokens[k], tokens)
            if value > best:
                best, choice = value, k
    run.choices[i] = choice


class OnnxRow:
    """One row's generator: logits of the steps taken and of other answers, and time.

    Args:
        prompt: token ids.
        room: tokens of the longest answer.
    """

    def __init__(self, model: Exported, prompt: Sequence[int], room: int):
        self.model, self.prompt, self.room = model, prompt, room
        self.steps: list[np.ndarray] = []
        self.prefill = 0.0
        self.start = time.perf_counter()

    def look(self, generator) -> None:
        self.generator = generator
        if not self.steps:
            self.prefill = time.perf_counter() - self.start
        self.steps.append(np.array(generator.get_logits()).reshape(-1))

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def score(self, answer: list[int], generated: list[int]) -> float:
        """Log probability of an answer's tokens behind the prompt."""
        return log_probability(self.logits(answer, generated), answer)

    def logits(self, answer: list[int], generated: list[int]) -> list[np.ndarray]:
        """Logits [vocabulary] for each token of an answer behind the prompt."""
        # Where generation took the same steps, its logits are there, the end token's included (which is not in `generated`).
        if generated[: len(answer) - 1] == answer[:-1] and len(self.steps) >= len(answer):
            return self.steps[: len(answer)]
        # Token by token, as generation does it: an export may give the last position's logits only.
        logits = self.steps[:1]
        again = partial(self.model.generator, self.prompt, self.room, Sampling())
        self.generator = rewound(self.generator, len(self.prompt), again)
        for token in answer[:-1]:
            self.generator.append_tokens(np.array([token], dtype=np.int32))
            logits.append(np.array(self.generator.get_logits()).reshape(-1))
        return logits


def rewound(generator, tokens: int, again: Callable):
    """An `onnxruntime_genai.Generator` that has read its first `tokens` only.

    Args:
        again: makes another one that has read them, where the runtime cannot take back what was read: it cannot for layers of
            convolutions (LFM2), nor for a prompt that is longer than a sliding window.
    """
    try:
        generator.rewind_to(tokens)
    except RuntimeError:
        return again()
    return generator


def log_probability(logits: list[np.ndarray], answer: list[int]) -> float:
    """Log probability of an answer's tokens, by the logits [vocabulary] for each of them."""
    return float(sum(log_softmax(step)[token] for step, token in zip(logits, answer, strict=True)))
