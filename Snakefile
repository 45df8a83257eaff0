# slmake: from a dataset and a base model to a checked int4 ONNX model.
#     snakemake --cores all                  build what params.yaml asks for
#     snakemake --cores all build/adapter    build one thing and what it needs
#     snakemake -n                           say what would run, and why
# Rules stand in execution order. A rule runs again when its section of params.yaml, its inputs or its code change.


include: "rules/common.smk"  # PLAN, STAGES, REPORT, and the helpers code_of, built_from, optional, when, memory


rule all:
    input:
        "build/base",
        "build/dataset",
        when("rehearse" in STAGES, "results/rehearsal.json"),
        when({"finetune", "merge"} & set(STAGES), PLAN.adapter),
        when("merge" in STAGES, "build/merged"),
        when("quantize" in STAGES, PLAN.onnx),
        when("evaluate" in STAGES, "results/metrics.json"),
        when("gates" in STAGES, "results/gates.json"),
        when("package" in STAGES, "build/package"),
        when("report" in STAGES, [f"build/report/{name}" for name, *_ in PLAN.figures]),
        when("publish" in STAGES, "results/published.json"),


rule fetch_model:
    input:
        code=code_of("fetch_model"),
        source=ancient(PLAN.model_source + PLAN.chat_template),
    output:
        model=directory("build/base"),
        report="results/base.json",
    log:
        "logs/fetch_model.log",
    benchmark:
        "benchmarks/fetch_model.tsv"
    resources:
        mem_mb=memory(8000),
        runtime=120,
    params:
        **built_from("fetch_model"),
    shell:
        "python -m scripts.fetch_model"
        " --params params.yaml"
        " --output {output.model}"
        " --report {output.report}"
        " --downloads build/downloads-model"
        " --log {log}"


rule prepare:
    input:
        code=code_of("prepare"),
        data=ancient(PLAN.data),
        base="build/base",
    output:
        dataset=directory("build/dataset"),
        report="results/dataset.json",
    log:
        "logs/prepare.log",
    benchmark:
        "benchmarks/prepare.tsv"
    threads: 2
    resources:
        mem_mb=memory(4000),
        runtime=60,
    params:
        **built_from("prepare"),
    shell:
        "python -m scripts.prepare"
        " --params params.yaml"
        " --base {input.base}"
        " --output {output.dataset}"
        " --report {output.report}"
        " --downloads build/downloads-data"
        " --log {log}"


# Runs first, here alone. It is nobody's input: behind one that is made again, Snakemake would miss a changed learning rate.
rule rehearse:
    input:
        code=code_of("rehearse"),
        base="build/base",
        dataset="build/dataset",
    output:
        checks="results/rehearsal.json",
        estimate="results/estimate.json",
    log:
        "logs/rehearse.log",
    benchmark:
        "benchmarks/rehearse.tsv"
    priority: 100
    threads: 64
    resources:
        mem_mb=memory(4000, 2),
        runtime=60,
        turns=1,  # profiles/slurm has one turn: finetune, which takes one too, waits
    params:
        **built_from("rehearse"),
    shell:
        "python -m scripts.rehearse"
        " --params params.yaml"
        " --base {input.base}"
        " --dataset {input.dataset}"
        " --output {output.checks}"
        " --estimate {output.estimate}"
        " --log {log}"


rule finetune:
    input:
        code=code_of("finetune"),
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
    resources:
        mem_mb=memory(6000, 4),
        runtime=720,
        turns=1,
        nproc_per_node="auto",  # processes that train together: one per GPU; a profile's set-resources may say a number
    params:
        **built_from("finetune"),
    shell:
        "python -m scripts.finetune"
        " --params params.yaml"
        " --base {input.base}"
        " --dataset {input.dataset}"
        " --output {output.adapter}"
        " --train-loss {output.train_loss}"
        " --eval-loss {output.eval_loss}"
        " --checkpoints build/checkpoints"
        " --nproc-per-node {resources.nproc_per_node}"
        " --log {log}"


# Only where an adapter comes from elsewhere: all.stages lists merge without finetune.
rule adapter:
    input:
        code=code_of("adapter"),
        source=ancient(PLAN.adapter_source),
        base="build/base",
    output:
        adapter=directory("build/fetched-adapter"),
        report="results/adapter.json",
    log:
        "logs/adapter.log",
    benchmark:
        "benchmarks/adapter.tsv"
    resources:
        mem_mb=memory(2000),
        runtime=60,
    params:
        **built_from("adapter"),
    shell:
        "python -m scripts.adapter"
        " --params params.yaml"
        " --base {input.base}"
        " --output {output.adapter}"
        " --report {output.report}"
        " --downloads build/downloads-adapter"
        " --log {log}"


rule merge:
    input:
        code=code_of("merge"),
        base="build/base",
        adapter=PLAN.adapter,
    output:
        model=directory("build/merged"),
    log:
        "logs/merge.log",
    benchmark:
        "benchmarks/merge.tsv"
    threads: 8
    resources:
        mem_mb=memory(4000, 2),
        runtime=60,
    params:
        **built_from("merge"),
    shell:
        "python -m scripts.merge"
        " --params params.yaml"
        " --base {input.base}"
        " --adapter {input.adapter}"
        " --output {output.model}"
        " --log {log}"


# Only where quantize.search is set: candidates are jobs of their own, and `search` chooses among them.
rule candidate:
    input:
        code=code_of("candidate"),
        model=PLAN.tuned,
        dataset="build/dataset",
        reference=lambda wildcards: when(wildcards.candidate != "merged", "build/search/merged"),
        batch_before=lambda wildcards: PLAN.batch_before(wildcards.candidate),
    output:
        directory("build/search/{candidate}"),
    log:
        "logs/candidate-{candidate}.log",
    benchmark:
        "benchmarks/candidate-{candidate}.tsv"
    wildcard_constraints:
        candidate=r"merged|\d+",
    threads: 2
    resources:
        mem_mb=memory(6000, 4),
        runtime=240,
    params:
        **built_from("candidate"),
        reference=optional("reference"),
    shell:
        "python -m scripts.candidate"
        " --params params.yaml"
        " --candidate {wildcards.candidate}"
        " --model {input.model}"
        " --dataset {input.dataset}"
        " {params.reference}"
        " --batch-before {input.batch_before}"
        " --output {output}"
        " --log {log}"


rule search:
    input:
        code=code_of("search"),
        reference="build/search/merged",
        candidates=PLAN.candidates,
    output:
        "results/search.json",
    log:
        "logs/search.log",
    benchmark:
        "benchmarks/search.tsv"
    resources:
        mem_mb=memory(1000),
        runtime=10,
    params:
        **built_from("search"),
    shell:
        "python -m scripts.search"
        " --params params.yaml"
        " --reference {input.reference}"
        " --candidates {input.candidates}"
        " --output {output}"
        " --log {log}"


rule quantize:
    input:
        code=code_of("quantize"),
        model=PLAN.tuned,
        dataset="build/dataset",  # gptq's texts, and the prompt that goes beside the model
        search=when(PLAN.search, "results/search.json"),
        candidates=PLAN.candidates,
    output:
        model=directory(PLAN.onnx),
    log:
        "logs/quantize.log",
    benchmark:
        "benchmarks/quantize.tsv"
    threads: 8
    resources:
        mem_mb=memory(6000, 4),
        runtime=240,
    params:
        **built_from("quantize"),
        search=when(PLAN.search, "--search results/search.json --candidates build/search"),
    shell:
        "python -m scripts.quantize"
        " --params params.yaml"
        " --model {input.model}"
        " --dataset {input.dataset}"
        " {params.search}"
        " --output {output.model}"
        " --log {log}"


rule evaluate:
    input:
        code=code_of("evaluate"),
        dataset="build/dataset",
        models=sorted(set(PLAN.scored.values())),
    output:
        metrics="results/metrics.json",
        benchmark="results/benchmark.json",
        predictions="results/predictions.csv",
    log:
        "logs/evaluate.log",
    benchmark:
        "benchmarks/evaluate.tsv"
    threads: 64
    resources:
        mem_mb=memory(6000, 3),
        runtime=240,
    params:
        **built_from("evaluate"),
        models=" ".join(f"--{name} {folder}" for name, folder in PLAN.scored.items()),
    shell:
        "python -m scripts.evaluate"
        " --params params.yaml"
        " --dataset {input.dataset}"
        " {params.models}"
        " --metrics {output.metrics}"
        " --benchmark {output.benchmark}"
        " --predictions {output.predictions}"
        " --log {log}"


rule gates:
    input:
        code=code_of("gates"),
        metrics="results/metrics.json",
        benchmark="results/benchmark.json",
        published=ancient(PLAN.published_metrics),
    output:
        "results/gates.json",
    log:
        "logs/gates.log",
    benchmark:
        "benchmarks/gates.tsv"
    resources:
        mem_mb=memory(1000),
        runtime=10,
    params:
        **built_from("gates"),
    shell:
        "python -m scripts.gates"
        " --params params.yaml"
        " --metrics {input.metrics}"
        " --benchmark {input.benchmark}"
        " --output {output}"
        " --log {log}"


rule package:
    input:
        code=code_of("package"),
        materials=ancient(PLAN.materials()),
        named=ancient(PLAN.named("package")),  # licences, a schema, the signing key
        model=PLAN.onnx,
        dataset="build/dataset",
        base_report="results/base.json",
        dataset_report="results/dataset.json",
        adapter=when(PLAN.fetched_adapter, "results/adapter.json"),
        losses=when("finetune" in STAGES, "results/train_loss.csv"),
        metrics="results/metrics.json",
        gates="results/gates.json",
        search=when(PLAN.search, "results/search.json"),
        locks=ancient(PLAN.locks),
    output:
        package=directory("build/package"),
    log:
        "logs/package.log",
    benchmark:
        "benchmarks/package.tsv"
    resources:
        mem_mb=memory(8000 if PLAN.params.package.constrain == "tools" else 2000),  # to see that the model can be held
        runtime=30,
    params:
        **built_from("package"),
        reports=optional("adapter", "losses", "search"),
    shell:
        "python -m scripts.package"
        " --params params.yaml"
        " --model {input.model}"
        " --dataset {input.dataset}"
        " --base-report {input.base_report}"
        " --dataset-report {input.dataset_report}"
        " --metrics {input.metrics}"
        " --gates {input.gates}"
        " {params.reports}"
        " --locks {input.locks}"
        " --materials {input.materials:q}"
        " --output {output.package}"
        " --log {log}"


rule report:
    input:
        code=code_of("report"),
        base_report="results/base.json",
        dataset_report="results/dataset.json",
        metrics="results/metrics.json",
        timings="results/benchmark.json",
        predictions="results/predictions.csv",
        losses=when("finetune" in STAGES, ["results/train_loss.csv", "results/eval_loss.csv"]),
        search=when(PLAN.search, "results/search.json"),
        seeds=ancient(PLAN.seeds),
        published=ancient(PLAN.published_metrics),
    output:
        REPORT,
    log:
        "logs/report.log",
    benchmark:
        "benchmarks/report.tsv"
    resources:
        mem_mb=memory(2000),
        runtime=30,
    params:
        **built_from("report"),
        more=optional("search", "seeds"),
    shell:
        "python -m scripts.report"
        " --params params.yaml"
        " --base-report {input.base_report}"
        " --dataset-report {input.dataset_report}"
        " --metrics {input.metrics}"
        " --timings {input.timings}"
        " --predictions {input.predictions}"
        " --losses {input.losses} {params.more}"
        " --output build/report"
        " --log {log}"


rule publish:
    input:
        code=code_of("publish"),
        model=PLAN.shipped,
        metrics=when("evaluate" in STAGES, "results/metrics.json"),
        gates=when("gates" in STAGES, "results/gates.json"),  # a model that misses a gate is not published
    output:
        "results/published.json",
    log:
        "logs/publish.log",
    benchmark:
        "benchmarks/publish.tsv"
    resources:
        mem_mb=memory(2000),
        runtime=120,
    params:
        **built_from("publish"),
        account=PLAN.account,
        metrics=optional("metrics"),
    shell:
        "python -m scripts.publish"
        " --params params.yaml"
        " --model {input.model}"
        " {params.metrics}"
        " --output {output}"
        " --log {log}"
