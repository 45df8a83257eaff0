"""The checks of `bench.cuda`: what a device computes, against float64 on the CPU and against itself.

A check function yields checks: what is compared, a figure, and the largest figure that passes.
"""

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench import gpu_models, measure
from slmake import cli, params
from slmake.export.gptq import InputHessians, in_four_bits, inverse_factor, round_with_inputs
from slmake.merging.merge import fake_quantize, linear_weights, merge
from slmake.training.shared_prefix import Layout
from slmake.training.trainer import Trainer

ROWS, LENGTH, INSTRUCTION = 8, 24, 24
# Relative error of a loss and of a gradient: rounding of a few layers. transformers' norms take float32 even in float64.
BOUNDS = {"float32": (1e-5, 1e-4), "bfloat16": (0.02, 0.05)}
UNSHARED = ("gemma2",)  # transformers takes another attention for it than SDPA
Checks = Iterator[tuple[str, float, float]]


class Setup:
    """The tiny models of the checks and their trainers, in a folder, on the device that training chooses."""

    def __init__(self, work: Path, job: cli.Job):
        self.work, self.job, self.number = work, job, 0
        rows = gpu_models.draw_rows(ROWS, LENGTH, INSTRUCTION, gpu_models.SMALL["vocab_size"])
        self.rows, self.dataset = rows, gpu_models.write_dataset(work / "dataset", rows)

    def base(self, kind: str) -> Path:
        folder = self.work / kind
        if not folder.exists():
            gpu_models.write_model(folder, kind, gpu_models.ARCHITECTURES[kind], torch.float32, "cpu")
        return folder

    def trainer(self, kind: str, checkpoints: Path | None = None, **changes: object) -> Trainer:
        """A trainer whose matrices B are not zero, so that every gradient has a value."""
        self.number += 1
        section = gpu_models.section(ROWS // 2, 4, **changes)
        folder = checkpoints or self.work / f"checkpoints-{self.number}"
        trainer = Trainer(section, self.base(kind), self.dataset, folder, self.job)
        if not trainer.step:
            draw = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for value in trainer.trained.values():
                    value.copy_(torch.randn(value.shape, generator=draw) * 0.1)
        return trainer


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().cpu().flatten() for tensor in tensors])


def error(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((values - expected).norm() / expected.norm())


def gradients(trainer: Trainer) -> tuple[float, torch.Tensor]:
    """Mean loss over the targets of all rows, and the gradient of all trained values, as the trainer computes them."""
    loss, targets = trainer._loss(trainer.train, np.arange(len(trainer.train)))
    (loss / targets).backward()
    gradient = flat(value.grad for value in trainer.trained.values())
    trainer.optimizer.zero_grad(set_to_none=True)
    return loss.item() / targets, gradient


def exact_gradients(trainer: Trainer, base: Path, rows: list) -> tuple[float, torch.Tensor]:
    """The same of transformers and PEFT in float64 on the CPU, row by row, over the weights that the trainer's base has."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    section, dtype = trainer.section, getattr(torch, trainer.section.compute_dtype)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=False)
    if section.method == "qlora":
        names = linear_weights(base)
        for name, weight in model.named_parameters():
            if name in names:
                values = weight.data.to(trainer.device)  # rounded where the trainer rounds
                values = fake_quantize(values, dtype, section.quant_type, section.double_quant)
                weight.data = values.to("cpu", dtype)
    config = LoraConfig(
        r=section.lora_r, lora_alpha=section.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, config).double()
    parameters = dict(peft.named_parameters())
    with torch.no_grad():
        for name, value in trainer.trained.items():
            parameters[name].copy_(value.cpu())
    total, targets = 0, 0
    for ids, labels in rows:
        logits = peft(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        wanted = torch.tensor(labels[1:])
        total = total + torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="sum")
        targets += int((wanted >= 0).sum())
    (total / targets).backward()
    return total.item() / targets, flat(parameters[name].grad for name in trainer.trained)


def step(setup: Setup, kind: str, dtype: str, method: str = "lora") -> Checks:
    """One step's loss and gradients against float64, with a shared prefix and without."""
    trainer = setup.trainer(kind, compute_dtype=dtype, method=method)
    label = f"{kind}, {method}, {dtype}"
    exact_loss, exact = exact_gradients(trainer, setup.base(kind), setup.rows)
    loss_bound, bound = BOUNDS[dtype]
    loss, gradient = gradients(trainer)
    yield f"{label}: loss against float64", abs(loss - exact_loss) / exact_loss, loss_bound
    yield f"{label}: gradient against float64", error(gradient, exact), bound
    if kind in UNSHARED:
        return
    rows = [trainer.train.row(index) for index in range(ROWS)]
    share = Layout(rows, trainer.device).tokens / sum(map(len, rows)) if trainer.max_shared_len else 1.0
    yield f"{label}: share of the tokens computed", share, 0.7
    trainer.max_shared_len = 0
    yield f"{label}: gradient without shared prefixes against float64", error(gradients(trainer)[1], exact), bound


def repeated(setup: Setup) -> Checks:
    """A whole run against the same run again, and against one that was interrupted; every byte counts."""

    def differing(trainer: Trainer) -> float:
        return sum(int((value != whole[name]).sum()) for name, value in trainer.trained.items())

    first = setup.trainer("llama")
    first.run()
    whole = first.trained
    again = setup.trainer("llama")
    again.run()
    yield "two runs: values of the adapter that differ", differing(again), 0
    checkpoints = setup.work / "interrupted"
    interrupted = setup.trainer("llama", checkpoints)
    for _ in range(2):
        interrupted._optimizer_step()
        interrupted.step += 1
    interrupted._save()
    resumed = setup.trainer("llama", checkpoints)
    yield "resumed run: steps that were repeated", abs(resumed.step - 2), 0
    resumed.run()
    yield "resumed run: values of the adapter that differ from the undisturbed run's", differing(resumed), 0


def merged(setup: Setup) -> Checks:
    """The merge, which runs on the CPU everywhere, against PEFT's on the device, and the merged model against the adapter's."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    trainer = setup.trainer("llama", compute_dtype="float32")
    base, adapter, target = setup.base("llama"), setup.work / "adapter", measure.fresh(setup.work / "merged")
    trainer.save_adapter(adapter)
    threads = torch.get_num_threads()
    merge(params.Merge(), trainer.section, base, adapter, target, setup.job)
    torch.set_num_threads(threads)  # merge keeps one for its writer
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32, trust_remote_code=False)
    state = PeftModel.from_pretrained(load(base).to(trainer.device), adapter).merge_and_unload().state_dict()
    ours = load_file(target / "model.safetensors")
    yield (
        "merge on the CPU against PEFT's on the device",
        error(flat(ours.values()), flat(state[k] for k in ours)),
        1e-6,
    )
    ids = torch.tensor([setup.rows[0][0]], device=trainer.device)
    with torch.no_grad():
        expected = trainer.peft.eval()(input_ids=ids).logits
        logits = load(target).to(trainer.device).eval()(input_ids=ids).logits
    yield "merged model's logits against the adapter's", error(flat([logits]), flat([expected])), 1e-5


def input_moments(setup: Setup, device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight and moments of the inputs of every product that will have 4 bits, by name, taken on a device."""
    from transformers import AutoModelForCausalLM

    network = (
        AutoModelForCausalLM.from_pretrained(setup.base("llama"), dtype=torch.float32, trust_remote_code=False)
        .to(device)
        .eval()
    )
    modules = in_four_bits(params.Quantize(int8_nodes=[]), network)
    hessians = InputHessians(modules)
    ids = torch.tensor([row[0][:LENGTH] for row in setup.rows], device=device)
    hessians.mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.inference_mode():
        network(input_ids=ids, use_cache=False)
    hessians.close()
    return {name: (module.weight.detach(), hessians[name]) for name, module in modules.items()}


def calibrated(setup: Setup, device) -> Checks:
    """GPTQ's weights on the device against the CPU's: of the CPU's moments, and of moments that the device took itself.

    Moments that differ in their last bits round some weights the other way, and later ones make up for it: then the
    error of the layers' outputs must be the CPU's, not each weight.
    """

    def rounded(moments: dict) -> dict[str, torch.Tensor]:
        return {
            name: flat([round_with_inputs(weight, inverse_factor(matrix), 32).placed()])
            for name, (weight, matrix) in moments.items()
        }

    def differing(values: torch.Tensor, expected: torch.Tensor) -> float:
        return float(((values - expected).abs() > 1e-6 * expected.abs().max()).double().mean())

    def output_error(values: dict[str, torch.Tensor]) -> float:
        """Sum over the layers and their inputs of the squared error of their outputs."""
        total = 0.0
        for name, (weight, moments) in on_cpu.items():
            change = weight.double() - values[name].view(weight.shape)
            total += float((change @ moments.double() * change).sum())
        return total

    on_cpu = input_moments(setup, torch.device("cpu"))
    expected = rounded(on_cpu)
    copied = {name: (weight.to(device), inputs.to(device)) for name, (weight, inputs) in on_cpu.items()}
    own = input_moments(setup, device)
    taken, wanted = (flat(inputs for _, inputs in moments.values()) for moments in (own, on_cpu))
    yield "GPTQ: moments of the inputs against the CPU's", error(taken, wanted), 1e-5
    same = differing(flat(rounded(copied).values()), flat(expected.values()))
    yield "GPTQ: share of weights that differ from the CPU's, of its moments", same, 1e-3
    excess = output_error(rounded(own)) / output_error(expected) - 1
    yield "GPTQ: error of the layers' outputs above the CPU's", abs(excess), 0.01


def run(setup: Setup, device) -> list[dict]:
    """All checks; QLoRA's where bitsandbytes is installed. A check that cannot be computed has failed; its error is its note."""
    checks = [(f"{kind} step", partial(step, setup, kind, "float32")) for kind in gpu_models.ARCHITECTURES]
    checks += [
        *((f"{kind} bfloat16 step", partial(step, setup, kind, "bfloat16")) for kind in ("llama", "phi3")),
        ("repeated runs", partial(repeated, setup)),
        ("merge", partial(merged, setup)),
        ("GPTQ", partial(calibrated, setup, device)),
    ]
    if importlib.util.find_spec("bitsandbytes"):
        checks.append(("QLoRA step", partial(step, setup, "llama", "float32", "qlora")))
    results = []
    for name, function in checks:
        measure.say(f"check: {name}")
        try:
            for label, figure, bound in function():
                results.append({"name": label, "figure": figure, "bound": bound, "met": figure <= bound})
        except Exception as failure:
            note = f"{type(failure).__name__}: {failure}"[:500]
            results.append({"name": name, "figure": None, "bound": None, "met": False, "note": note})
    return results
