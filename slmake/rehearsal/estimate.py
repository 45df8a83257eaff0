"""What the real build will need: memory and time of each stage, and disk.

Two probes of the model at its real width, with few layers and with twice as many, run the stages that grow with the model.
A straight line through both gives the whole model: a stage's memory and time are linear in the number of layers.
"""

import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.export.proposals import count
from slmake.model_folder import tensor_shapes, weight_files
from slmake.rehearsal import chain, twin
from slmake.training.trainer import KERNEL_CACHES

LIBRARIES = ["torch", "transformers", "peft"]  # imported once, before the probes' processes are forked
STEPS = 3  # training steps of a probe
SMALL = 1024  # width up to which a probe may have a quarter of the layers
BESIDES = 500_000_000  # bytes of a process that has imported the libraries and streams files
MERGING = (
    320_000_000  # bytes of merge, which streams tensors: 0.28 to 0.36 GB were seen from 0.13 to 3.8 billion parameters
)
SCORING = 500_000_000  # bytes of logits and caches of a batch in evaluate: 0.4 to 0.7 GB were seen at 3.8 and 0.13 billion parameters
REMEDIES = {
    "finetune": "finetune.method: qlora, finetune.gradient_checkpointing: true, or a smaller finetune.per_device_train_batch_size "
    "with more gradient_accumulation_steps",
    "quantize": "quantize.calibration: none",
    "evaluate": "a smaller evaluate.batch_size, or evaluate.models: [onnx]",
}


class Need(NamedTuple):
    """What one stage needs."""

    memory: float  # bytes of resident memory at its peak
    seconds: float | None = None  # None where it is not estimated
    disk: float = 0  # bytes that it leaves on disk


def probe_context():
    """The multiprocessing context of the probes. Its server imports the libraries in the background, so call it early."""
    from multiprocessing import forkserver

    for name, capacity in KERNEL_CACHES.items():  # read when torch is imported
        os.environ.setdefault(name, capacity)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    forkserver.ensure_running()
    return context


def estimate(
    everything: params.Params, base: Path, dataset: Path, scratch: Path, job: cli.Job, context
) -> dict[str, Need]:
    """Needs of the stages that params.yaml asks for, by stage.

    Args:
        context: from `probe_context`.

    Raises:
        UserError: a probe fails; the message says at which stage.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    parameters, depth = _parameters(base), config.num_hidden_layers
    counts = probe_layers(config)
    measured: dict[str, list[dict]] = {"finetune": [], "quantize": []}
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    for layers in counts:
        model = scratch / f"probe-{layers}"
        twin.make_model(base, model, lambda config, layers=layers: twin.cut(config, layers), dtype)
        for stage, function, real in (("finetune", train_probe, parameters), ("quantize", export_probe, depth)):
            if stage in everything.all.stages:
                target = scratch / f"{stage}-{layers}"
                job.log(f"probe of {stage} with {layers} of {depth} layers")
                measured[stage].append(run(context, stage, function, everything, model, dataset, target, real))
    calibrated = None
    if measured["quantize"] and everything.quantize.calibration == "gptq":
        model, target = scratch / f"probe-{counts[0]}", scratch / "calibrated"
        calibrated = run(context, "quantize", calibration_probe, everything, model, dataset, target, depth)
    weights = outputs.folder_size(base)
    needs = (
        {"finetune": _training(everything, measured["finetune"], counts, depth, dataset)}
        if measured["finetune"]
        else {}
    )
    if "merge" in everything.all.stages:
        needs["merge"] = Need(MERGING, disk=weights)
    if measured["quantize"]:
        size = _line(counts, [result["size"] for result in measured["quantize"]], depth)
        scratch = _calibration_files(everything, dataset, parameters, config.hidden_size) if calibrated else 0
        needs["quantize"] = _quantizing(everything, measured["quantize"], calibrated, counts, depth, size, scratch)
        if "package" in everything.all.stages:
            needs["package"] = Need(BESIDES, disk=size)
    if "evaluate" in everything.stages:
        needs["evaluate"] = Need(BESIDES + SCORING + weights)
    return needs


def _parameters(base: Path) -> int:
    """Number of a model's parameters, from the headers of its files."""
    return sum(math.prod(shape) for file in weight_files(base) for shape in tensor_shapes(file).values())


def probe_layers(config) -> list[int]:
    """Numbers of layers of the probes of a transformers configuration: the fewest, and a quarter of a small model's or twice as many."""
    depth, step = config.num_hidden_layers, max(twin.LEAST_LAYERS, twin.period(twin.layer_kinds(config)))
    if depth <= step:
        return [depth]
    quarter = math.ceil(depth / 4 / step) * step if config.hidden_size <= SMALL else 0
    return [step, min(depth, max(2 * step, quarter))]


def _quantizing(
    everything: params.Params,
    results: list[dict],
    calibrated: dict | None,
    counts: list[int],
    depth: int,
    size: float,
    scratch: int,
) -> Need:
    """The export grows with the layers. Calibration takes each layer by itself, so one probe of it has the real model's memory.

    Args:
        size: bytes of the export.
        scratch: bytes of calibration's files.
    """
    memory, seconds = (_line(counts, [result[name] for result in results], depth) for name in ("memory", "seconds"))
    candidates = count(everything.quantize) if everything.quantize.search else 0
    disk = size * (1 + candidates)
    if calibrated:
        memory = max(memory, calibrated["memory"])
        seconds += max(0.0, calibrated["seconds"] - results[0]["seconds"]) * depth / counts[0]
        disk += scratch
    return Need(memory, seconds, disk)


def _calibration_files(everything: params.Params, dataset: Path, parameters: int, width: int) -> int:
    """Bytes on disk while calibration runs: one for each rounded weight, and the padded rows' states between two layers in float32."""
    from slmake.export.gptq import row_groups
    from slmake.training.data import Data

    rows = Data(dataset / "train.parquet")
    groups = row_groups(rows, everything.quantize.calibration_rows)
    return parameters + sum(4 * width * len(group) * int(rows.lengths[group].max()) for group in groups)


def _training(everything: params.Params, results: list[dict], counts: list[int], depth: int, dataset: Path) -> Need:
    from slmake.training.data import Data
    from slmake.training.schedule import Schedule

    data = Data(dataset / "train.parquet")
    section = everything.finetune
    rows = (
        Schedule(section, data.sequence_lengths).steps
        * section.per_device_train_batch_size
        * section.gradient_accumulation_steps
    )
    tokens = rows * float(data.real.sum() / len(data.sequence_lengths))
    per_token = _line(counts, [result["seconds"] / max(1, result["tokens"]) for result in results], depth)
    return Need(_line(counts, [result["memory"] for result in results], depth), per_token * tokens)


def _line(counts: list[int], values: list[float], depth: int) -> float:
    """The value at `depth` layers of a straight line through the probes' values."""
    if len(counts) == 1:
        return values[0]
    slope = (values[1] - values[0]) / (counts[1] - counts[0])
    return values[0] + max(0.0, slope) * (depth - counts[0])


# -- probes ------------------------------------------------------------------------------------------------------------


def train_probe(everything: params.Params, model: Path, dataset: Path, target: Path, parameters: int) -> dict:
    """A few training steps, with weights as the whole model of so many parameters would have them."""
    return chain.finetune(everything.finetune, model, dataset, target, STEPS, _job(), parameters)


def calibration_probe(everything: params.Params, model: Path, dataset: Path, target: Path, depth: int) -> dict:
    """The export as params.yaml asks for it."""
    began = time.monotonic()
    chain.export(chain.for_twin(everything.quantize, model, depth), model, dataset, target, _job())
    return {"size": outputs.folder_size(target), "seconds": time.monotonic() - began}


def export_probe(everything: params.Params, model: Path, dataset: Path, target: Path, depth: int) -> dict:
    """The same without calibration."""
    plain = everything.quantize.model_copy(update={"calibration": "none"})
    return calibration_probe(everything.model_copy(update={"quantize": plain}), model, dataset, target, depth)


def _job() -> cli.Job:
    return cli.Job("rehearse", sys.stderr, None)


def run(context, stage: str, function: Callable, *arguments: object) -> dict:
    """What `function` returns in a process of its own, with `memory`: its peak resident memory in bytes.

    Raises:
        UserError: it failed, or the system ended it.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"{stage}: a process with a part of this model's layers was ended (exit code {process.exitcode}), most likely for want of "
            f"memory. Change {REMEDIES[stage]}, or use a machine with more memory."
        ) from None
    finally:
        process.kill()  # has ended by itself, unless this process was interrupted
        process.join()
    if error:
        raise UserError(f"{stage}: {error}")
    return result


def _child(sender, function: Callable, arguments: tuple) -> None:
    from slmake.scoring.run import peak_bytes

    cli.end_with(cli.engine(multiprocessing.parent_process().pid))
    try:
        result = function(*arguments)
        sender.send((result | {"memory": peak_bytes()}, None))
    except UserError as error:
        sender.send((None, str(error)))
    except Exception as error:
        import traceback

        traceback.print_exc()
        sender.send((None, f"{type(error).__name__}: {error}"))


# -- the verdict -------------------------------------------------------------------------------------------------------


def table(needs: dict[str, Need], memory: float, disk: float) -> str:
    """Needs by stage as aligned lines, and what is there."""
    lines = [f"  {'stage':<12}{'memory':>10}{'time':>10}{'disk':>10}"]
    for stage, need in needs.items():
        seconds = "" if need.seconds is None else duration(need.seconds)
        lines.append(
            f"  {stage:<12}{gigabytes(need.memory):>10}{seconds:>10}{gigabytes(need.disk) if need.disk else '':>10}"
        )
    total = sum(need.disk for need in needs.values())
    lines.append(
        f"  {'needed':<12}{gigabytes(max(need.memory for need in needs.values())):>10}{'':>10}{gigabytes(total):>10}"
    )
    lines.append(f"  {'here':<12}{gigabytes(memory):>10}{'':>10}{gigabytes(disk):>10}")
    return "\n".join(lines)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def refuse_too_large(needs: dict[str, Need], memory: float, disk: float) -> None:
    """Raise UserError where a stage needs more memory, or all stages more disk, than there is."""
    stage, need = max(needs.items(), key=lambda item: item[1].memory)
    override = "To build all the same, set rehearse.refuse to false."
    if need.memory > memory:
        remedy = f" Change {REMEDIES[stage]}." if stage in REMEDIES else ""
        raise UserError(
            f"{stage} would need about {gigabytes(need.memory)} of memory; {gigabytes(memory)} are here.{remedy} {override}"
        )
    total = sum(need.disk for need in needs.values())
    if total > disk:
        raise UserError(
            f"the build would need about {gigabytes(total)} on disk; {gigabytes(disk)} are free here. Free some space. {override}"
        )


def free_disk(folder: Path) -> int:
    """Free bytes of the disk that holds `folder`."""
    return shutil.disk_usage(folder).free
