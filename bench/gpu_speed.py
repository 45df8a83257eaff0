"""The measurements of `bench.cuda`: training beside transformers' Trainer, the share of the device's products, scoring, GPTQ."""

import gc
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from bench import finetune, flops, gpu_models, measure
from bench.gpu_models import Workload
from bench.peers import shared
from slmake import cli, params
from slmake.export.gptq import inverse_factor, round_with_inputs
from slmake.scoring.questions import Questions
from slmake.scoring.transformers_runner import TransformersRunner
from slmake.training.data import Data
from slmake.training.model import pick_device, pick_dtype
from slmake.training.schedule import Schedule
from slmake.training.trainer import Trainer

WARM_UP = 2  # steps that are not timed
PROFILED = 2  # steps of the trace


def synchronize(device) -> float:
    """The time when the device has nothing left to do, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def free_memory(device) -> None:
    """Return the memory of what no variable refers to, and forget its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device) -> int | None:
    """Bytes of the device's memory that tensors held at most; None on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def failed(failure: Exception) -> dict:
    """What stands for figures that could not be measured."""
    return {"error": f"{type(failure).__name__}: {failure}".splitlines()[0][:300]}


def measured(device, function: Callable[..., dict], *arguments: object) -> dict:
    """What `function` measured and its peak of memory, or the error that it ended with, so that the next is still measured."""
    free_memory(device)
    try:
        return {**function(*arguments), "peak_bytes": peak_memory(device)}
    except Exception as failure:
        return failed(failure)


class OurTraining:
    """slmake's trainer over one loaded base, for one workload after another."""

    def __init__(self, base: Path, dataset: Path, work: Path, job: cli.Job, **changes: object):
        self.changes = changes
        section = gpu_models.section(1, 1, **changes)
        self.trainer = Trainer(section, base, dataset, work / "checkpoints", job)
        self.config, self.device = gpu_models.config_of(base), self.trainer.device

    def _set(self, workload: Workload, dataset: Path, steps: int) -> None:
        trainer = self.trainer
        trainer.section = gpu_models.section(workload.batch, steps, **self.changes)
        trainer.train, trainer.step = Data(dataset / "train.parquet"), 0
        trainer.schedule = Schedule(trainer.section, trainer.train.sequence_lengths)
        trainer.peft.train()

    def _steps(self, count: int) -> int:
        """Some optimizer steps; returns their tokens."""
        tokens = 0
        for _ in range(count):
            tokens += self.trainer._optimizer_step()[2]
            self.trainer.step += 1
        return tokens

    def speed(self, workload: Workload, dataset: Path, steps: int) -> dict:
        """Tokens/s, FLOP/s, and the share of the tokens that was computed, over `steps` steps."""
        trainer = self.trainer
        self._set(workload, dataset, WARM_UP + steps)
        self._steps(WARM_UP)
        began = synchronize(self.device)
        tokens = self._steps(steps)
        seconds = synchronize(self.device) - began
        batches = [rows for step in range(WARM_UP, WARM_UP + steps) for rows in trainer.schedule.batches(step)]
        count = finetune.count_batches(trainer.train, batches)
        shared_prefix = trainer.train.needed.max() <= trainer.max_shared_len
        states = count["states"] if shared_prefix else count["tokens"]
        parts = flops.step_flops(self.config, gpu_models.RANK, states, count["lengths"], count["labels"])
        return {
            "tokens_per_s": tokens / seconds,
            "flop_per_s": sum(parts.values()) / seconds,
            "computed": states / count["tokens"],
        }

    def trace(self, workload: Workload, dataset: Path) -> dict:
        """How often a step's host waits for the GPU, and the share of the time in which the GPU has work."""
        self._set(workload, dataset, WARM_UP + 2 * PROFILED)
        self._steps(WARM_UP)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self._steps(PROFILED)
            torch.cuda.set_sync_debug_mode("default")
        waits = sum("called a synchronizing" in str(warning.message) for warning in caught)
        synchronize(self.device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            began = synchronize(self.device)
            self._steps(PROFILED)
            seconds = synchronize(self.device) - began
        busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
        return {"waits_per_step": waits / PROFILED, "busy": busy / seconds}


class Timer:
    """Seconds from the end of the warm-up to the end of a transformers Trainer's run."""

    def __init__(self, device):
        from transformers import TrainerCallback

        self.seconds = 0.0

        class Callback(TrainerCallback):
            def on_step_end(_, args, state, control, **kwargs):
                if state.global_step == WARM_UP:
                    self.seconds = -synchronize(device)

            def on_train_end(_, args, state, control, **kwargs):
                self.seconds += synchronize(device)

        self.callback = Callback()


class PeerTraining:
    """transformers' Trainer over a PEFT model, with the settings of bench/peers, for one workload after another."""

    def __init__(self, base: Path, work: Path, method: str, attention: str):
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        self.work, self.device = work, pick_device()
        self.hyper = {"r": gpu_models.RANK, "alpha": 2 * gpu_models.RANK, "learning_rate": 2e-4, "seed": 42}
        dtype, quantization = pick_dtype("auto", self.device), None
        if method == "qlora":
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            quantization_config=quantization,
            attn_implementation=attention,
            device_map={"": self.device},
            trust_remote_code=False,
        )
        self.peft = get_peft_model(model, shared.lora(self.hyper))

    def speed(self, workload: Workload, rows: list, steps: int) -> dict:
        """Tokens/s over `steps` steps, without deterministic kernels, as its users run it."""
        from transformers import Trainer, TrainingArguments

        hyper = {**self.hyper, "steps": WARM_UP + steps, "batch": workload.batch, "warmup_steps": 0}
        arguments = shared.training_arguments(hyper, self.work) | {"disable_tqdm": True, "remove_unused_columns": False}
        timer = Timer(self.device)
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        try:
            Trainer(
                model=self.peft,
                args=TrainingArguments(**arguments),
                train_dataset=rows,
                data_collator=padded,
                callbacks=[timer.callback],
            ).train()
        finally:
            torch.use_deterministic_algorithms(deterministic)
        tokens = sum(len(ids) for ids, _ in rows) * steps / (WARM_UP + steps)
        return {"tokens_per_s": tokens / timer.seconds}


def padded(rows: list[tuple[list[int], list[int]]]) -> dict:
    """A batch of rows, padded to the longest on the right."""
    ids, labels = ([torch.tensor(row[part]) for row in rows] for part in (0, 1))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": mask,
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def contender_runs(make: Callable, rows: dict[Workload, object], steps: int, device) -> tuple[dict, dict]:
    """A contender's speed on every workload, and ours' trace of the longest rows up to 1,024 tokens on a GPU.

    Args:
        make: loads the contender's model.
        rows: what the contender trains on, by workload.
    """
    free_memory(device)
    try:
        contender = make()
    except Exception as failure:
        return {load.name: failed(failure) for load in rows}, {}
    speeds = {load.name: measured(device, contender.speed, load, own, steps) for load, own in rows.items()}
    if device.type == "cpu" or not hasattr(contender, "trace"):
        return speeds, {}
    longest = max((load for load in rows if not load.instruction and load.length <= 1024), key=lambda load: load.length)
    return speeds, {longest.name: measured(device, contender.trace, longest, rows[longest])}


class Training:
    """Every contender on every workload; a contender loads its model once."""

    def __init__(self, base: Path, work: Path, loads: list[Workload], steps: int, job: cli.Job):
        self.base, self.work, self.steps, self.job = base, work, steps, job
        self.device, vocabulary = pick_device(), gpu_models.config_of(base)["vocab_size"]
        self.rows, self.datasets = {}, {}
        for number, load in enumerate(loads):
            count = load.batch * (WARM_UP + steps)
            self.rows[load] = gpu_models.draw_rows(count, load.length, load.instruction, vocabulary)
            self.datasets[load] = gpu_models.write_dataset(work / f"rows-{number}", self.rows[load])

    @staticmethod
    def methods() -> list[str]:
        return ["lora", *(["qlora"] if importlib.util.find_spec("bitsandbytes") else [])]

    def run(self, method: str) -> Iterator[dict]:
        """A method's figures by contender and workload, again after each contender."""
        measure.say(f"train: {method}")
        first = next(iter(self.datasets.values()))
        ours = partial(OurTraining, self.base, first, self.work / method, self.job, method=method)
        speeds, trace = contender_runs(ours, self.datasets, self.steps, self.device)
        results = {"ours": speeds, "trace": trace}
        yield results
        for attention in ["sdpa", *(["flash_attention_2"] if importlib.util.find_spec("flash_attn") else [])]:
            measure.say(f"train: {method} with transformers' Trainer, {attention}")
            peer = partial(PeerTraining, self.base, self.work / method, method, attention)
            results[f"Trainer, {attention}"], _ = contender_runs(peer, self.rows, self.steps, self.device)
            yield results


def scoring(base: Path, work: Path, count: int, length: int, instruction: int, job: cli.Job) -> dict:
    """Rows a second of evaluate's transformers models, label scores and answers included."""
    folder = gpu_models.write_questions(
        work / "questions", count, length, instruction, gpu_models.config_of(base)["vocab_size"]
    )
    torch.use_deterministic_algorithms(False)  # as in evaluate, which does not train
    runner = TransformersRunner(base, params.Evaluate().batch_size)
    runner.ask(Questions(folder, limit=runner.batch_size), 4, job, "warm-up")
    began = synchronize(runner.device)
    runner.ask(Questions(folder), 4, job, "base")
    return {"rows_per_s": count / (synchronize(runner.device) - began)}


def rounding(base: Path) -> dict:
    """Seconds that GPTQ takes for a decoder layer's products, without the pass that collects the moments."""
    device = pick_device()
    shapes = [(outputs, inputs) for _, inputs, outputs in flops.linear_shapes(gpu_models.config_of(base))]
    seconds = 0.0
    for outputs, inputs in shapes:
        weight = torch.randn(outputs, inputs, device=device)
        x = torch.randn(2 * inputs, inputs, device=device)
        moments = x.t() @ x
        began = synchronize(device)
        round_with_inputs(weight, inverse_factor(moments), 32)
        seconds += synchronize(device) - began
    return {"seconds_per_layer": seconds}
