"""Measure memory and speed of `prepare` from a thousand to a million rows.

    .venv/bin/python bench/prepare.py                                     # all sizes, tiny tokenizer and build/base
    .venv/bin/python bench/prepare.py --sizes 1000 10000 --formats jsonl  # a minute

Makes data sets of distinct short rows (3 to 40 words, drawn from the words of data/dataset.json), runs scripts/prepare.py on
each as a child process with the parameters of params.yaml, and prints a Markdown table: peak resident memory, CPU and wall
time, rows a minute, and memory as a ratio to the smallest. Rows a minute are by CPU time (user and system, all threads),
which other work on the machine disturbs least, and by wall time.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
TONES = ("sadness", "joy", "fear", "surprise")


class Run(NamedTuple):
    """What one child process took."""

    rows: int
    kind: str
    peak: int  # bytes
    cpu: float  # seconds, user and system
    wall: float  # seconds


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


def measure(source: Path, base: Path, rows: int) -> Run:
    """Run scripts/prepare.py on one file; the child's own peak memory and times.

    Raises:
        SystemExit: prepare failed.
    """
    folder = source.parent
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["prepare"]["source"] = str(source)
    (folder / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    command = [sys.executable, ROOT / "scripts" / "prepare.py", "--params", folder / "params.yaml", "--base", base]
    command += ["--output", folder / "dataset", "--report", folder / "dataset-report.json", "--log", folder / "log"]
    began = time.monotonic()
    child = subprocess.Popen([str(part) for part in command])
    _, status, used = os.wait4(child.pid, 0)
    wall = time.monotonic() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"bench: prepare failed on {source.name}; see the message above.")
    for path in (*(folder / "dataset").iterdir(), folder / "dataset-report.json"):
        path.unlink()
    (folder / "dataset").rmdir()
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(rows, source.suffix[1:], used.ru_maxrss * unit, used.ru_utime + used.ru_stime, wall)


def table(runs: list[Run]) -> str:
    """Markdown rows of some runs; ratios are to the first."""
    start = runs[0]
    lines = [
        "| rows | format | peak memory | ratio | CPU s | wall s | rows / CPU minute | rows / minute |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        lines.append(
            f"| {run.rows:,} | {run.kind} | {run.peak / 1e6:.0f} MB | {run.peak / start.peak:.2f} | {run.cpu:.1f} | {run.wall:.1f} "
            f"| {run.rows / run.cpu * 60:,.0f} | {run.rows / run.wall * 60:,.0f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000], help="rows")
    parser.add_argument(
        "--formats", nargs="+", choices=["jsonl", "json"], default=["jsonl", "json"], help="file formats"
    )
    parser.add_argument("--base", type=Path, default=ROOT / "build" / "base", help="also measure with this tokenizer")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import make_tokenizer

    with tempfile.TemporaryDirectory(prefix="slmake-bench-") as work:
        tiny = Path(work, "tiny")
        make_tokenizer(tiny)
        for name, base in (("tiny tokenizer", tiny), (f"tokenizer of {args.base.name}", args.base)):
            if not base.is_dir():
                print(
                    f"bench: {base}: no such folder; build it with `snakemake --cores all build/base`.", file=sys.stderr
                )
                continue
            runs = []
            for kind in args.formats:
                for size in args.sizes if kind == "jsonl" or base == tiny else []:
                    source = Path(work, f"rows.{kind}")
                    make_rows(source, size)
                    runs.append(measure(source, base.resolve(), size))
                    source.unlink()
            print(f"\n{name}\n\n{table(runs)}\n", flush=True)


if __name__ == "__main__":
    main()
