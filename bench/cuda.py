"""Training, scoring and GPTQ on one GPU: checks against float64 on the CPU, then speed beside transformers' Trainer with PEFT.

    python3 -m bench.cuda --output cuda.json               # under seven minutes on an H100 or H200, without network
    .venv/bin/python -m bench.cuda --device cpu --tiny     # the same on a CPU, on tiny models: a minute, no result of worth

All models are made from seeds: tiny ones of several architectures for the checks, one of Phi-3-mini's size (3.8 billion
weights) for the speed. It takes 40 GB of memory or more on the GPU, and 9 GB of disk below `--work`.

It needs PyTorch, transformers, peft, accelerate, safetensors, pyarrow, tokenizers, tqdm and PyYAML, and pydantic. Where one of
them is missing and there is no network, bring wheels for that machine's Python, made where there is one:

    python3 -m pip download --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 \\
        --platform manylinux2014_x86_64 -d wheels pydantic pyyaml
    python3 -m pip install --no-index --find-links wheels --target site pydantic pyyaml && export PYTHONPATH=site

bitsandbytes (QLoRA) and flash-attn are used where they are installed; the result lists what was left out. Every figure of
training is from one run of each contender in the same process, over the same rows: ours with deterministic kernels, the
Trainer without. Steps have about 9,000 tokens (what the Trainer can hold in 80 GB), the length of a row varies by a quarter,
and the loss is on a quarter of a row's own tokens, at most 32. "Behind 500 shared" means that all rows begin with the same
500 tokens.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from bench import document, measure, results
from slmake import cli

BIG = {
    "lengths": [64, 256, 1024, 4096],
    "instruction": 500,
    "tokens": 9216,
    "steps": 5,
    "questions": 512,
    "product": 2048,
}
TINY = {"lengths": [8, 16], "instruction": 12, "tokens": 64, "steps": 1, "questions": 8, "product": 128}
# Times the Trainer's tokens/s up to 256 tokens a row and above, share of the product's rate at 1,024, waits of a step.
WANTED = {"short": 2.0, "long": 1.2, "share": 0.5, "waits": 1}


def training_bars(method: str, runs: dict, rate: float, loads: list, wanted: dict) -> list[dict]:
    """Tokens/s over the Trainer's, the share of the device's product rate, and what the trace shows, of what was measured."""
    lines = []
    for load in loads:
        ours = runs["ours"][load.name]
        if "error" in ours:
            continue
        for peer in (name for name in runs if name not in ("ours", "trace")):
            theirs = runs[peer][load.name]
            if "error" not in theirs:
                name = f"{method}, {load.name}: tokens/s over transformers' {peer}"
                at_least = wanted.get("short" if load.length <= 256 else "long")
                lines.append(results.bar(name, [ours["tokens_per_s"] / theirs["tokens_per_s"]], at_least=at_least))
        if not load.instruction:
            name = f"{method}, {load.name}: share of a large product's rate"
            at_least = wanted.get("share") if load.length == 1024 else None
            lines.append(results.bar(name, [ours["flop_per_s"] / rate], at_least=at_least))
    for name, trace in runs.get("trace", {}).items():
        if "error" not in trace:
            busy = f"{method}, {name}: share of the time in which the GPU computes"
            waits = f"{method}, {name}: times that a step's host waits for the GPU"
            lines.append(results.bar(busy, [trace["busy"]]))
            lines.append(results.bar(waits, [trace["waits_per_step"]], at_most=wanted.get("waits"), unit=""))
    return lines


def cell(run: dict, key: str, scale: float = 1.0, digits: int = 0) -> str:
    """A figure of a run as text; empty where it has none."""
    return "" if run.get(key) is None else f"{run[key] * scale:,.{digits}f}"


def tables(checks: list[dict], trained: dict) -> list[list[list[str]]]:
    """The checks, and every contender's speed and memory, as text."""
    checked = [["check", "figure", "at most", ""]]
    for check in checks:
        figures = ["" if check[key] is None else f"{check[key]:.2g}" for key in ("figure", "bound")]
        verdict = "passed" if check["met"] else f"**failed** {check.get('note', '')}".rstrip()
        checked.append([check["name"], *figures, verdict])
    speed = [["method", "contender", "workload", "tokens/s", "TFLOP/s", "tokens computed, %", "peak GPU memory, GB"]]
    for method, runs in trained.items():
        for contender in (name for name in runs if name != "trace"):
            for workload, run in runs[contender].items():
                figures = [run.get("error") or cell(run, "tokens_per_s"), cell(run, "flop_per_s", 1e-12, 1)]
                figures += [cell(run, "computed", 100), cell(run, "peak_bytes", 1e-9, 1)]
                speed.append([method, contender, workload, *figures])
    return [checked, speed]


def report(figures: dict, loads: list, wanted: dict) -> dict:
    """The result as docs/benchmarks.md shows it, and all raw figures."""
    rate, trained = figures.get("product_flop_per_s"), figures.get("training", {})
    bars = []
    for method, runs in trained.items():
        bars += training_bars(method, runs, rate, loads, wanted if method == "lora" else {})
    passed = sum(check["met"] for check in figures["checks"])
    notes = [f"{passed} of {len(figures['checks'])} checks passed."]
    if rate:
        notes.append(f"A large square product: {rate / 1e12:.3g} TFLOP/s in {figures['dtype']}.")
    for name, text in (("scoring", "evaluate: {} rows/s"), ("gptq", "GPTQ: {} s for a decoder layer's products")):
        if name in figures:
            value = next((value for key, value in figures[name].items() if key != "peak_bytes"))
            notes.append(text.format(f"{value:.3g}" if isinstance(value, float) else value) + ".")
    notes += [f"Left out: {reason}." for reason in figures["left_out"]]
    return {"bars": bars, "tables": tables(figures["checks"], trained), "notes": notes, **figures}


def left_out(device: str) -> list[str]:
    """What cannot be measured here, and why."""
    missing = {"bitsandbytes": "QLoRA", "flash_attn": "the Trainer with flash attention"}
    reasons = [f"{what} ({name} is not installed)" for name, what in missing.items() if not find_spec(name)]
    return reasons + (["the trace and GPU memory (no GPU)"] if device == "cpu" else [])


def run(device: str, tiny: bool, work: Path, output: Path) -> dict:
    """Check and measure; the file is written again after each part, so that what was measured stays if a later part fails."""
    from bench import gpu_checks, gpu_models, gpu_speed
    from slmake.training.model import pick_device, pick_dtype

    chosen, job = pick_device(), cli.Job("cuda", sys.stderr, None)
    dtype = pick_dtype("auto", chosen)
    sizes, wanted = (TINY, {}) if tiny else (BIG, WANTED)
    loads = gpu_models.workloads(sizes["lengths"], sizes["instruction"], sizes["tokens"])
    head = {"bench": "cuda", "machine": measure.machine(), "versions": measure.versions(), "tiny": tiny}
    figures = {"dtype": str(dtype).removeprefix("torch."), "left_out": left_out(device)}
    figures["checks"] = gpu_checks.run(gpu_checks.Setup(measure.fresh(work / "checks"), job), chosen)
    results.save(output, head | report(figures, loads, wanted))
    questions = (sizes["questions"], sizes["lengths"][0], sizes["instruction"])
    measured = partial(gpu_speed.measured, chosen)
    shape = gpu_models.ARCHITECTURES["phi3"] if tiny else gpu_models.PHI3_MINI
    base = gpu_models.write_model(work / "base", "phi3", shape, dtype, chosen)
    train = gpu_speed.Training(base, work / "training", loads, sizes["steps"], job)
    figures["training"] = {}
    parts = {
        "product_flop_per_s": lambda: measure.matmul_rate(dtype, sizes["product"]),
        "scoring": lambda: measured(gpu_speed.scoring, base, work, *questions, job),
        "gptq": lambda: measured(gpu_speed.rounding, base),
    }
    for name, part in parts.items():
        measure.say(name)
        figures[name] = part()
        results.save(output, head | report(figures, loads, wanted))
    for method in train.methods():
        for runs in train.run(method):
            figures["training"][method] = runs
            results.save(output, head | report(figures, loads, wanted))
    return head | report(figures, loads, wanted)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="measure a tiny model: to try this out")
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: build/bench/cuda.json, with --tiny cuda-tiny.json)"
    )
    parser.add_argument("--work", type=Path, help="folder for models and rows (default: a temporary one)")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if not args.tiny:
            parser.error("a CPU would take hours for Phi-3-mini's size. Add --tiny.")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here. Add --device cpu --tiny to try everything out on the CPU.")
    output = args.output or measure.SCRATCH / f"cuda{'-tiny' if args.tiny else ''}.json"
    with tempfile.TemporaryDirectory(prefix="slmake-cuda-") as scratch:
        result = run(args.device, args.tiny, args.work or Path(scratch), output)
    shown = [document.bars_table({"cuda": result}), *map(document.markdown_table, result["tables"])]
    print("\n\n".join([*shown, *result["notes"], f"Written to {output}."]))
    failed = [check["name"] for check in result["checks"] if not check["met"]]
    if failed:
        print(f"bench: cuda: {len(failed)} checks failed: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
