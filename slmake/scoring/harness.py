"""Tasks of EleutherAI's lm-evaluation-harness (Gao et al. 2024) on the models that `evaluate` scores.

Each model runs on the harness's own backend for transformers; behind it, the export runs on onnxruntime-genai.
"""

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from slmake import cli
from slmake.errors import UserError, first_line
from slmake.generation import Exported, Sampling
from slmake.scoring.metrics import log_softmax
from slmake.scoring.onnx_runner import rewound
from slmake.scoring.transformers_runner import ends_of

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# What a task may say of how its answers are generated: the limit by each of its names, what both runtimes take, and what changes nothing.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
ASKED = ("until", "do_sample", "temperature", "top_p", "top_k")
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "num_return_sequences": 1}
Z = 1.959964  # of a 95% interval
FEW = 100  # rows of a task on which it is tried without a model
OF_ANSWERS = ("process_results", "_compute_task_aggregations")  # functions of the harness that read answers
SEED = 1234  # of sampled answers, as the harness's own
SKIPPED = ("adapter",)  # merged is the same function: parity proves it


def tasks(entries: list[str]) -> "tuple[list[str], TaskManager]":
    """Names of the tasks, and where the harness finds those that no file of the user's defines.

    Args:
        entries: `evaluate.lm_eval`: names of tasks, or YAML files that define one.

    Raises:
        UserError: the harness is not installed, a file is not there or defines no task, there is no task of a name, or two have the same.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            "evaluate.lm_eval: the harness is not installed here. Run `make lm-eval`, or install envs/lm-eval.lock in the image that rules "
            "run in."
        ) from None
    names = [_definition(entry)["task"] if _is_file(entry) else entry for entry in entries]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"evaluate.lm_eval: two tasks have the name `{twice[0]}`. Rename one, or take it out.")
    known = TaskManager(include_defaults=not all(map(_is_file, entries)))
    if unknown := [entry for entry in entries if not (_is_file(entry) or known.match_tasks([entry]))]:
        raise UserError(
            f"evaluate.lm_eval: the harness has no task `{unknown[0]}`. `.venv/bin/lm-eval ls tasks` lists its tasks; "
            "a task of your own is named by its YAML file."
        )
    return names, known


def _is_file(entry: str) -> bool:
    return entry.endswith((".yaml", ".yml"))


def _definition(file: str, functions: bool = False) -> dict:
    """What a task's file says, with what it includes; `functions` of Python are loaded, or else named."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        found = load_yaml(file, resolve_func=functions)
    except FileNotFoundError as error:
        raise UserError(
            f"evaluate.lm_eval: {error.filename}: no such file. Correct the path of the task's YAML file."
        ) from None
    except Exception as error:
        raise UserError(f"evaluate.lm_eval: {file}: {first_line(error)}. Correct the task's YAML file.") from None
    if not isinstance(found.get("task"), str):
        raise UserError(f"evaluate.lm_eval: {file} defines no task. It needs a line such as `task: my_task`.")
    return found


def _specified(entries: list[str], scratch: str) -> list[str | dict]:
    """The tasks as the harness takes them: by name, or by what a file says, whatever other files beside it define.

    Args:
        scratch: a folder for the rows of local files, which have to stay there. `datasets` keeps them by the files' names and times; in a
            folder of its own, what they hold now is read.
    """
    specified: list[str | dict] = []
    for entry in entries:
        if not _is_file(entry):
            specified.append(entry)
            continue
        definition = _definition(entry, functions=True)
        if _has_local_rows(definition):
            definition["dataset_kwargs"] = {**(definition.get("dataset_kwargs") or {}), "cache_dir": scratch}
        specified.append(definition)
    return specified


def _has_local_rows(definition: dict) -> bool:
    """Whether a task's rows are in a folder, or in files that one of the loaders of `datasets` reads, and not on a hub."""
    if "custom_dataset" in definition:
        return False
    path = str(definition.get("dataset_path", ""))
    named = {"data_files", "data_dir"} & (definition.get("dataset_kwargs") or {}).keys()
    return Path(path).exists() or bool(named and "/" not in path)


@dataclass(frozen=True)
class TaskSampling(Sampling):
    """How a task has tokens chosen.

    Attributes:
        top_k: only so many of the most likely tokens are sampled from; 0 for all.
    """

    top_k: int = 0

    def options(self, vocabulary: int) -> dict:
        """The runtime's search options."""
        return super().options(vocabulary) | ({"top_k": self.top_k} if self.temperature and self.top_k else {})


def rehearse(entries: list[str], limit: int | None, context: int) -> dict[str, float]:
    """Run tasks as `run` does, on its first rows and without a model: before training, what is not there is said, or cannot be asked of every model.

    Args:
        limit: `evaluate.lm_eval_limit`.
        context: tokens of prompt and answer together that the model can read.

    Returns:
        Figures by the names of those that `run` will find; none where a task reads more of an answer than a made-up one has.

    Raises:
        UserError: as `tasks` and `run`.
    """
    names, known = tasks(entries)
    with _explained(names), TemporaryDirectory() as scratch:
        specified = _specified(entries, scratch)
        for task in known.load(specified)["tasks"].values():
            _refuse_unaskable(task.config, context)
        try:
            figures = _figures(_results(_nobody()(), specified, known, min(limit or FEW, FEW)))
        except Exception as error:
            if not any(frame.f_code.co_name in OF_ANSWERS for frame, _ in traceback.walk_tb(error.__traceback__)):
                raise
            return {}  # of an answer that no model gave
        own = [name for name, entry in zip(names, entries, strict=True) if _is_file(entry)]
        if silent := [name for name in own if not any(figure.startswith(f"lm_eval.{name}.") for figure in figures)]:
            raise ValueError(f"{silent[0]}: it gives no figure; its metric_list names none that the harness has")
        return figures


@cache
def _nobody() -> type:
    from lm_eval.api.model import LM

    class Nobody(LM):
        """Answers without a model."""

        tokenizer_name = "none"

        def loglikelihood(self, requests):
            return [(-1.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests):
            return [-1.0] * len(requests)

        def generate_until(self, requests):
            return ["1"] * len(requests)

    return Nobody


def _refuse_unaskable(task, context: int) -> None:
    """Raise ValueError for what is never done, or a way of asking that only one of transformers and onnxruntime-genai has, or neither."""
    if task.unsafe_code:
        raise ValueError(f"{task.task}: it runs code that a model wrote (unsafe_code), which is never done here")
    if task.output_type != "generate_until":
        return
    options = {name: value for name, value in (task.generation_kwargs or {}).items() if NEUTRAL.get(name) != value}
    limits = [options[name] for name in LIMITS if name in options]
    if unknown := sorted(options.keys() - {*LIMITS, *ASKED}):
        raise ValueError(f"{task.task}: generation_kwargs.{unknown[0]}: an exported model cannot be asked so")
    if limits and int(limits[0]) >= context:
        raise ValueError(f"{task.task}: answers of {limits[0]} tokens, and the model reads {context} with the prompt")
    if options.get("do_sample") and not options.get("temperature"):
        raise ValueError(f"{task.task}: generation_kwargs.do_sample without a temperature")


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
    asked = {name: folder for name, folder in folders.items() if name not in SKIPPED and not name.endswith("_base")}
    figures = {}
    with TemporaryDirectory() as scratch:
        for name, folder in asked.items():
            job.say(f"lm-eval: {', '.join(names)} on {name}")
            backend = _backend(folder, exported=name == onnx)
            with _explained(names):
                figures[name] = _figures(_results(backend, _specified(entries, scratch), known, limit))
    return figures


def _backend(folder: Path, exported: bool):
    """The harness's model over a folder. No code of a model is run."""
    if exported:
        return _exported_backend()(folder)
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = HFLM(pretrained=str(folder), dtype="auto", device=device, batch_size=1, trust_remote_code=False)
    # As an export answers: without generation_config.json's penalty of repetitions, which would hold for one of the two only.
    backend.model.generation_config = GenerationConfig(eos_token_id=ends_of(backend.model) or None, top_k=0)
    return backend


@cache
def _exported_backend() -> type:
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, PretrainedConfig

    class ExportedLM(HFLM):
        """The harness's backend of transformers with an exported model behind it: its own for onnxruntime-genai has other tokens and ends.

        A continuation is fed token by token behind its context, which is computed once for all choices of a question: an export may give
        the logits of the last position only.
        """

        def __init__(self, folder: Path):
            self.exported, self.asked = Exported(folder), 0
            model = SimpleNamespace(device=torch.device("cpu"), config=PretrainedConfig())
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            super().__init__(model, backend="causal", tokenizer=tokenizer, max_length=self.exported.context_length)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            """Log likelihood in nats of each continuation, and whether it is the most likely one."""
            results, generator, before = [], None, None
            longest = max((len(continuation) for _, _, continuation in requests), default=0)

            def read(start: list[int]):
                room = min(longest, self.max_length - len(start))
                return self.exported.generator(start, room, Sampling())

            for _, context, continuation in requests:
                tokens = [*context, *continuation][-self.max_length - 1 :]  # the last one is not read
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

        def _model_generate(self, context, max_length, stop, do_sample=False, temperature=0.0, top_p=1.0, top_k=0, **_):
            """The prompt and its answer, int64 [1, tokens], up to an end token or one of the texts of `stop`."""
            self.asked += 1  # a task may ask the same several times, for several answers
            sampling = TaskSampling(temperature if do_sample else 0.0, top_p, SEED + self.asked, top_k=top_k)
            prompt, answer = context[0].tolist(), []
            new_tokens = max_length - len(prompt)
            for token in self.exported.steps(self.exported.generator(prompt, new_tokens, sampling), new_tokens):
                answer.append(token)
                text = self.tok_decode(answer, skip_special_tokens=False)
                if any(end in text for end in stop):
                    break
            return torch.tensor([[*prompt, *answer]])

    return ExportedLM


def _results(model, specified: list, known: "TaskManager", limit: int | None) -> dict[str, dict]:
    import lm_eval

    return lm_eval.simple_evaluate(
        model=model, tasks=specified, task_manager=known, limit=limit, log_samples=False, bootstrap_iters=1000
    )["results"]


@contextlib.contextmanager
def _explained(names: list[str]) -> Iterator[None]:
    """Raise what the harness raises of some tasks as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = Exception(*error.args) if isinstance(error, KeyError) and error.args else error  # without quotes
        reason = first_line(said).rstrip(".")
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
