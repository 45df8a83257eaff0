# slmake: from a dataset and a base model to a checked int4 ONNX model.
#
#     snakemake --cores all                  build what params.yaml asks for
#     snakemake --cores all build/adapter    build one thing and what it needs
#     snakemake -n                           say what would run, and why
#
# Rules stand in execution order. Commands, environments and resources are written here and nowhere else: dvc.yaml is
# generated from this file (`make dvc.yaml`). Every knob is in params.yaml; each rule runs again when its own section,
# its inputs or its script change.

import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(Path(workflow.basedir, "scripts")))

from common.errors import UserError
from common.outputs import own_copy
from common.params import as_json, load
from sources.syntax import is_remote, local_path

if config:
    raise WorkflowError(f"--config and --configfile are not used here (got {', '.join(config)}): edit params.yaml.")
try:
    PARAMS = load("params.yaml")
except UserError as error:
    raise WorkflowError(str(error)) from None

# The rules' `python` is the one that runs Snakemake, also when its environment is not activated.
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]))

# DVC links small results read-only to its cache, too, and Snakemake refuses to replace a file that may not be written.
for result in Path("results").glob("*"):
    own_copy(result)

STAGES = PARAMS.all.stages
TUNED = "build/merged" if "merge" in STAGES else "build/base"  # what is exported
ONNX = f"build/onnx-{PARAMS.quantize.precision}"
DATA = [local_path(source) for source in PARAMS.prepare.files.values() if not is_remote(source)]
for file in DATA:
    if not Path(file).exists():  # Snakemake itself is content without an input while all outputs are there
        raise WorkflowError(f"prepare.source: {file}: no such file. Correct params.yaml, or bring the file back.")
PUBLISHED = ONNX  # what publish uploads
MODELS = {"base": "build/base", "merged": "build/merged" * ("merge" in STAGES), "onnx": ONNX * ("quantize" in STAGES)}
SCORED = {name: MODELS[name] for name in PARAMS.evaluate.models if MODELS[name]}
# A changed environment can change any result. (scripts/common/params.py is no input: `section` below holds its effect.)
ENVIRONMENT = ["envs/cpu.lock", "envs/cuda.lock", "scripts/common/outputs.py"]
# What brings data and models here. A remote source is no input file: its text in the section, with the pin, stands for its content.
SOURCES = [f"scripts/sources/{name}.py" for name in ("azureml", "blob", "download", "hub", "mlflow", "resolve", "syntax")]


localrules:
    all,


rule all:
    input:
        "build/base",
        "build/dataset",
        ["build/adapter"] * ("finetune" in STAGES),
        ["build/merged"] * ("merge" in STAGES),
        [ONNX] * ("quantize" in STAGES),
        ["results/metrics.json"] * ("evaluate" in STAGES),
        ["results/gates.json"] * ("gates" in STAGES),
        ["results/published.json"] * ("publish" in STAGES),


rule fetch_model:
    input:
        script="scripts/fetch_model.py",
        modules=SOURCES,
        environment=ENVIRONMENT,
    output:
        model=directory("build/base"),
        report="results/base.json",
    log:
        "logs/fetch_model.log",
    benchmark:
        "benchmarks/fetch_model.tsv"
    params:
        section=lambda wildcards: as_json(PARAMS.fetch_model),
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --output {output.model}"
        " --report {output.report}"
        " --downloads build/downloads-model"
        " --log {log}"


rule prepare:
    input:
        script="scripts/prepare.py",
        modules=[
            "scripts/common/prompts.py",
            "scripts/dataset/duplicates.py",
            "scripts/dataset/rows.py",
            "scripts/dataset/store.py",
            *SOURCES,
        ],
        environment=ENVIRONMENT,
        data=DATA,
        base="build/base",
    output:
        dataset=directory("build/dataset"),
        report="results/dataset.json",
    log:
        "logs/prepare.log",
    benchmark:
        "benchmarks/prepare.tsv"
    threads: 2
    params:
        section=lambda wildcards: as_json(PARAMS.prepare),
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --base {input.base}"
        " --output {output.dataset}"
        " --report {output.report}"
        " --downloads build/downloads-data"
        " --log {log}"


rule finetune:
    input:
        script="scripts/finetune.py",
        modules=["scripts/lora.py"],
        environment=ENVIRONMENT,
        base="build/base",
        dataset="build/dataset",
    output:
        adapter=directory("build/adapter"),
        train_loss="results/train_loss.csv",
        eval_loss="results/eval_loss.csv",
    log:
        "logs/finetune.log",
    benchmark:
        "benchmarks/finetune.tsv"
    threads: 64
    params:
        section=lambda wildcards: as_json(PARAMS.finetune),
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --base {input.base}"
        " --dataset {input.dataset}"
        " --output {output.adapter}"
        " --train-loss {output.train_loss}"
        " --eval-loss {output.eval_loss}"
        " --checkpoints build/checkpoints"
        " --log {log}"


rule merge:
    input:
        script="scripts/merge.py",
        modules=["scripts/fetch_model.py", "scripts/finetune.py"],
        environment=ENVIRONMENT,
        base="build/base",
        adapter="build/adapter",
    output:
        model=directory("build/merged"),
    log:
        "logs/merge.log",
    benchmark:
        "benchmarks/merge.tsv"
    threads: 8
    params:
        section=lambda wildcards: as_json(PARAMS.merge),
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --base {input.base}"
        " --adapter {input.adapter}"
        " --output {output.model}"
        " --log {log}"


rule quantize:
    input:
        script="scripts/quantize.py",
        modules=["scripts/fetch_model.py"],
        environment=ENVIRONMENT,
        model=TUNED,
    output:
        model=directory(ONNX),
    log:
        "logs/quantize.log",
    benchmark:
        "benchmarks/quantize.tsv"
    threads: 8
    params:
        section=lambda wildcards: as_json(PARAMS.quantize),
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --model {input.model}"
        " --output {output.model}"
        " --log {log}"


rule evaluate:
    input:
        script="scripts/evaluate.py",
        modules=["scripts/common/prompts.py"],
        environment=ENVIRONMENT,
        dataset="build/dataset",
        models=list(SCORED.values()),
    output:
        metrics="results/metrics.json",
        benchmark="results/benchmark.json",
        predictions="results/predictions.csv",
    log:
        "logs/evaluate.log",
    benchmark:
        "benchmarks/evaluate.tsv"
    threads: 64
    params:
        section=lambda wildcards: as_json(PARAMS.evaluate),
        models=" ".join(f"--{name} {folder}" for name, folder in SCORED.items()),
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --dataset {input.dataset}"
        " {params.models}"
        " --metrics {output.metrics}"
        " --benchmark {output.benchmark}"
        " --predictions {output.predictions}"
        " --log {log}"


rule gates:
    input:
        script="scripts/gates.py",
        environment=ENVIRONMENT,
        metrics="results/metrics.json",
    output:
        "results/gates.json",
    log:
        "logs/gates.log",
    benchmark:
        "benchmarks/gates.tsv"
    params:
        section=lambda wildcards: as_json(PARAMS.gates),
    shell:
        "python {input.script}" " --params params.yaml" " --metrics {input.metrics}" " --output {output}" " --log {log}"


rule publish:
    input:
        script="scripts/publish.py",
        modules=["scripts/sources/blob.py", "scripts/sources/download.py"],
        model=PUBLISHED,
        metrics=["results/metrics.json"] * ("evaluate" in STAGES),
        gates=["results/gates.json"] * ("gates" in STAGES),  # a model that misses a gate is not published
    output:
        "results/published.json",
    log:
        "logs/publish.log",
    benchmark:
        "benchmarks/publish.tsv"
    params:
        section=lambda wildcards: as_json(PARAMS.publish),
        metrics=lambda wildcards, input: f"--metrics {input.metrics}" if input.metrics else "",
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --model {input.model}"
        " {params.metrics}"
        " --output {output}"
        " --log {log}"
