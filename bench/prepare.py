"""Preparing: memory and speed from a thousand to a million rows.

Distinct short rows (3 to 40 words, drawn from the words of data/dataset.json, four labels); scripts/prepare.py with the parameters of
params.yaml as a child process. Memory is its own peak. A tiny tokenizer first, then that of build/base up to 100,000 rows.
"""

import argparse
import json
import random
import re
import shutil
import sys
from pathlib import Path

from bench import measure
from bench.measure import ROOT, SCRATCH
from bench.results import bar, exponent

TONES = ("sadness", "joy", "fear", "surprise")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000], help="prepare: rows"
    )


def make_rows(path: Path, count: int, seed: int = 42) -> None:
    """Write `count` labelled rows, as JSON Lines or as one JSON array by the file's ending."""
    phrases = [row["phrase"] for row in json.loads((ROOT / "data" / "dataset.json").read_text(encoding="utf-8"))]
    words = sorted({word for phrase in phrases for word in re.findall(r"[\w']+", phrase)})
    lengths = [len(phrase.split()) for phrase in phrases]
    draw = random.Random(seed)
    array = path.suffix == ".json"
    with open(path, "w", encoding="utf-8") as handle:
        for number in range(count):
            phrase = " ".join(draw.choices(words, k=draw.choice(lengths)))
            line = json.dumps({"phrase": phrase, "tone": TONES[number % len(TONES)]})
            handle.write(("[\n" if array and not number else ",\n" if array else "") + line + ("" if array else "\n"))
        handle.write("\n]\n" if array else "")


def prepared(source: Path, base: Path, work: Path) -> measure.ProcessUsage:
    """One run of scripts/prepare.py."""
    params = measure.params(work / "params.yaml", prepare={"source": str(source)})
    arguments = ["--params", params, "--base", base, "--output", work / "dataset", "--report", work / "report.json"]
    took = measure.script("prepare", *arguments)
    shutil.rmtree(work / "dataset")
    (work / "report.json").unlink()
    return took


def bench(args: argparse.Namespace) -> dict:
    work = measure.fresh(SCRATCH / "prepare")
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import make_tokenizer

    make_tokenizer(work / "tiny")
    real = ROOT / "build" / "base"
    table = [["tokenizer", "rows", "wall s", "CPU s", "rows a minute", "rows a CPU minute", "peak memory, MB"]]
    runs: dict[str, dict[int, list[dict]]] = {}
    bars, curve = [], {}
    for base in [work / "tiny", *[real] * real.exists()]:
        samples = runs[base.name] = {}
        for count in args.rows:
            if base == real and count > 100_000:
                continue
            make_rows(work / "rows.jsonl", count)
            samples[count] = []
            for _ in range(args.rounds if count < 1_000_000 else 1):
                measure.say(f"{count:,} rows, tokenizer of {base.name}")
                took = prepared(work / "rows.jsonl", base, work)
                samples[count].append({"wall_s": took.wall, "cpu_s": took.cpu, "peak_bytes": took.peak})
            wall, cpu, peak = (min(run[key] for run in samples[count]) for key in ("wall_s", "cpu_s", "peak_bytes"))
            speeds = [f"{count / wall * 60:,.0f}", f"{count / cpu * 60:,.0f}"]
            table.append([base.name, f"{count:,}", f"{wall:.1f}", f"{cpu:.1f}", *speeds, f"{peak / 1e6:.0f}"])
        most = max(samples)
        speed = [most / run["wall_s"] * 60 for run in samples[most]]
        bars.append(
            bar(f"prepare: {most:,} rows, tokenizer of {base.name}", speed, at_least=200_000, unit="rows a minute")
        )
        if base != real and len(samples) > 1:
            growth = samples[most][0]["peak_bytes"] / samples[min(samples)][0]["peak_bytes"]
            name = f"prepare: peak memory of {most:,} rows over that of {min(samples):,}"
            bars.append(bar(name, [growth], at_most=1.25))
            walls = [min(run["wall_s"] for run in samples[count]) for count in samples]
            memory = [min(run["peak_bytes"] for run in samples[count]) / 1e6 for count in samples]
            curve = {"prepare, whole": {"unit": "rows", "sizes": list(samples), "seconds": walls, "megabytes": memory}}
            fitted = exponent(list(samples)[-2:], walls[-2:])
            bars.append(bar("growth: prepare, by rows", [fitted], at_most=1.1, unit="exponent"))
    shutil.rmtree(work)
    return {"bars": bars, "tables": [table], "notes": [], "runs": runs, "curves": curve}
