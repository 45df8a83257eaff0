"""The whole job, and the time to an accuracy: from the dataset to an int4 model that has been evaluated.

Ours is `snakemake` with params.yaml in a copy of the project, where only the base model is there. Olive runs LoRA, its merge and its ModelBuilder
as one `olive run`; TRL's user trains, calls merge_and_unload and runs the bare model builder. The peers' exports have 4 bits in blocks of 32 at
accuracy level 4, as ours. Then every int4 model is scored on the same test rows by the same script (scripts/evaluate.py), which counts for everyone.
Same rows, rank, learning rates and number of steps. The time to an accuracy is the time until the int4 model is there, for those whose model
reaches it; the bound is gates.min_accuracy of params.yaml.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from bench import finetune, measure
from bench.measure import ROOT, SCRATCH
from bench.results import bar, ratios

PROJECT = SCRATCH / "project"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--job-steps", type=int, help="job: optimizer steps (default: those of params.yaml)")
    parser.add_argument("--job-rounds", type=int, default=1, help="job: rounds (default: 1)")


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def snakemake(*words: str, env: dict[str, str] | None = None) -> measure.ProcessUsage:
    """Run Snakemake in the scratch project."""
    command = [sys.executable, "-m", "snakemake", "--cores", "all", "--nocolor", *words]
    return measure.run(command, PROJECT, env)


def new_project(**changes: dict) -> None:
    """A fresh copy of what Git tracks, with nothing built but the base model."""
    measure.fresh(PROJECT)
    for name in filter(None, git(ROOT, "ls-files", "-z").split("\0")):
        if not name.startswith("results/") and (ROOT / name).is_file():
            (PROJECT / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, PROJECT / name)
    measure.params(PROJECT / "params.yaml", ROOT / "params.yaml", **changes)
    (PROJECT / ".venv").symlink_to(ROOT / ".venv")
    git(PROJECT, "init", "--quiet")
    measure.say("fetching the base model")
    snakemake("build/base")


def steps_of_params() -> int:
    """Optimizer steps that params.yaml asks for."""
    from slmake.params import section
    from slmake.training.data import Data
    from slmake.training.schedule import Schedule

    rows = Data(measure.need(ROOT / "build" / "dataset") / "train.parquet")
    return Schedule(section(ROOT / "params.yaml", "finetune"), rows.lengths).steps


def import_seconds(folder: Path) -> dict[str, float]:
    """Seconds of imports by rule, from the lines that PYTHONPROFILEIMPORTTIME left in the logs."""
    seconds = {}
    for log in sorted(folder.glob("*.log")):
        lines = re.findall(r"^import time:\s+(\d+) \|", log.read_text(encoding="utf-8", errors="replace"), re.M)
        seconds[log.stem] = sum(map(int, lines)) / 1e6
    return seconds


def score(dataset: Path, onnx: Path, work: Path) -> tuple[float, measure.ProcessUsage]:
    """Accuracy of an exported model on the test split, and what scoring it took."""
    work.mkdir(parents=True, exist_ok=True)
    arguments = ["--params", PROJECT / "params.yaml", "--dataset", dataset, "--onnx", onnx]
    files = {name: work / f"{name}.json" for name in ("metrics", "benchmark", "predictions")}
    for name, path in files.items():
        path.unlink(missing_ok=True)
        arguments += [f"--{name}", path]
    took = measure.script("evaluate", *arguments)
    return json.loads(files["metrics"].read_text(encoding="utf-8"))["int4"]["accuracy"], took


def ours(imports: bool) -> dict:
    """Build the int4 model, then evaluate it, with nothing but the base model there."""
    for name in ("dataset", "adapter", "merged", "onnx-int4", "checkpoints"):
        shutil.rmtree(PROJECT / "build" / name, ignore_errors=True)
    for path in (PROJECT / "results").glob("*"):
        if path.name != "base.json":
            path.unlink()
    env = {"PYTHONPROFILEIMPORTTIME": "1"} if imports else None
    built = snakemake("build/onnx-int4", env=env)
    scored = snakemake("results/metrics.json", env=env)
    metrics = json.loads((PROJECT / "results" / "metrics.json").read_text(encoding="utf-8"))
    result = {
        "int4_s": built.wall,
        "wall_s": built.wall + scored.wall,
        "peak_bytes": max(built.peak, scored.peak),
        "accuracy": metrics["int4"]["accuracy"],
        "rules": {
            path.stem: float(path.read_text(encoding="utf-8").splitlines()[1].split("\t")[0])
            for path in sorted((PROJECT / "benchmarks").glob("*.tsv"))
            if path.stem != "fetch_model"
        },
    }
    if imports:
        engine = re.findall(r"^import time:\s+(\d+) \|", built.output + scored.output, re.M)
        result["imports"] = import_seconds(PROJECT / "logs") | {"snakemake": sum(map(int, engine)) / 1e6}
        result["imports"].pop("fetch_model", None)
    return result


def olive(base: Path, dataset: Path, rows: Path, hyper: Path, work: Path) -> dict:
    measure.fresh(work)
    arguments = ["--base", base, "--rows", rows, "--hyper", hyper, "--output", work, "--merge"]
    report, took = measure.peer("olive_run", *arguments)
    accuracy, scored = score(dataset, Path(report["folder"]), work / "scores")
    peak = max(took.peak, scored.peak)
    return {"int4_s": took.wall, "wall_s": took.wall + scored.wall, "peak_bytes": peak, "accuracy": accuracy}


def trl(base: Path, dataset: Path, rows: Path, hyper: Path, work: Path) -> dict:
    measure.fresh(work)
    arguments = ["--base", base, "--rows", rows, "--hyper", hyper, "--output", work, "--merge"]
    _, took = measure.peer("trl_sft", *arguments)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", work / "merged", "-o", work / "int4"]
    provider = json.loads(hyper.read_text(encoding="utf-8"))["provider"].lower()
    command += ["-p", "int4", "-e", provider, "-c", work / "cache", "--extra_options", "hf_token=false"]
    built = measure.run([*command, "algo_config=rtn", "block_size=32", "accuracy_level=4"])
    accuracy, scored = score(dataset, work / "int4", work / "scores")
    peak = max(took.peak, built.peak, scored.peak)
    ready = took.wall + built.wall
    return {"int4_s": ready, "wall_s": ready + scored.wall, "peak_bytes": peak, "accuracy": accuracy}


def accuracy_bars(runs: dict[str, list[dict]], bound: float) -> list[dict]:
    """Bars of the time to an accuracy, over each peer's."""

    def column(name: str, key: str) -> list[float]:
        return [run[key] for run in runs[name]]

    bars = []
    for name, wanted in (("olive", 3.0), ("trl", 2.0)):
        if name not in runs:
            continue
        reached = [run["accuracy"] >= bound for run in runs[name]]
        we = all(run["accuracy"] >= bound for run in runs["ours"])
        note = "" if all(reached) else f"the peer's int4 model does not reach it ({max(column(name, 'accuracy')):.1%})"
        pair = ratios(column(name, "int4_s"), column("ours", "int4_s"))
        comparison = bar(f"time to {bound:.0%} accuracy in int4: speed over {name}", pair, at_least=wanted, note=note)
        if not we:
            comparison |= {
                "met": False,
                "note": f"ours does not reach it ({min(column('ours', 'accuracy')):.1%}). {note}",
            }
        elif not all(reached):
            # No bar to meet or miss: there is no time to compare with.
            note = f"{note}, so there is no bar ({wanted:g} x was wanted): the ratio is that of the whole runs"
            comparison |= {"met": None, "at_least": None, "note": note}
        bars.append(comparison)
    return bars


def bench(args: argparse.Namespace) -> dict:
    import yaml

    steps = args.job_steps or steps_of_params()
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    bound = content["gates"]["min_accuracy"] or 0.8
    new_project(
        finetune={"max_steps": steps},
        evaluate={"models": ["onnx"]},
        gates={"min_accuracy": None, "max_accuracy_drop": None, "checks": []},
    )
    snakemake("build/dataset")
    work = measure.fresh(SCRATCH / "job")
    dataset, base = work / "dataset", PROJECT / "build" / "base"
    shutil.copytree(PROJECT / "build" / "dataset", dataset)
    finetune.write_rows(dataset, work / "rows.jsonl")
    dtype = finetune.our_dtype()
    (work / "hyper.json").write_text(json.dumps(finetune.hyper_parameters(steps, dtype)), encoding="utf-8")
    inputs = (base, dataset, work / "rows.jsonl", work / "hyper.json")
    contenders = {"ours": lambda number: ours(number == 0)}
    if "olive" in args.peers:
        contenders["olive"] = lambda _: olive(*inputs, work / "olive")
    if "trl" in args.peers:
        contenders["trl"] = lambda _: trl(*inputs, work / "trl")
    runs = measure.interleaved(args.job_rounds, **contenders)

    def column(name: str, key: str) -> list[float]:
        return [run[key] for run in runs[name]]

    bars = []
    for name, title, wanted in (("olive", "Olive", 2.5), ("trl", "TRL", 3.0)):
        if name in runs:
            pair = ratios(column(name, "wall_s"), column("ours", "wall_s"))
            bars.append(bar(f"whole job: speed over {title}", pair, at_least=wanted))
    if "olive" in runs:
        pair = ratios(column("ours", "peak_bytes"), column("olive", "peak_bytes"))
        bars.append(bar("whole job: peak memory over Olive's", pair, at_most=1.0))
    first = runs["ours"][0]
    starting = sum(first["imports"].values()) / first["wall_s"]
    bars.append(bar("whole job: share of imports, Snakemake's own included", [100 * starting], at_most=15, unit="%"))
    bars += accuracy_bars(runs, bound)
    table = [["", "s to the int4 model", "s to its scores", "peak memory, MB", "accuracy (int4)"]]
    for name, samples in runs.items():
        for run in samples:
            cells = [f"{run['int4_s']:.0f}", f"{run['wall_s']:.0f}", f"{run['peak_bytes'] / 1e6:.0f}"]
            table.append([name, *cells, f"{run['accuracy']:.1%}"])
    rules = ", ".join(f"{name} {seconds:.0f}" for name, seconds in first["rules"].items())
    imports = ", ".join(f"{name} {seconds:.1f}" for name, seconds in first["imports"].items())
    notes = [
        f"{steps} steps. Peak memory is that of the largest process.",
        f"Seconds of our rules: {rules}.",
        f"Seconds of imports: {imports}. The interpreter's own start, 0.02 s a job, is not in it.",
    ]
    for name in ("olive", "trl"):  # models only; the configuration and Olive's cache stay for `noop`
        for folder in ("trainer", "merged", "adapter"):
            shutil.rmtree(work / name / folder, ignore_errors=True)
    return {"bars": bars, "tables": [table], "notes": notes, "runs": runs, "load": os.getloadavg()[0]}
