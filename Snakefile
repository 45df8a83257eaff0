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
from snakemake.settings.types import DeploymentMethod

sys.path.insert(0, str(Path(workflow.basedir, "scripts")))

import container as containers
import slurm
from common.errors import UserError
from common.params import as_json, load

if config:
    raise WorkflowError(f"--config and --configfile are not used here (got {', '.join(config)}): edit params.yaml.")
try:
    PARAMS = load("params.yaml")
except UserError as error:
    raise WorkflowError(str(error)) from None

# The rules' `python` is the one that runs Snakemake, also when its environment is not activated.
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]))

# With profiles/container or profiles/slurm, rules run in this image; without a profile or an image, in this environment.
CONTAINER = PARAMS.all.container
IMAGE = lambda wildcards: containers.image(CONTAINER)
IN_CONTAINERS = DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method

STAGES = PARAMS.all.stages
TUNED = "build/merged" if "merge" in STAGES else "build/base"  # what is exported
ONNX = f"build/onnx-{PARAMS.quantize.precision}"
SOURCE = PARAMS.prepare.source
DATA = [SOURCE] if isinstance(SOURCE, str) else [file for file in (SOURCE.train, SOURCE.eval, SOURCE.test) if file]
for file in DATA:
    if not Path(file).exists():  # Snakemake itself is content without an input while all outputs are there
        raise WorkflowError(f"prepare.source: {file}: no such file. Correct params.yaml, or bring the file back.")
MODELS = {"base": "build/base", "merged": "build/merged" * ("merge" in STAGES), "onnx": ONNX * ("quantize" in STAGES)}
SCORED = {name: MODELS[name] for name in PARAMS.evaluate.models if MODELS[name]}
# A changed environment can change any result. (scripts/common/params.py is no input: `section` below holds its effect.)
ENVIRONMENT = ["envs/cpu.lock", "envs/cuda.lock", "scripts/common/outputs.py"]


try:
    if CONTAINER and IN_CONTAINERS:
        containers.prepare(CONTAINER, [*DATA, PARAMS.fetch_model.source], online=["scripts/fetch_model.py"])
    if not workflow.is_main_process:
        slurm.refuse_missing_gpu(CONTAINER if IN_CONTAINERS else None)
except UserError as error:
    raise WorkflowError(str(error)) from None


onstart:
    if CONTAINER and IN_CONTAINERS:
        try:
            containers.check(CONTAINER)
        except UserError as error:
            raise WorkflowError(str(error)) from None
    elif IN_CONTAINERS and workflow.local_exec:
        raise WorkflowError(
            "all.container in params.yaml names no image. `make image sif` builds one and prints the line."
        )
    elif CONTAINER and "SLMAKE_MACHINE" not in os.environ:
        print(
            f"note: not in {containers.image(CONTAINER)}: that takes --profile profiles/container.", file=sys.stderr
        )


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


rule fetch_model:
    input:
        script="scripts/fetch_model.py",
        environment=ENVIRONMENT,
    output:
        model=directory("build/base"),
        report="results/base.json",
    log:
        "logs/fetch_model.log",
    benchmark:
        "benchmarks/fetch_model.tsv"
    container:
        IMAGE
    resources:
        mem_mb=slurm.memory(8000),
        runtime=120,
    params:
        section=lambda wildcards: as_json(PARAMS.fetch_model),
        container=CONTAINER,
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --output {output.model}"
        " --report {output.report}"
        " --log {log}"


rule prepare:
    input:
        script="scripts/prepare.py",
        modules=[
            "scripts/common/prompts.py",
            "scripts/dataset/duplicates.py",
            "scripts/dataset/rows.py",
            "scripts/dataset/store.py",
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
    container:
        IMAGE
    threads: 2
    resources:
        mem_mb=slurm.memory(4000),
        runtime=60,
    params:
        section=lambda wildcards: as_json(PARAMS.prepare),
        container=CONTAINER,
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --base {input.base}"
        " --output {output.dataset}"
        " --report {output.report}"
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
    container:
        IMAGE
    threads: 64
    resources:
        mem_mb=slurm.memory(6000, 4),
        runtime=720,
    params:
        section=lambda wildcards: as_json(PARAMS.finetune),
        container=CONTAINER,
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
    container:
        IMAGE
    threads: 8
    resources:
        mem_mb=slurm.memory(4000, 2),
        runtime=60,
    params:
        section=lambda wildcards: as_json(PARAMS.merge),
        container=CONTAINER,
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
    container:
        IMAGE
    threads: 8
    resources:
        mem_mb=slurm.memory(6000, 4),
        runtime=240,
    params:
        section=lambda wildcards: as_json(PARAMS.quantize),
        container=CONTAINER,
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
    container:
        IMAGE
    threads: 64
    resources:
        mem_mb=slurm.memory(6000, 3),
        runtime=240,
    params:
        section=lambda wildcards: as_json(PARAMS.evaluate),
        container=CONTAINER,
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
    container:
        IMAGE
    resources:
        mem_mb=slurm.memory(1000),
        runtime=10,
    params:
        section=lambda wildcards: as_json(PARAMS.gates),
        container=CONTAINER,
    shell:
        "python {input.script}" " --params params.yaml" " --metrics {input.metrics}" " --output {output}" " --log {log}"
