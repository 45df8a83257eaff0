"""What was built and damaged since: the next rule names the file and what to do, and leaves nothing of its own."""

import importlib
import re
import shutil
from pathlib import Path

import pytest
from project import digests

OUT = Path("out")
MODELS = [part for name in ("base", "adapter", "merged") for part in (f"--{name}", f"build/{name}")]
ARGUMENTS = {
    "gates": ["--metrics", "results/metrics.json", "--benchmark", "results/benchmark.json", "--output", OUT / "gates.json"],
    "evaluate": [
        *("--dataset", "build/dataset", *MODELS, "--onnx", "build/onnx-int4"),
        *("--metrics", OUT / "metrics.json", "--benchmark", OUT / "benchmark.json", "--predictions", OUT / "p.csv"),
    ],
    "merge": ["--base", "build/base", "--adapter", "build/adapter", "--output", OUT / "merged"],
    "quantize": ["--model", "build/merged", "--dataset", "build/dataset", "--output", OUT / "onnx"],
    "package": [
        *("--model", "build/onnx-int4", "--dataset", "build/dataset", "--lock", "envs/cpu.lock"),
        *("--base-report", "results/base.json", "--dataset-report", "results/dataset.json"),
        *("--metrics", "results/metrics.json", "--gates", "results/gates.json", "--output", OUT / "package"),
    ],
    "report": [
        *("--base-report", "results/base.json", "--dataset-report", "results/dataset.json"),
        *("--metrics", "results/metrics.json", "--timings", "results/benchmark.json"),
        *("--predictions", "results/predictions.csv", "--losses", "results/train_loss.csv", "--output", OUT),
    ],
    "ask": ["We buried the old dog"],
}  # fmt: skip
CUT = None  # the file loses its last bytes
AGAIN = "and run snakemake: it is built again"


@pytest.mark.parametrize(
    ("script", "file", "content", "told"),
    [
        ("gates", "results/metrics.json", '{"test_rows": 24, "ba', f"results/metrics.json is damaged: .* Remove results/metrics.json {AGAIN}"),
        ("gates", "results/metrics.json", "[]", "results/metrics.json is damaged: it has no `test_rows`"),
        ("gates", "results/metrics.json", '{"test_rows": 24}', "results/metrics.json is damaged: no model was scored in it"),
        ("gates", "results/metrics.json", '{"test_rows": 24, "base": {}, "int4": 5}', f"results/metrics.json is damaged: `base` has no `accuracy`. Remove results/metrics.json {AGAIN}"),
        ("report", "results/metrics.json", '{"test_rows": 24, "int4": {"accuracy": "high"}}', f"results/metrics.json is damaged: .* Remove results/metrics.json {AGAIN}"),
        ("report", "results/benchmark.json", '{"int4": 5}', "results/benchmark.json is damaged: `benchmark.int4` is not an object of figures"),
        ("gates", "results/benchmark.json", "[1]", "results/benchmark.json is damaged: it is no JSON object"),
        ("evaluate", "build/dataset/prompt.json", "{", f"build/dataset/prompt.json is damaged: .* Remove build/dataset {AGAIN}"),
        ("evaluate", "build/dataset/prompt.json", "{}", "build/dataset/prompt.json is damaged: it has no `prompt`"),
        ("evaluate", "build/dataset/test.parquet", CUT, "build/dataset/test.parquet"),
        ("evaluate", "build/adapter/adapter_model.safetensors", CUT, "build/adapter cannot be loaded: SafetensorError: "),
        ("evaluate", "build/adapter/adapter_config.json", "{", "build/adapter cannot be loaded: "),
        ("evaluate", "build/merged/model.safetensors", CUT, f"build/merged cannot be loaded: SafetensorError: .* Remove the folder {AGAIN}"),
        ("evaluate", "build/base/tokenizer.json", "{", "build/base cannot be loaded: "),
        ("evaluate", "build/onnx-int4/tokenizer.json", "{", "build/onnx-int4: ONNX Runtime cannot load this model: "),
        ("merge", "build/adapter/adapter_config.json", "{", f"build/adapter/adapter_config.json is damaged: .* Remove build/adapter {AGAIN}"),
        ("quantize", "build/merged/tokenizer.json", "{", "the model builder refused build/merged: "),
        ("package", "results/gates.json", "{}", "results/gates.json is damaged: it has no `gates`"),
        ("package", "results/base.json", "nope", "results/base.json is damaged: "),
        ("package", "build/onnx-int4/genai_config.json", "{", "build/onnx-int4/genai_config.json is damaged: "),
        ("report", "results/dataset.json", b"\xff", "results/dataset.json is damaged: "),
        ("report", "results/train_loss.csv", "step,loss\n1,2.5\n2,lots\n", "results/train_loss.csv, line 3, is damaged: could not convert"),
        ("report", "results/predictions.csv", "", "results/predictions.csv, line 1, is damaged: it has no column `row`"),
        ("report", "results/predictions.csv", "row,expected,merged,prompt\n1,a,b,c\n", "results/predictions.csv has 1 rows, results/metrics.json speaks of 24"),
        ("ask", "build/onnx-int4/model.onnx", CUT, "build/onnx-int4: ONNX Runtime cannot load this model: "),
    ],
)  # fmt: skip
def test_the_damaged_file_is_named(copy_of_built, monkeypatch, capsys, script, file, content, told):
    monkeypatch.chdir(copy_of_built)
    path = Path(file)
    data = path.read_bytes()[:-100] if content is CUT else content
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    before = digests(copy_of_built)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"{'tools' if script == 'ask' else 'scripts'}.{script}").main(
            ["--params", "params.yaml", *map(str, ARGUMENTS[script])]
        )
    assert stopped.value.code == 1
    message = capsys.readouterr().err.partition(f"{script}: error: ")[2]
    assert re.search(told, message), message
    assert digests(copy_of_built) == before
    assert not [name for name in OUT.rglob("*") if name.is_file()]


def test_a_missing_result_names_the_command_that_makes_it(copy_of_built, monkeypatch, capsys):
    monkeypatch.chdir(copy_of_built)
    shutil.rmtree("build/dataset")
    with pytest.raises(SystemExit):
        importlib.import_module("scripts.evaluate").main(["--params", "params.yaml", *map(str, ARGUMENTS["evaluate"])])
    assert "Build it with `snakemake --cores all build/dataset`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"), [("word " * 3000, "the text is too long: "), ("  ", "no text. Write: make ask TEXT=")]
)
def test_texts_that_cannot_be_asked(built, monkeypatch, capsys, text, told):
    monkeypatch.chdir(built)
    with pytest.raises(SystemExit):
        importlib.import_module("tools.ask").main([text])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{phrase} {} {{ }", "--help", "'; echo no; '"])
def test_texts_that_only_look_odd(built, monkeypatch, capsys, text):
    monkeypatch.chdir(built)
    importlib.import_module("tools.ask").main(["--", text])
    assert capsys.readouterr().out.endswith(" ms)\n")
