"""Merging: against a plain copy of the same bytes, and against PEFT's `merge_and_unload`.

A model of random bfloat16 weights in shards of 2 GiB (--merge-size, default 7b: 6.7 billion parameters) and an adapter of rank
16 on every linear layer. The plain copy is `shutil.copyfile` of every file, which copies inside the kernel. Before each run the source's pages
are dropped from the cache, and each run ends when its output is on the disk. `merge_and_unload` holds the whole model in
memory; where there is not enough, it gets a smaller one (--unload-size), and so do we beside it.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

from bench import measure, models
from bench.measure import SCRATCH, BenchError
from bench.results import bar, ratios


def options(parser: argparse.ArgumentParser) -> None:
    sizes = list(models.SIZES)
    parser.add_argument("--merge-size", choices=sizes, default="7b", help="merge: size of the model (default: 7b)")
    parser.add_argument("--unload-size", choices=sizes, default="1b", help="merge: size for merge_and_unload (1b)")


def copy(base: Path, target: Path) -> None:
    for path in base.iterdir():
        shutil.copyfile(path, target / path.name)


def timed(base: Path, target: Path, work) -> dict:
    """Seconds of `work(target)` from a cold cache until its output is on the disk."""
    shutil.rmtree(target, ignore_errors=True)
    measure.drop_cache(base)
    began = time.monotonic()
    took = work(target)
    at_end = time.monotonic() - began
    result = {"wall_s": at_end + measure.flush(target), "until_written_s": at_end}
    if took:
        result |= {"peak_bytes": took.peak, "cpu_s": took.cpu}
    shutil.rmtree(target)
    return result


def compare(size: str, rounds: int, unload: bool) -> dict[str, list[dict]]:
    """Copy, merge and (if asked) merge_and_unload in turn."""
    work = measure.fresh(SCRATCH / "merge")
    need = 4 * models.parameters(size) + 2**30
    if shutil.disk_usage(work).free < need:
        raise BenchError(f"{work}: {need / 1e9:.0f} GB of disk are needed for {size}. Choose a smaller --merge-size.")
    measure.say(f"writing a {size} model")
    base, adapter = models.write_model(work / "base", size), models.write_adapter(work / "adapter", size)
    params = measure.params(work / "params.yaml")
    arguments = ["--base", base, "--adapter", adapter, "--output"]

    def plain(_):
        def run(target: Path) -> None:
            target.mkdir()
            copy(base, target)

        return timed(base, work / "copy", run)

    contenders = {
        "copy": plain,
        "ours": lambda _: timed(
            base, work / "ours", lambda target: measure.script("merge", "--params", params, *arguments, target)
        ),
    }
    if unload:
        contenders["merge_and_unload"] = lambda _: timed(
            base, work / "unload", lambda target: measure.peer("unload", *arguments, target)[1]
        )
    try:
        return measure.interleaved(rounds, **contenders)
    finally:
        shutil.rmtree(work)


def bench(args: argparse.Namespace) -> dict:
    interpreter = measure.run([sys.executable, "-c", "import torch"]).peak
    runs = compare(args.merge_size, args.rounds, False)
    wall = {name: [run["wall_s"] for run in samples] for name, samples in runs.items()}
    above = [(run["peak_bytes"] - interpreter) / 2**30 for run in runs["ours"]]
    count = f"{models.parameters(args.merge_size) / 1e9:.1f} billion parameters"
    bars = [
        bar(f"merge: time over a plain copy, {count}", ratios(wall["ours"], wall["copy"]), at_most=1.5),
        bar("merge: peak memory above the interpreter with torch", above, at_most=1.0, unit="GiB"),
    ]
    table = [["model", "", "wall s", "CPU s", "peak memory, MB"]]

    def lines(size: str, measured: dict[str, list[dict]]) -> None:
        for name, samples in measured.items():
            cells = [
                f"{statistics.median(run[key] for run in samples) / scale:.{digits}f}" if key in samples[0] else ""
                for key, scale, digits in (("wall_s", 1, 1), ("cpu_s", 1, 1), ("peak_bytes", 1e6, 0))
            ]
            table.append([size, name, *cells])

    lines(args.merge_size, runs)
    small = None
    if measure.PEERS.exists():
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if 3 * models.parameters(args.unload_size) > free:
            raise BenchError(f"merge_and_unload of {args.unload_size} does not fit into the free memory.")
        small = compare(args.unload_size, args.rounds, True)
        lines(args.unload_size, small)
        pair = [[run["wall_s"] for run in small[name]] for name in ("merge_and_unload", "ours")]
        bars.append(bar(f"merge: speed over merge_and_unload ({args.unload_size})", ratios(*pair)))
        pair = [[run["peak_bytes"] for run in small[name]] for name in ("ours", "merge_and_unload")]
        bars.append(bar(f"merge: peak memory over merge_and_unload's ({args.unload_size})", ratios(*pair)))
    notes = [f"The interpreter with torch alone: {interpreter / 1e6:.0f} MB."]
    return {"bars": bars, "tables": [table], "notes": notes, "runs": runs, "small": small}
