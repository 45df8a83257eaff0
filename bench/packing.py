"""Packing: real tokens a second on rows of very different lengths, over padded batches of the same rows.

Rows of 16 to about 1,000 tokens (lengths drawn evenly on a logarithmic scale, words of data/dataset.json), the base model and the section
finetune of params.yaml, sequences of up to 1,024 tokens. A step is one packed sequence, or as many rows as fill one on average. Four ways
in one process, in turn: packed; rows as we train them line by line (no padding but in attention); and plain padded batches, as other
trainers make them, of rows of similar length and of rows in random order.
"""

import argparse
import contextlib
import json
import random
import sys
import time
from pathlib import Path

from bench import measure
from bench.measure import ROOT, SCRATCH
from bench.results import bar, ratios

ROWS, LENGTHS, MAX_SEQ_LEN = 400, (10, 640), 1024  # LENGTHS in words
WAYS = {  # strategy, whether the trainer leaves padding out, group_by_length
    "packing": ("packing", True, True),
    "rows": ("line-by-line", True, True),
    "padded, similar lengths": ("line-by-line", False, True),
    "padded, random order": ("line-by-line", False, False),
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=8192, help="packing: real tokens of each run (default: 8192)")


def write_rows(path: Path, seed: int = 42) -> None:
    """Rows whose prompts have lengths that are spread evenly on a logarithmic scale."""
    phrases = [row["phrase"] for row in json.loads((ROOT / "data" / "dataset.json").read_text(encoding="utf-8"))]
    words = [word for phrase in phrases for word in phrase.split()]
    draw, (low, high) = random.Random(seed), LENGTHS
    with open(path, "w", encoding="utf-8") as handle:
        for number in range(ROWS):
            start, count = draw.randrange(len(words) - high), round(low * (high / low) ** draw.random())
            phrase = " ".join(words[start : start + count])
            handle.write(json.dumps({"phrase": phrase, "tone": ("joy", "fear")[number % 2]}) + "\n")


def prepare(work: Path, base: Path, strategy: str) -> Path:
    """The rows, prepared for one strategy."""
    section = {"source": str(work / "rows.jsonl"), "strategy": strategy, "max_seq_len": MAX_SEQ_LEN}
    section |= {"eval_fraction": 0.0, "test_fraction": 0.0, "near_duplicate_threshold": 1.0}
    file = measure.params(work / f"{strategy}.yaml", all={"stages": ["finetune"]}, prepare=section)
    target = work / strategy
    measure.script(
        "prepare", "--params", file, "--base", base, "--output", target, "--report", work / f"{strategy}.json"
    )
    return target


def train(work: Path, base: Path, way: str, tokens: int, number: int) -> dict:
    """Steps of one way until so many real tokens are trained; the first step is not timed."""
    import torch

    from slmake import cli, params
    from slmake.training.data import Data
    from slmake.training.trainer import Trainer

    strategy, unpadded, group = WAYS[way]
    data = Data(work / strategy / "train.parquet")
    rows = max(1, round(MAX_SEQ_LEN / data.real.mean()))
    section = params.load(ROOT / "params.yaml").finetune.model_copy(
        update={
            "per_device_train_batch_size": 1 if data.packed else rows,
            "group_by_length": group,
            "max_steps": 10_000,
        }
    )
    with cli.job("packing", None) as job:
        trainer = Trainer(section, base, work / strategy, work / f"checkpoints-{number}", job)
        if not unpadded:
            trainer.max_shared_len = 0
        trainer.peft.train()
        done = 0
        for step in range(10_000):
            if step == 1:
                began = time.perf_counter()
            _, _, count = trainer._optimizer_step()
            trainer.step += 1
            done += count * (step > 0)
            if done >= tokens:
                break
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return {"tokens_per_s": done / seconds, "tokens": done, "steps": trainer.step - 1}


def bench(args: argparse.Namespace) -> dict:
    base, work = measure.need(ROOT / "build" / "base"), measure.fresh(SCRATCH / "packing")
    write_rows(work / "rows.jsonl")
    for strategy in ("packing", "line-by-line"):
        prepare(work, base, strategy)

    def contender(way: str):
        def run(number: int) -> dict:
            with contextlib.redirect_stdout(sys.stderr):
                return train(work, base, way, args.tokens, number)

        return run

    runs = measure.interleaved(args.rounds, **{way: contender(way) for way in WAYS})
    speed = {way: [run["tokens_per_s"] for run in runs[way]] for way in WAYS}
    bars = [bar(f"packing: real tokens/s over {way}", ratios(speed["packing"], speed[way])) for way in list(WAYS)[1:]]
    table = [["", "real tokens/s", "steps"]]
    for way in WAYS:
        table.append([way, f"{sorted(speed[way])[len(speed[way]) // 2]:.0f}", str(runs[way][0]["steps"])])
    from slmake.training.data import Data

    rows, packed = (Data(work / strategy / "train.parquet") for strategy in ("line-by-line", "packing"))
    full = packed.sequence_lengths.mean() / MAX_SEQ_LEN
    notes = [
        f"{len(rows)} rows of {rows.lengths.min()} to {rows.lengths.max()} tokens, {rows.lengths.mean():.0f} on average; "
        f"{len(packed.sequence_lengths)} packed sequences, {full:.1%} full."
    ]
    return {"bars": bars, "tables": [table], "notes": notes, "runs": runs}
