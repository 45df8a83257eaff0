"""Nothing to do, and one changed parameter: in the scratch project that `job` leaves behind (built first if it is not there).

`snakemake --cores all` and `dvc repro` after everything is built; Olive asked again for what its cache holds; then one parameter of
`quantize` changes, and the rebuild's time is compared with what its rules quantize and evaluate report for themselves.
"""

import argparse
import statistics
import sys

import yaml

from bench import job, measure
from bench.job import PROJECT, snakemake
from bench.measure import SCRATCH, BenchError
from bench.results import bar


def options(parser: argparse.ArgumentParser) -> None:
    pass


def seconds(rule: str) -> float:
    """What Snakemake noted for a rule's last run."""
    return float((PROJECT / "benchmarks" / f"{rule}.tsv").read_text(encoding="utf-8").splitlines()[1].split("\t")[0])


def change_one_parameter() -> tuple[measure.ProcessUsage, float]:
    """Change a parameter of quantize and rebuild the scores: what that took, and the seconds of its rules alone.

    Raises:
        BenchError: more was rebuilt than the parameter asks for.
    """
    path = PROJECT / "params.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["quantize"]["block_size"] = 64 if content["quantize"]["block_size"] == 32 else 32
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    changed = snakemake("results/metrics.json")
    for rule in ("prepare", "finetune", "merge"):
        if f"rule {rule}:" in changed.output:
            raise BenchError(f"a changed quantize parameter ran {rule}")
    return changed, seconds("quantize") + seconds("evaluate")


def bench(args: argparse.Namespace) -> dict:
    if not (PROJECT / "build" / "onnx-int4").exists():
        job.new_project(
            finetune={"max_steps": args.job_steps or 8},
            gates={"min_accuracy": None, "max_accuracy_drop": None, "checks": []},
        )
    measure.say("building what is not there yet")
    snakemake()
    measure.run([sys.executable, "-m", "tools.record"], PROJECT)

    def dvc(_) -> dict:
        took = measure.run([sys.executable, "-m", "dvc", "repro"], PROJECT)
        if "Running stage" in took.output:
            raise BenchError(f"dvc repro found something to do:\n{took.output[-1000:]}")
        return {"wall_s": took.wall}

    def engine(_) -> dict:
        took = snakemake()
        if "Nothing to be done" not in took.output:
            raise BenchError(f"snakemake found something to do:\n{took.output[-1000:]}")
        return {"wall_s": took.wall}

    contenders = {"snakemake": engine, "dvc repro": dvc}
    folder = SCRATCH / "job"
    if (folder / "olive" / "cache").exists():
        arguments = [
            "--base",
            PROJECT / "build" / "base",
            "--rows",
            folder / "rows.jsonl",
            "--hyper",
            folder / "hyper.json",
        ]
        arguments += ["--output", folder / "olive", "--merge"]
        contenders["olive"] = lambda _: {"wall_s": measure.peer("olive_run", *arguments)[1].wall}
    runs = measure.interleaved(args.rounds, **contenders)

    changed, alone = change_one_parameter()
    wall = {name: [run["wall_s"] for run in samples] for name, samples in runs.items()}
    bars = [
        bar("nothing to do: snakemake --cores all", wall["snakemake"], at_most=1.2, unit="s"),
        bar("nothing to do: dvc repro", wall["dvc repro"], at_most=8, unit="s"),
        bar(
            "one changed quantize parameter: time over quantize and evaluate alone", [changed.wall / alone], at_most=1.1
        ),
    ]
    if "olive" in wall:
        pair = [a / b for a, b in zip(wall["olive"], wall["snakemake"], strict=True)]
        bars.append(bar("nothing to do: speed over Olive", pair))
    notes = [f"Changed parameter: {changed.wall:.0f} s, of which quantize and evaluate {alone:.0f} s."]
    if "olive" in wall:
        notes.append(f"Olive with a full cache: {statistics.median(wall['olive']):.0f} s.")
    return {"bars": bars, "tables": [], "notes": notes, "runs": runs}
