"""Ask an exported model through onnxruntime-genai."""

import time
from pathlib import Path

import numpy as np

from slmake import cli, generation
from slmake.scoring.metrics import log_softmax
from slmake.scoring.questions import Questions
from slmake.scoring.run import WARM_UP, Run, empty_run, peak_bytes, percentiles, reset_peak


def ask_onnx(folder: Path, questions: Questions, new_tokens: int, job: cli.Job, name: str) -> Run:
    """Answers of an exported model, one row at a time, as a user would ask it.

    The clock runs from the prompt to the end of the answer; what is read for labels and likelihoods comes after it.
    """
    reset_peak()
    began = time.monotonic()
    model, tokenizer = generation.load(folder)
    loaded = time.monotonic()
    run = empty_run(questions)
    names = {label: index for index, label in enumerate(questions.form["labels"] or [])}
    room = max(map(len, questions.label_tokens or [[]]))
    for prompt in questions.prompts[:WARM_UP]:
        generation.greedy(model, prompt, new_tokens)
    waits, prefill, generated, prompt_tokens = [], 0.0, 0, 0
    with job.progress(len(questions.prompts), f"rows of {name}") as bar:
        for i, prompt in enumerate(questions.prompts):
            row = _OnnxRow(len(prompt))
            answer = questions.answers[i]
            made = generation.greedy(model, prompt, new_tokens, row.look, max(room, len(answer)))
            waits.append(row.elapsed())
            prefill += row.prefill
            generated += len(made)
            prompt_tokens += len(prompt)
            run.texts[i] = tokenizer.decode(np.array([t for t in made if t != questions.end], dtype=np.int32))
            if i < questions.compared:
                run.logits[i] = row.steps[0].astype(np.float32)
            best = row.score(answer, made)
            run.answer_nll[i] = -best
            if questions.label_tokens:
                picked = names[questions.expected[i]]
                first = log_softmax(row.steps[0])
                bounds = sorted(((first[ids[0]], k) for k, ids in enumerate(questions.label_tokens)), reverse=True)
                for bound, k in bounds:
                    if bound <= best:
                        break
                    if k != names[questions.expected[i]]:
                        value = row.score(questions.label_tokens[k], made)
                        if value > best:
                            best, picked = value, k
                run.choices[i] = picked
            bar.update(1)
    total = sum(waits)
    run.timings = percentiles([1000 * wait for wait in waits]) | {
        "load_s": loaded - began,
        "score_s": total,
        "generated_tokens_per_s": generated / total,
        "prefill_tokens_per_s": prompt_tokens / prefill,
        "decode_tokens_per_s": generated / max(total - prefill, 1e-9),
        "peak_memory_bytes": peak_bytes(),
    }
    return run


class _OnnxRow:
    """One row's generator: logits of the steps taken, time, and likelihoods of other answers."""

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
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

    def score(self, answer: list[int], made: list[int]) -> float:
        """Log probability of an answer's tokens behind the prompt."""
        # The free answer went the same way, up to the last token's logits; its end token is not in `made`.
        if made[: len(answer) - 1] == answer[:-1] and len(self.steps) >= len(answer):
            logits = self.steps[: len(answer)]
        else:
            # Token by token, as generation does it: an export may give the last position's logits only.
            logits = self.steps[:1]
            self.generator.rewind_to(self.prompt_tokens)
            for token in answer[:-1]:
                self.generator.append_tokens(np.array([token], dtype=np.int32))
                logits.append(np.array(self.generator.get_logits()).reshape(-1))
        return float(sum(log_softmax(step)[token] for step, token in zip(logits, answer, strict=True)))
