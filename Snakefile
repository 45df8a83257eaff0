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
import remote
import search
import slurm
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

# With profiles/container or profiles/slurm, rules run in this image; without a profile or an image, in this environment.
CONTAINER = PARAMS.all.container
IMAGE = lambda wildcards: containers.image(CONTAINER)
IN_CONTAINERS = DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method

# DVC links single files read-only to its cache, too, and Snakemake refuses to replace a file that may not be written.
# (`make pull` sets the times of what it pulled, on both ends of the link: on a copy they would be lost when DVC links again.)
for folder in () if "SLMAKE_PULL" in os.environ else ("results", "build/report"):
    for result in Path(folder).glob("*"):
        own_copy(result)

STAGES = PARAMS.all.stages
TUNED = "build/merged" if "merge" in STAGES else "build/base"  # what is exported
ONNX = f"build/onnx-{PARAMS.quantize.precision}"
DATA = [local_path(source) for source in PARAMS.prepare.files.values() if not is_remote(source)]
PUBLISHED_METRICS = [PARAMS.gates.published] * (PARAMS.gates.published is not None)
SIGNING_KEY = [PARAMS.package.signing_key] * bool(PARAMS.package.signing_key)
# Snakemake itself is content without an input while all outputs are there. Who allows one rule alone (DVC, Azure ML, Snakemake for
# a job) brings the inputs of that rule, and no others.
NEEDED = {
    "params.yaml: prepare.source": DATA,
    "params.yaml: gates.published": PUBLISHED_METRICS * bool({"gates", "report"} & set(STAGES)),
    "params.yaml: package.license_files": PARAMS.package.license_files * ("package" in STAGES),
    "params.yaml: package.signing_key": SIGNING_KEY * ("package" in STAGES),
    "environment": ["envs/cpu.lock", "envs/cuda.lock"],
}
for name, files in () if "--allowed-rules" in sys.argv else NEEDED.items():
    for file in files:
        if "{" in file or "}" in file:
            raise WorkflowError(f"{name}: {file}: Snakemake takes braces for a wildcard. Rename the file.")
        if not os.path.isfile(file):  # False, where Path.exists raises, for a name that is too long
            found = "a folder, not a file" if os.path.isdir(file) else "no such file"
            raise WorkflowError(f"{name}: {file}: {found}. Correct the name, or bring the file back.")
PUBLISHED = "build/package" if "package" in STAGES else ONNX  # what publish uploads
MODELS = {
    "base": "build/base",
    "adapter": "build/adapter" * ("finetune" in STAGES),
    "merged": "build/merged" * ("merge" in STAGES),
    "onnx": ONNX * ("quantize" in STAGES),
}
SCORED = {name: MODELS[name] for name in PARAMS.evaluate.models if MODELS[name]}
if "adapter" in SCORED:
    SCORED["adapter-base"] = "build/base"
# Scripts that cannot change a package, and those of Azure ML and Olive, with what is in their folders.
OUTSIDE = ("ask", "commit", "dvc_yaml", "params_docs", "publish", "remote", "reproduce", "verify")
BESIDE = ("azureml.py", "azure_ml", "import_olive.py", "from_olive")
SEARCH = PARAMS.quantize.search if "quantize" in STAGES else None
try:
    CANDIDATES = [f"build/search/{number}" for number in range(search.count(PARAMS.quantize))] if SEARCH else []
except UserError as error:
    raise WorkflowError(str(error)) from None
SCORING = [
    "scripts/common/generation.py",
    "scripts/common/prompts.py",
    "scripts/scoring/questions.py",
    "scripts/scoring/runtimes.py",
    "scripts/scoring/scores.py",
]
# What the provenance of a package names: data, commands, scripts, environments, container recipes.
MATERIALS = [
    *DATA,
    "Snakefile",
    *sorted(
        str(path) for path in Path("scripts").rglob("*.py") if path.stem not in OUTSIDE and path.parts[1] not in BESIDE
    ),
    *("envs/cpu.lock", "envs/cuda.lock"),
    *sorted(map(str, Path("containers").glob("Containerfile*"))),
]
# A changed environment can change any result. (scripts/common/params.py is no input: `section` below holds its effect.)
ENVIRONMENT = ["envs/cpu.lock", "envs/cuda.lock", "scripts/common/outputs.py"]
# What brings data and models here. A remote source is no input file: its text in the section, with the pin, stands for its content.
SOURCES = [
    f"scripts/sources/{name}.py" for name in ("azureml", "blob", "download", "hub", "mlflow", "resolve", "syntax")
]


ONLINE = [
    "scripts/fetch_model.py",
    "scripts/publish.py",
    *["scripts/prepare.py"] * (len(DATA) < len(PARAMS.prepare.files)),
]
try:
    if CONTAINER and IN_CONTAINERS:
        containers.prepare(CONTAINER, [*DATA, PARAMS.fetch_model.source], online=ONLINE)
    if not workflow.is_main_process:
        slurm.refuse_missing_gpu(CONTAINER if IN_CONTAINERS else None)
except UserError as error:
    raise WorkflowError(str(error)) from None


onstart:
    for folder in ("build", "results", "logs", "benchmarks"):
        if Path(folder).exists() and not os.access(folder, os.W_OK):  # Snakemake would end in a traceback
            raise WorkflowError(
                f"cannot write to {folder}/: it is read-only here. Check its owner, its permissions and how it is mounted; "
                "what was built is untouched."
            )
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


onerror:
    if gone := remote.lost():
        print(
            f"note: {gone[0]} of the last recorded build is not here any more. Undo what you changed, then `make restore` brings it back "
            "from DVC's cache.",
            file=sys.stderr,
        )
    if not workflow.local_exec:
        for reason in slurm.reasons(Path(log[0]).read_text(encoding="utf-8")):
            print(f"error: {reason}", file=sys.stderr)


report: "report/workflow.rst"


localrules:
    all,


mark = report  # at the start of a line Snakemake would take `report` for a keyword
FIGURES = [
    mark(f"build/report/{file}", caption=f"report/{Path(file).stem}.rst", category=category, labels={"figure": title})
    for file, category, title in [
        ("overview.html", "1. Overview", "What was built from what"),
        ("scores.svg", "2. Quality", "Accuracy"),
        ("scores.html", "2. Quality", "All scores, parity and drops"),
        ("confusion.svg", "2. Quality", "Confusion matrices"),
        ("gates.html", "2. Quality", "Gates"),
        ("wrong_answers.html", "2. Quality", "Wrong answers"),
        ("loss.svg", "3. Training", "Loss"),
        ("data.svg", "3. Training", "Lengths and labels"),
        ("cost.html", "4. Cost", "Time and memory"),
        *[
            ("candidates.svg", "4. Cost", "Quantization candidates"),
            ("candidates.html", "4. Cost", "Quantization candidates, all figures"),
        ]
        * bool(SEARCH),
    ]
]


rule all:
    input:
        "build/base",
        "build/dataset",
        ["build/adapter"] * ("finetune" in STAGES),
        ["build/merged"] * ("merge" in STAGES),
        [ONNX] * ("quantize" in STAGES),
        ["results/metrics.json"] * ("evaluate" in STAGES),
        ["results/gates.json"] * ("gates" in STAGES),
        ["build/package"] * ("package" in STAGES),
        ["build/report/overview.html"] * ("report" in STAGES),
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
        " --downloads build/downloads-data"
        " --log {log}"


rule finetune:
    input:
        script="scripts/finetune.py",
        modules=[
            "scripts/batches.py",
            "scripts/devices.py",
            "scripts/fused.py",
            "scripts/lora.py",
            "scripts/prefix.py",
        ],
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
        nproc_per_node="auto",  # processes that train together: one per GPU; a profile's set-resources may say a number
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
        " --nproc-per-node {resources.nproc_per_node}"
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


# Only where quantize.search is set: candidates are jobs of their own, and `search` chooses among them.
rule candidate:
    input:
        script="scripts/candidate.py",
        modules=[
            "scripts/batches.py",
            "scripts/evaluate.py",
            "scripts/fetch_model.py",
            "scripts/gptq.py",
            "scripts/lora.py",
            "scripts/quantize.py",
            "scripts/search.py",
            *SCORING,
        ],
        environment=ENVIRONMENT,
        model=TUNED,
        dataset="build/dataset",
        reference=lambda wildcards: ["build/search/merged"] * (wildcards.candidate != "merged"),
        earlier=lambda wildcards: (
            []
            if wildcards.candidate == "merged"
            else CANDIDATES[: search.earlier(PARAMS.quantize, int(wildcards.candidate))]
        ),
    output:
        directory("build/search/{candidate}"),
    log:
        "logs/candidate-{candidate}.log",
    benchmark:
        "benchmarks/candidate-{candidate}.tsv"
    wildcard_constraints:
        candidate=r"merged|\d+",
    container:
        IMAGE
    threads: 2
    resources:
        mem_mb=slurm.memory(6000, 4),
        runtime=240,
    params:
        section=lambda wildcards: search.depends_on(PARAMS.quantize, wildcards.candidate) + as_json(PARAMS.evaluate),
        container=CONTAINER,
        reference=lambda wildcards, input: f"--reference {input.reference}" if input.reference else "",
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --candidate {wildcards.candidate}"
        " --model {input.model}"
        " --dataset {input.dataset}"
        " {params.reference}"
        " --earlier {input.earlier}"
        " --output {output}"
        " --log {log}"


rule search:
    input:
        script="scripts/search.py",
        modules=["scripts/gates.py"],
        environment=ENVIRONMENT,
        reference="build/search/merged",
        candidates=CANDIDATES,
    output:
        "results/search.json",
    log:
        "logs/search.log",
    benchmark:
        "benchmarks/search.tsv"
    container:
        IMAGE
    resources:
        mem_mb=slurm.memory(1000),
        runtime=10,
    params:
        section=lambda wildcards: as_json(PARAMS.quantize) + as_json(PARAMS.gates),
        container=CONTAINER,
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --reference {input.reference}"
        " --candidates {input.candidates}"
        " --output {output}"
        " --log {log}"


rule quantize:
    input:
        script="scripts/quantize.py",
        modules=[
            "scripts/batches.py",
            "scripts/common/generation.py",
            "scripts/fetch_model.py",
            "scripts/gptq.py",
            "scripts/lora.py",
        ],
        environment=ENVIRONMENT,
        model=TUNED,
        dataset=["build/dataset"] * (PARAMS.quantize.calibration == "gptq"),
        search=["results/search.json"] * bool(SEARCH),
        candidates=CANDIDATES,
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
        dataset="--dataset build/dataset" * (PARAMS.quantize.calibration == "gptq"),
        search="--search results/search.json --candidates build/search" * bool(SEARCH),
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --model {input.model}"
        " {params.dataset}"
        " {params.search}"
        " --output {output.model}"
        " --log {log}"


rule evaluate:
    input:
        script="scripts/evaluate.py",
        modules=SCORING,
        environment=ENVIRONMENT,
        dataset="build/dataset",
        models=sorted(set(SCORED.values())),
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
        benchmark="results/benchmark.json",
        published=PUBLISHED_METRICS,
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
        "python {input.script}"
        " --params params.yaml"
        " --metrics {input.metrics}"
        " --benchmark {input.benchmark}"
        " --output {output}"
        " --log {log}"


rule package:
    input:
        script="scripts/package.py",
        environment=ENVIRONMENT,
        materials=MATERIALS,
        licences=PARAMS.package.license_files,
        model=ONNX,
        dataset="build/dataset",
        base_report="results/base.json",
        dataset_report="results/dataset.json",
        metrics="results/metrics.json",
        gates="results/gates.json",
        search=["results/search.json"] * bool(SEARCH),
        lock="envs/cuda.lock" if PARAMS.quantize.execution_provider == "cuda" else "envs/cpu.lock",
    output:
        package=directory("build/package"),
    log:
        "logs/package.log",
    benchmark:
        "benchmarks/package.tsv"
    container:
        IMAGE
    resources:
        mem_mb=slurm.memory(2000),
        runtime=30,
    params:
        section=lambda wildcards: as_json(PARAMS.package),
        container=CONTAINER,
        search="--search results/search.json" * bool(SEARCH),
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --model {input.model}"
        " --dataset {input.dataset}"
        " --base-report {input.base_report}"
        " --dataset-report {input.dataset_report}"
        " --metrics {input.metrics}"
        " --gates {input.gates}"
        " {params.search}"
        " --lock {input.lock}"
        " --materials {input.materials:q}"
        " --output {output.package}"
        " --log {log}"


rule report:
    input:
        script="scripts/report.py",
        modules=["scripts/gates.py", "scripts/search.py"],
        environment=ENVIRONMENT,
        base_report="results/base.json",
        dataset_report="results/dataset.json",
        metrics="results/metrics.json",
        timings="results/benchmark.json",
        predictions="results/predictions.csv",
        losses=["results/train_loss.csv", "results/eval_loss.csv"] * ("finetune" in STAGES),
        search=["results/search.json"] * bool(SEARCH),
        published=PUBLISHED_METRICS,
    output:
        FIGURES,
    log:
        "logs/report.log",
    benchmark:
        "benchmarks/report.tsv"
    container:
        IMAGE
    resources:
        mem_mb=slurm.memory(2000),
        runtime=30,
    params:
        section=lambda wildcards: as_json(PARAMS.report) + as_json(PARAMS.gates),
        container=CONTAINER,
        search="--search results/search.json" * bool(SEARCH),
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --base-report {input.base_report}"
        " --dataset-report {input.dataset_report}"
        " --metrics {input.metrics}"
        " --timings {input.timings}"
        " --predictions {input.predictions}"
        " --losses {input.losses}"
        " {params.search}"
        " --output build/report"
        " --log {log}"


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
    container:
        IMAGE
    resources:
        mem_mb=slurm.memory(2000),
        runtime=120,
    params:
        section=lambda wildcards: as_json(PARAMS.publish),
        container=CONTAINER,
        metrics=lambda wildcards, input: f"--metrics {input.metrics}" if input.metrics else "",
    shell:
        "python {input.script}"
        " --params params.yaml"
        " --model {input.model}"
        " {params.metrics}"
        " --output {output}"
        " --log {log}"
