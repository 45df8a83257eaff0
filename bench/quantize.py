"""Quantizing: scripts/quantize.py against the bare model builder, the same options in the same version.

The builder's command line gets the very options that the script computes from params.yaml (the 8-bit products included), with
`calibration: none`, because it has no calibration. The script also checks the graph, loads the model and makes it generate.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

from bench import measure
from bench.measure import ROOT, SCRATCH
from bench.results import bar, ratios


def options(parser: argparse.ArgumentParser) -> None:
    pass


def builder_command(params: Path, model: Path, output: Path, cache: Path) -> list[object]:
    """The bare builder's command for the section quantize of a parameter file."""
    from slmake.export import builder
    from slmake.params import section

    quantize = section(params, "quantize")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", output]
    command += ["-p", quantize.precision, "-e", quantize.execution_provider, "-c", cache]
    command += ["--extra_options", *[f"{key}={value}" for key, value in builder.builder_options(quantize).items()]]
    if quantize.int8_nodes:
        weights: dict = {"overrides": builder.int8_overrides(quantize, model, builder.PARTS)}
        if builder.shares_embeddings(quantize, model):
            weights["op_types"] = ["MatMul", "Gather"]
        command += ["--builder_config_version", "2"]
        command += ["--target_options", json.dumps({"quant_config": {"weights": weights}})]
    return command


def bench(args: argparse.Namespace) -> dict:
    merged = ROOT / "build" / "merged"
    model = merged if merged.exists() else measure.need(ROOT / "build" / "base")
    work = measure.fresh(SCRATCH / "quantize")
    plain = measure.params(work / "plain.yaml", quantize={"calibration": "none"})
    full = measure.params(work / "full.yaml")
    dataset = measure.need(ROOT / "build" / "dataset")

    def ours(params: Path) -> dict:
        shutil.rmtree(work / "ours", ignore_errors=True)
        arguments = ["--params", params, "--model", model, "--dataset", dataset, "--output", work / "ours"]
        took = measure.script("quantize", *arguments)
        return {"wall_s": took.wall, "cpu_s": took.cpu, "peak_bytes": took.peak}

    def bare(_) -> dict:
        shutil.rmtree(work / "bare", ignore_errors=True)
        took = measure.run(builder_command(plain, model, work / "bare", work / "cache"))
        return {"wall_s": took.wall, "cpu_s": took.cpu, "peak_bytes": took.peak}

    runs = measure.interleaved(
        args.rounds, builder=bare, ours=lambda _: ours(plain), **{"ours with calibration": lambda _: ours(full)}
    )

    def column(name: str, key: str) -> list[float]:
        return [run[key] for run in runs[name]]

    bars = [
        bar(
            "quantize: time over the bare builder",
            ratios(column("ours", "wall_s"), column("builder", "wall_s")),
            at_most=1.1,
        ),
        bar(
            "quantize: peak memory over the bare builder's",
            ratios(column("ours", "peak_bytes"), column("builder", "peak_bytes")),
            at_most=1.0,
        ),
        bar(
            "quantize: time with GPTQ calibration over the bare builder",
            ratios(column("ours with calibration", "wall_s"), column("builder", "wall_s")),
            at_most=2.0,
        ),
    ]
    table = [["", "wall s", "CPU s", "peak memory, MB"]]
    for name in runs:
        wall, cpu, peak = (statistics.median(column(name, key)) for key in ("wall_s", "cpu_s", "peak_bytes"))
        table.append([name, f"{wall:.1f}", f"{cpu:.1f}", f"{peak / 1e6:.0f}"])
    shutil.rmtree(work)
    return {"bars": bars, "tables": [table], "notes": [f"Model: {model.relative_to(ROOT)}."], "runs": runs}
