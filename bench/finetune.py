"""Fine-tuning: tokens a second of us, Olive, TRL and transformers' Trainer, and our share of what the machine's products allow.

The same base model, rows, rank, modules, learning rates and number of steps; the base's weights in the type that we choose
on this machine; no gradient checkpointing, and batches padded to their longest row, for everyone (TRL's and Olive's own
defaults would be slower). Tokens are real ones, never padding. Olive trains on the whole text, the others on the answer.
Every adapter's loss on the same test answers is taken with the same script, so that nobody wins by doing less.
"""

import argparse
import hashlib
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np

from bench import measure
from bench.flops import step_flops
from bench.measure import ROOT, SCRATCH, BenchError
from bench.results import bar, ratios

PEERS = ("olive", "trl", "trainer")
MODULES = {"olive": "olive_run", "trl": "trl_sft", "trainer": "trainer"}
SHOWN = {"olive": "Olive's LoRA pass's", "trl": "TRL's SFTTrainer's", "trainer": "transformers' Trainer's"}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=24, help="finetune: optimizer steps of each run (default: 24)")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=list(PEERS), help="finetune and job: peers to run (default: all)"
    )


def hyper_parameters(steps: int, dtype: str) -> dict:
    """The section finetune of params.yaml as the peers' options."""
    import torch
    import yaml

    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    section = content["finetune"]
    return {
        "steps": steps,
        "batch": section["per_device_train_batch_size"],
        "learning_rate": section["learning_rate"],
        "warmup_steps": math.ceil(section["warmup_ratio"] * steps),
        "seed": section["seed"],
        "r": section["lora_r"],
        "alpha": section["lora_alpha"],
        "max_seq_len": content["prepare"]["max_seq_len"],
        "dtype": dtype,
        "device": "gpu" if torch.cuda.is_available() else "cpu",
        "provider": "CUDA" if torch.cuda.is_available() else "CPU",
    }


def our_dtype() -> str:
    """The type of the base's weights that scripts/finetune.py chooses on this machine."""
    from slmake.training import model

    return str(model.pick_dtype("auto", model.pick_device())).removeprefix("torch.")


def write_rows(dataset: Path, target: Path) -> None:
    """The training split as JSON Lines: prompt, completion, and the whole text."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(dataset / "train.parquet", columns=["prompt", "answer"]).to_pylist()
    with open(target, "w", encoding="utf-8") as out:
        for row in rows:
            line = {
                "prompt": row["prompt"],
                "completion": row["answer"],
                "text": row["prompt"] + row["answer"],
            }
            out.write(json.dumps(line) + "\n")


def without_eval(dataset: Path, target: Path) -> Path:
    """The dataset with an empty eval split: the peers evaluate nothing while they train, so neither do we."""
    import pyarrow.parquet

    measure.fresh(target)
    for path in dataset.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    empty = pyarrow.parquet.read_table(dataset / "eval.parquet").slice(0, 0)
    pyarrow.parquet.write_table(empty, target / "eval.parquet")
    return target


def ours(params: Path, base: Path, dataset: Path, work: Path) -> dict:
    """One run of scripts/finetune.py."""
    measure.fresh(work)
    arguments = ["--params", params, "--base", base, "--dataset", dataset, "--output", work / "adapter"]
    arguments += ["--train-loss", work / "train.csv", "--eval-loss", work / "eval.csv"]
    took = measure.script("finetune", *arguments, "--checkpoints", work / "checkpoints")
    rate = re.search(r"(\d+(?:\.\d+)?) tokens/s", took.output.splitlines()[-1])
    if not rate:
        raise BenchError(f"finetune: no tokens/s in its last line: {took.output[-500:]}")
    return {
        "tokens_per_s": float(rate[1]),
        "wall_s": took.wall,
        "peak_bytes": took.peak,
        "adapter": str(work / "adapter"),
        "sha256": hashlib.sha256((work / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }


def theirs(name: str, base: Path, rows: Path, hyper: Path, work: Path) -> dict:
    """One run of a peer."""
    measure.fresh(work)
    report, took = measure.peer(MODULES[name], "--base", base, "--rows", rows, "--hyper", hyper, "--output", work)
    return {
        "tokens_per_s": report["tokens"] / report["seconds"],
        "tokens_per_row": report["tokens"] / report["rows"],
        "wall_s": took.wall,
        "peak_bytes": took.peak,
        "adapter": report.get("folder", str(work / "adapter")),
    }


def count_work(params: Path, dataset: Path) -> dict:
    """`count_batches` of all steps of our run."""
    from slmake.params import section
    from slmake.training import data as data_module
    from slmake.training import schedule as schedule_module

    data = data_module.Data(dataset / "train.parquet")
    schedule = schedule_module.Schedule(section(params, "finetune"), data.lengths)
    return count_batches(data, [rows for step in range(schedule.steps) for rows in schedule.batches(step)])


def count_batches(data, chosen: list[np.ndarray]) -> dict:
    """Of some batches of `Data`: real tokens, states that have to be computed, labels, and each row's tokens up to its last prediction."""
    import torch

    from slmake.training import shared_prefix

    layouts = [shared_prefix.Layout([data.row(index) for index in rows], torch.device("cpu")) for rows in chosen]
    every = np.concatenate(chosen)
    return {
        "tokens": int(data.real[every].sum()),
        "states": sum(layout.tokens for layout in layouts),
        "labels": int(data.answers[every].sum()),
        "lengths": data.needed[every],
    }


def speed_bars(speed: dict[str, list[float]], limit: list[dict], per_token: float, dtype: str) -> list[dict]:
    """Bars of the speed over each peer's, and of its share of what the machine's products allow.

    Args:
        speed: tokens a second by contender, a value per round.
        limit: FLOP/s of the products alone, per round.
        per_token: FLOP that a token takes.
    """
    bars = []
    for name, wanted in (("olive", 2.5), ("trl", 1.5), ("trainer", None)):
        if name in speed:
            label = f"finetune: tokens/s over {SHOWN[name]}"
            bars.append(bar(label, ratios(speed["ours"], speed[name]), at_least=wanted))
    rates = [rate * per_token for rate in speed["ours"]]
    square, shapes = ([run[kind] for run in limit] for kind in ("square", "shapes"))
    bars.append(bar(f"finetune: share of a large {dtype} product's rate", ratios(rates, square), at_least=0.6))
    bars.append(bar("finetune: share of the step's own products' rate", ratios(rates, shapes), at_least=0.7))
    return bars


def bench(args: argparse.Namespace) -> dict:
    base, dataset = measure.need(ROOT / "build" / "base"), measure.need(ROOT / "build" / "dataset")
    work = measure.fresh(SCRATCH / "finetune")
    dtype = our_dtype()
    hyper = hyper_parameters(args.steps, dtype)
    (work / "hyper.json").write_text(json.dumps(hyper), encoding="utf-8")
    write_rows(dataset, work / "rows.jsonl")
    data = without_eval(dataset, work / "dataset")
    params = measure.params(
        work / "params.yaml", finetune={"max_steps": args.steps, "eval_steps": 0, "save_steps": 10**6}
    )
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    work_of = count_work(params, data)
    flop = step_flops(config, hyper["r"], work_of["states"], work_of["lengths"], work_of["labels"])
    per_token = sum(flop.values()) / work_of["tokens"]
    rows, labels = round(work_of["states"] / args.steps), round(work_of["labels"] / args.steps)

    def limit(_):
        step = ["--rows", rows, "--labels", labels]
        report, _ = measure.runner("flops", "--base", base, "--rank", hyper["r"], *step, "--dtype", dtype)
        return report

    contenders = {"limit": limit, "ours": lambda number: ours(params, base, data, work / f"ours-{number}")}
    for name in args.peers:
        contenders[name] = lambda number, name=name: theirs(
            name, base, work / "rows.jsonl", work / "hyper.json", work / f"{name}-{number}"
        )
    runs = measure.interleaved(args.rounds, **contenders)
    scored = ["ours", *args.peers]
    report, _ = measure.runner(
        "loss", "--base", base, "--dataset", dataset, "--adapters", *[runs[name][0]["adapter"] for name in scored]
    )
    losses = dict(zip(scored, report["losses"], strict=True))
    speed = {name: [run["tokens_per_s"] for run in runs[name]] for name in scored}
    bars = speed_bars(speed, runs["limit"], per_token, dtype)
    if "trl" in losses:
        bars.append(bar("finetune: loss on test answers over TRL's", [losses["ours"] / losses["trl"]], at_most=1.1))
    same = len({run["sha256"] for run in runs["ours"]}) == 1
    middle = {name: statistics.median(values) for name, values in speed.items()}
    rates = runs["limit"][0]
    table = [["", "tokens/s (median)", "wall s", "peak memory, MB", "loss on test answers"]]
    for name in scored:
        wall, peak = (statistics.median(run[key] for run in runs[name]) for key in ("wall_s", "peak_bytes"))
        table.append([name, f"{middle[name]:.0f}", f"{wall:.0f}", f"{peak / 1e6:.0f}", f"{losses[name]:.3f}"])
    count = len(work_of["lengths"])
    parts = ", ".join(f"{key} {value / work_of['tokens'] / 1e6:.0f}" for key, value in flop.items())
    notes = [
        f"{args.steps} steps of {hyper['batch']} rows, {work_of['tokens'] / count:.1f} tokens a row, {work_of['labels'] / count:.1f} of them labelled; weights in {dtype}.",
        f"States that have to be computed: {work_of['states'] / work_of['tokens']:.0%} of the tokens (what all rows of a batch begin with, once; nothing behind a row's last prediction).",
        f"Arithmetic that has to be done: {per_token / 1e6:.0f} MFLOP a token ({parts}); bench/flops.py says how it is counted.",
        f"Rates in GFLOP/s, first round: large square product {rates['square'] / 1e9:.0f} ({dtype}), the products of a step of {rows} states alone {rates['shapes'] / 1e9:.0f}.",
        f"Our {len(runs['ours'])} runs {'gave the same bytes' if same else 'DIFFERED in their bytes'}.",
    ]
    return {"bars": bars, "tables": [table], "notes": notes, "runs": runs, "losses": losses}
