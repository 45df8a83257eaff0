"""Tasks of EleutherAI's lm-evaluation-harness (Gao et al. 2024) on the models that `evaluate` scores.

Each model runs on the harness's own backend: base and merged on Hugging Face's, the export on onnxruntime-genai's.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slmake import cli
from slmake.errors import UserError
from slmake.scoring.metrics import log_softmax
from slmake.scoring.onnx_runner import rewound

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Z = 1.959964  # of a 95% interval
SKIPPED = ("adapter",)  # merged is the same function: parity proves it


def tasks(entries: list[str]) -> "tuple[list[str], TaskManager]":
    """Names of the tasks, and where the harness finds them.

    Args:
        entries: `evaluate.lm_eval`: names of tasks, or YAML files that define one.

    Raises:
        UserError: the harness is not installed, a file is not there or defines no task, or there is no task of a name.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            "evaluate.lm_eval: the harness is not installed here. Run `make lm-eval`, or install envs/lm-eval.lock in the image that rules "
            "run in."
        ) from None
    names, folders = [], []
    for entry in entries:
        if entry.endswith((".yaml", ".yml")):
            names.append(_task_of(Path(entry)))
            folders.append(str(Path(entry).parent.resolve()))
        else:
            names.append(entry)
    known = TaskManager(include_path=folders or None, include_defaults=len(folders) < len(entries))
    if unknown := [name for name in names if not known.match_tasks([name])]:
        raise UserError(
            f"evaluate.lm_eval: the harness has no task `{unknown[0]}`. `.venv/bin/lm-eval ls tasks` lists its tasks; "
            "a task of your own is named by its YAML file."
        )
    return names, known


def load(entries: list[str]) -> None:
    """Load tasks with their rows, as `run` does: before training, what is not there is said.

    Raises:
        UserError: as `tasks` and `run`.
    """
    names, known = tasks(entries)
    with _explained(names):
        known.load(names)


def _task_of(file: Path) -> str:
    """The name that a task's file gives it."""
    try:
        name = re.search(r"(?m)^task:\s*[\"']?([\w.-]+)[\"']?\s*$", file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"evaluate.lm_eval: {file}: no such file. Correct the path of the task's YAML file.") from None
    if not name:
        raise UserError(f"evaluate.lm_eval: {file} defines no task. It needs a line such as `task: my_task`.")
    return name[1]


def run(folders: dict[str, Path], onnx: str, entries: list[str], limit: int | None, job: cli.Job) -> dict[str, dict]:
    """Figures of every model, by its name: the mean of each metric of each task, and the ends of its 95% interval.

    Args:
        folders: the models by name.
        onnx: the exported model's name.
        limit: the number of rows of a task, from the first; None for all.

    Raises:
        UserError: a task cannot be run, for example because its dataset cannot be read.
    """
    names, known = tasks(entries)
    figures = {}
    for name, folder in folders.items():
        if name in SKIPPED or name.endswith("_base"):
            continue
        job.say(f"lm-eval: {', '.join(names)} on {name}")
        figures[name] = _figures(_results(_backend(folder, exported=name == onnx), names, known, limit))
    return figures


def _backend(folder: Path, exported: bool):
    """The harness's model over a folder. No code of a model is run."""
    if exported:
        return _exported_backend()(pretrained=str(folder))
    import torch
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HFLM(pretrained=str(folder), dtype="auto", device=device, batch_size=1, trust_remote_code=False)


@cache
def _exported_backend() -> type:
    from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM

    class Exported(ONNXRuntimeGenAILM):
        """The harness's backend, for exports that give the logits of the last position only (`quantize.prune_lm_head`), too.

        A continuation is fed token by token behind its context, which is computed once for all choices of a question.
        """

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            """Log likelihood in nats of each continuation, and whether it is the most likely one."""
            results, generator, before = [], None, None
            # ONNX Runtime GenAI refuses a cache that is smaller than a sliding window.
            config = json.loads((self.model_dir / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
            smallest = config.get("sliding_window", {}).get("window_size", 0)
            room = max((len(continuation) for _, _, continuation in requests), default=0)

            def read(start: list[int]):
                parameters = self.og.GeneratorParams(self.model)
                length = max(min(len(start) + room, self.max_length), smallest)
                parameters.set_search_options(max_length=length, do_sample=False)
                generator = self.og.Generator(self.model, parameters)
                generator.append_tokens(np.array(start, dtype=np.int32))
                return generator

            for _, context, continuation in requests:
                tokens = [*context, *continuation][-self.max_length :]
                count = min(len(continuation), len(tokens) - 1)
                start = tokens[: len(tokens) - count]
                if start != before:
                    generator, before = read(start), start
                    first = np.asarray(generator.get_logits()).reshape(-1)
                else:
                    generator = rewound(generator, len(start), partial(read, start))
                logits, total, greedy = first, 0.0, True
                for position, token in enumerate(tokens[len(start) :]):
                    total += float(log_softmax(logits)[token])
                    greedy = greedy and int(logits.argmax()) == token
                    if position + 1 < count:
                        generator.append_tokens(np.array([token], dtype=np.int32))
                        logits = np.asarray(generator.get_logits()).reshape(-1)
                results.append((total, greedy))
            return results

    return Exported


def _results(model, names: list[str], known: "TaskManager", limit: int | None) -> dict[str, dict]:
    import lm_eval

    with _explained(names):
        found = lm_eval.simple_evaluate(
            model=model, tasks=names, task_manager=known, limit=limit, log_samples=False, bootstrap_iters=1000
        )
    return found["results"]


@contextlib.contextmanager
def _explained(names: list[str]) -> Iterator[None]:
    """Raise what the harness raises of some tasks as a UserError."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise UserError(
            f"evaluate.lm_eval: {', '.join(names)}: {type(error).__name__}: {reason}. Correct the task, or take it out."
        ) from error


def _figures(results: dict[str, dict]) -> dict[str, float]:
    """`lm_eval.TASK.METRIC` with its interval, from the harness's `METRIC,FILTER` and `METRIC_stderr,FILTER`."""
    figures = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not chosen:
                continue
            name = f"lm_eval.{task}.{metric}" + (f".{chosen}" if chosen != "none" else "")
            figures[name] = round(float(value), 6)
            error = values.get(f"{metric}_stderr,{chosen}")
            if isinstance(error, int | float):
                figures[f"{name}_low"], figures[f"{name}_high"] = (
                    round(float(value + sign * Z * error), 6) for sign in (-1, 1)
                )
    return figures
