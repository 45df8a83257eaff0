"""Growth: how time and memory rise with rows, sequence length, model size and number of candidates.

Rows are those of `prepare`. Length: training steps of 2,048 tokens in rows of one length. Model size: random Llama models of 10 million to 1 billion
parameters; merging and quantizing (4 bits, round to nearest) from start to end, and the seconds of a training step of 256 tokens. DAG: `snakemake -n` of a search
over 1 to 500 candidates, all combinations and proposed by Optuna. The exponent is fitted to the upper half of the sizes, where the fixed cost (interpreter, imports) weighs less;
1 is linear.
"""

import argparse
import json
import re
import shutil
import sys
import time
from pathlib import Path

from bench import measure, models
from bench.measure import PROJECT_FILES, ROOT, SCRATCH, BenchError
from bench.results import bar, exponent

PARTS = ("dag", "length", "size")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--growth", nargs="+", choices=PARTS, default=list(PARTS), help="growth: curves (default: all)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024], help="growth")
    parser.add_argument("--sizes", nargs="+", choices=list(models.SIZES), default=["10m", "30m", "100m", "300m", "1b"])
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 5, 20, 100, 500], help="growth")


def dag(counts: list[int], optuna: bool) -> dict:
    """Seconds and peak memory of a dry run by number of candidates."""
    work = measure.fresh(SCRATCH / "dag")
    for name in PROJECT_FILES:
        (work / name).symlink_to(ROOT / name)
    curve: dict = {"sizes": counts, "seconds": [], "megabytes": []}
    for count in counts:
        # Each pattern fits the nodes of some layers: as many different candidates as wanted.
        lists = [[f"*/layers.{number}/*"] for number in range(count)]
        search: dict = {"int8_nodes": lists, "budget": count}
        if optuna:
            search["block_size"] = [16, 32]  # more combinations than the budget
        measure.params(work / "params.yaml", quantize={"search": search})
        took = measure.run([sys.executable, "-m", "snakemake", "-n", "--quiet", "all"], work)
        curve["seconds"].append(took.wall)
        curve["megabytes"].append(took.peak / 1e6)
    shutil.rmtree(work)
    return curve


def dataset_of(length: int, tokens: int, vocabulary: int, target: Path, source: Path) -> Path:
    """A prepared dataset of random rows of one length, with three labelled tokens each."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    measure.fresh(target)
    shutil.copyfile(source / "prompt.json", target / "prompt.json")
    rows = max(1, tokens // length)
    draw = np.random.default_rng(7)
    for split, count in (("train", rows * 6), ("eval", 0), ("test", 0)):
        ids = [draw.integers(3, vocabulary, length).tolist() for _ in range(count)]
        columns = {
            "row": pyarrow.array(range(count), pyarrow.int64()),
            "prompt": pyarrow.array([""] * count, pyarrow.string()),
            "answer": pyarrow.array([""] * count, pyarrow.string()),
            "input_ids": pyarrow.array(ids, pyarrow.list_(pyarrow.int32())),
            "labels": pyarrow.array([[-100] * (length - 3) + row[-3:] for row in ids], pyarrow.list_(pyarrow.int32())),
            "attention_mask": pyarrow.array([[1] * length for _ in ids], pyarrow.list_(pyarrow.int8())),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), target / f"{split}.parquet")
    return target


def train(base: Path, dataset: Path, batch: int, work: Path) -> tuple[float, float]:
    """Tokens a second of four steps, and peak memory in MB."""
    measure.fresh(work)
    changes = {"max_steps": 4, "eval_steps": 0, "save_steps": 10**6, "per_device_train_batch_size": batch, "lora_r": 16}
    params = measure.params(work / "params.yaml", finetune=changes)
    arguments = ["--params", params, "--base", base, "--dataset", dataset, "--output", work / "adapter"]
    arguments += ["--train-loss", work / "train.csv", "--eval-loss", work / "eval.csv"]
    took = measure.script("finetune", *arguments, "--checkpoints", work / "checkpoints")
    speed = float(re.search(r"(\d+(?:\.\d+)?) tokens/s", took.output.splitlines()[-1])[1])
    if not speed:
        raise BenchError("finetune was slower than half a token a second")
    return speed, took.peak / 1e6


def lengths(asked: list[int]) -> dict:
    """Seconds a token by length of the rows, at 2,048 tokens a step."""
    base, source = measure.need(ROOT / "build" / "base"), measure.need(ROOT / "build" / "dataset")
    vocabulary = json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    curve: dict = {"sizes": asked, "seconds": [], "megabytes": []}
    for length in asked:
        measure.say(f"rows of {length} tokens")
        data = dataset_of(length, 2048, vocabulary, SCRATCH / "length-data", source)
        speed, peak = train(base, data, max(1, 2048 // length), SCRATCH / "length")
        curve["seconds"].append(length / speed)  # of one row
        curve["megabytes"].append(peak)
    shutil.rmtree(SCRATCH / "length")
    shutil.rmtree(SCRATCH / "length-data")
    return curve


def sizes(asked: list[str]) -> dict[str, dict]:
    """Seconds of merging, quantizing and a training step of 256 tokens by number of parameters."""
    work, source = SCRATCH / "size", measure.need(ROOT / "build" / "dataset")
    counts = [models.parameters(size) for size in asked]
    curves: dict[str, dict] = {
        name: {"sizes": counts, "seconds": [], "megabytes": []} for name in ("merge", "quantize", "finetune")
    }
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import make_tokenizer

    for size in asked:
        measure.say(f"a model of {size}")
        measure.fresh(work)
        base, adapter = models.write_model(work / "base", size), models.write_adapter(work / "adapter", size)
        make_tokenizer(base)
        params = measure.params(
            work / "params.yaml",
            quantize={"calibration": "none", "int8_nodes": [], "matmul_mixed_precision": None, "algo_config": "rtn"},
        )
        arguments = ["--params", params]
        merged = measure.script("merge", *arguments, "--base", base, "--adapter", adapter, "--output", work / "merged")
        built = measure.script("quantize", *arguments, "--model", work / "merged", "--output", work / "int4")
        shutil.rmtree(work / "merged")
        shutil.rmtree(work / "int4")
        data = dataset_of(32, 256, 500, work / "dataset", source)
        speed, peak = train(base, data, 8, work / "train")
        for name, seconds, megabytes in (
            ("merge", merged.wall, merged.peak / 1e6),
            ("quantize", built.wall, built.peak / 1e6),
            ("finetune", 256 / speed, peak),
        ):
            curves[name]["seconds"].append(seconds)
            curves[name]["megabytes"].append(megabytes)
    shutil.rmtree(work)
    return curves


def bench(args: argparse.Namespace) -> dict:
    began = time.monotonic()
    curves: dict[str, dict] = {}
    if "dag" in args.growth:
        curves["dry run, all combinations"] = {"unit": "candidates", **dag(args.candidates, False)}
        curves["dry run, proposed by Optuna"] = {"unit": "candidates", **dag(args.candidates, True)}
    if "length" in args.growth:
        curves["training, one row"] = {"unit": "tokens a row", **lengths(args.lengths)}
    if "size" in args.growth:
        for name, curve in sizes(args.sizes).items():
            curves[f"{name}, whole" if name != "finetune" else "finetune, a step of 256 tokens"] = {
                "unit": "parameters",
                **curve,
            }
    bars, table = [], [["curve", "sizes", "seconds", "peak memory, MB", "exponent (upper half)"]]
    for name, curve in curves.items():
        half = max(2, (len(curve["sizes"]) + 1) // 2)
        fitted = exponent(curve["sizes"][-half:], curve["seconds"][-half:]) if len(curve["sizes"]) > 1 else float("nan")
        if len(curve["sizes"]) > 1:
            bars.append(bar(f"growth: {name}, by {curve['unit']}", [fitted], at_most=1.1, unit="exponent"))
        shown = [
            ", ".join(f"{value:{form}}" for value in curve[key]) for key, form in (("sizes", ","), ("seconds", ".3g"))
        ]
        memory = ", ".join(f"{value:.0f}" for value in curve["megabytes"])
        table.append([f"{name} ({curve['unit']})", *shown, memory, f"{fitted:.2f}"])
    return {"bars": bars, "tables": [table], "notes": [], "curves": curves, "took_s": time.monotonic() - began}
