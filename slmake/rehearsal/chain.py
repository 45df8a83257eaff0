"""The stages of a build on a small model, one function per stage, as a rehearsal runs them."""

import fnmatch
import json
import re
from pathlib import Path

import numpy as np

from slmake import cli, params
from slmake.errors import UserError

ANSWER = 4  # tokens at the end of a prompt that are given one by one


def finetune(
    section: params.Finetune,
    base: Path,
    dataset: Path,
    target: Path,
    steps: int,
    job: cli.Job,
    parameters: int | None = None,
) -> dict:
    """Train an adapter for a few steps, those with the longest batches, and write it into `target`.

    Args:
        parameters: number of parameters of the real model, if `base` stands for a larger one.

    Returns:
        steps, tokens and seconds, as `Trainer.run` counts them.
    """
    from slmake.training.distributed import Group
    from slmake.training.schedule import Schedule
    from slmake.training.trainer import Trainer

    short = section.model_copy(
        update={
            "max_steps": steps,
            "eval_steps": 0,
            "save_steps": steps + 1,
            "early_stopping_patience": 0,
            "keep_best": False,
        }
    )
    trainer = Trainer(short, base, dataset, target.with_name("checkpoints"), job, Group(), parameters)
    lengths = trainer.train.sequence_lengths
    schedule = Schedule(section, lengths)

    def padded(step: int) -> int:
        return max(len(batch) * int(lengths[batch].max()) for batch in schedule.batches(step))

    longest = sorted(range(min(schedule.steps, schedule.per_epoch)), key=padded, reverse=True)
    trainer.schedule.batches = lambda step: schedule.batches(longest[step % len(longest)])
    done = trainer.run()
    target.mkdir()
    trainer.save_adapter(target)
    return done


def merge(everything: params.Params, base: Path, adapter: Path, target: Path, job: cli.Job) -> None:
    """Merge the adapter into the base."""
    from slmake.merging import merge as merging

    target.mkdir()
    merging.merge(everything.merge, everything.finetune, base, adapter, target, job)


def export(section: params.Quantize, model: Path, dataset: Path, target: Path, job: cli.Job) -> dict:
    """Export a model and check the graph. Returns what is in it."""
    from slmake.export.build import build

    target.mkdir()
    scratch = target.with_name(f".{target.name}.cache")
    return build(section, model, dataset if section.calibration == "gptq" else None, target, scratch, job)


def plain(section: params.Quantize) -> params.Quantize:
    """The section for an fp32 export of the same model on the CPU."""
    return type(section)(
        precision="fp32", execution_provider="cpu", matmul_mixed_precision=None, prune_lm_head=section.prune_lm_head
    )


def for_twin(section: params.Quantize, twin: Path, depth: int) -> params.Quantize:
    """The section with patterns that name layers by number as the twin's layers have them.

    The twin's layers stand for layers of the real model, evenly spread from the first to the last.

    Args:
        twin: the twin's folder.
        depth: number of layers of the real model.
    """
    layers = json.loads((twin / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    stands_for = [round(layer * (depth - 1) / max(1, layers - 1)) for layer in range(layers)]

    def renamed(pattern: str) -> list[str]:
        before, layer, after = pattern.partition("layers.")
        number, slash, rest = after.partition("/")
        if not layer:
            return [pattern]
        if not slash:  # such as layers.1*: fits the twin's own numbers or none
            first = re.match(r"\d*", number)[0]
            return [pattern] if not first or int(first) < layers else []
        fitting = [own for own, real in enumerate(stands_for) if fnmatch.fnmatchcase(str(real), number)]
        return [f"{before}layers.{own}{slash}{rest}" for own in fitting]

    def all_renamed(patterns: list[str]) -> list[str]:
        return [name for pattern in patterns for name in renamed(pattern)]

    levels = section.node_accuracy_levels
    return section.model_copy(
        update={
            "search": None,
            "int8_nodes": all_renamed(section.int8_nodes),
            "nodes_to_exclude": all_renamed(section.nodes_to_exclude),
            "node_accuracy_levels": {name: levels[pattern] for pattern in levels for name in renamed(pattern)},
        }
    )


def reference_logits(model: Path, prompts: list[np.ndarray]) -> list[np.ndarray]:
    """Logits as transformers computes them in float32: one float32 array [ANSWER + 1, vocabulary] per prompt.

    They are those behind the last ANSWER + 1 positions of each prompt.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, trust_remote_code=False, local_files_only=True, use_safetensors=True
    ).eval()
    with torch.no_grad():
        return [
            loaded(input_ids=torch.from_numpy(prompt)[None], logits_to_keep=ANSWER + 1).logits[0].numpy()
            for prompt in prompts
        ]


def exported_logits(folder: Path, prompts: list[np.ndarray]) -> list[np.ndarray]:
    """The same logits as the exported model computes them.

    It is asked as `evaluate` asks it: it reads a prompt without its last ANSWER tokens, goes on as it likes, and is then given these
    tokens as another answer.

    Raises:
        UserError: ONNX Runtime cannot load or run the model.
    """
    from slmake.scoring import onnx_runner

    model = onnx_runner.load(folder)
    logits = []
    for prompt in map(np.ndarray.tolist, prompts):
        row = onnx_runner.OnnxRow(model, prompt[:-ANSWER], ANSWER)
        model.generate(row.prompt, ANSWER, row.look, row.room)
        logits.append(np.stack(row.logits([*prompt[-ANSWER:], 0], [])).astype(np.float32))
    return logits


def difference(reference: list[np.ndarray], logits: list[np.ndarray]) -> float:
    """Largest difference between two models' logits, as a share of the reference's spread (its standard deviation)."""
    shares = []
    for wanted, given in zip(reference, logits, strict=True):
        if not np.isfinite(given).all():
            return float("inf")
        shares.append(float(np.abs(wanted - given).max() / max(float(wanted.std()), 1e-12)))
    return max(shares)


def prompts_of(dataset: Path, lengths: list[int]) -> list[np.ndarray]:
    """Prompts of given lengths from the tokens of the training rows, int64 token ids.

    Raises:
        UserError: there are no training rows.
    """
    from slmake.training.data import Data

    data = Data(dataset / "train.parquet")
    if not len(data):
        raise UserError(f"{dataset}: no training rows.")
    tokens = np.asarray(data.ids[: max(lengths)], dtype=np.int64)
    return [np.resize(tokens, length) for length in lengths]
