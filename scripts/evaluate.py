"""Score base, adapter, merged and exported model on the held-out test split, and compare each with the one before it.
Without a dataset: on the fixed texts, by their perplexity.

    python -m scripts.evaluate --params params.yaml --dataset build/dataset --base build/base --adapter build/adapter \\
        --merged build/merged --onnx build/onnx-int4 --metrics results/metrics.json --benchmark results/benchmark.json \\
        --predictions results/predictions.csv

Reads the section `evaluate` and the test split. Every model answers greedily through the runtime that it ships on: base,
adapter and merged through transformers with the prompt tokens of training; the exported one through onnxruntime-genai with
the text, row by row, as a user asks it. Writes metrics.json (the same in every run), benchmark.json (timings and memory)
and predictions.csv (every model's answer to every row, and to every trained turn of a conversation). docs/quality.md explains every field.
"""

import csv
from pathlib import Path

from slmake import cli, constraints, outputs, params
from slmake.errors import UserError
from slmake.scoring import constrained, harness
from slmake.scoring import metrics as metrics_module
from slmake.scoring.answer_metrics import function_of
from slmake.scoring.measure import ask_all, compare, measure
from slmake.scoring.questions import Questions
from slmake.text import csv_cell


def model_folders(args, onnx: str) -> dict[str, Path]:
    """The folders of the models to score, by name; `adapter_base` for the adapter's base.

    Raises:
        UserError: no model is named, one is missing, or an adapter without its base.
    """
    named = {"base": args.base, "adapter": args.adapter, "merged": args.merged, onnx: args.onnx}
    folders = {name: folder for name, folder in named.items() if folder}
    if not folders:
        raise UserError("nothing to score: give --base, --adapter, --merged or --onnx.")
    if args.adapter:
        folders["adapter_base"] = args.adapter_base or args.base
        if not folders["adapter_base"]:
            raise UserError("--adapter needs the base model it was trained on: give --base or --adapter-base.")
    for folder in folders.values():
        if not folder.is_dir():
            raise UserError(f"{folder}: no model here. Build it with `snakemake --cores all {folder}`.")
    return folders


def write_predictions(path: Path, questions: Questions, answers: dict[str, list[str]]) -> None:
    """Write every model's answer to every scored row as CSV."""
    columns = {"row": questions.rows, "turn": questions.turns, "expected": questions.expected}
    columns |= answers | {"prompt": questions.texts}
    columns = {name: column for name, column in columns.items() if column}  # no `turn` without conversations
    with open(path, "w", newline="", encoding="utf-8") as handle:
        # Texts are quoted, because one may hold a lone \r.
        writer = csv.writer(handle, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(columns)
        rows = zip(*(column[: questions.scored] for column in columns.values()), strict=True)
        writer.writerows(map(csv_cell, row) for row in rows)


def say_results(job: cli.Job, metrics: dict, models: list[str], provider: dict | None, onnx: str) -> None:
    """The scores in a line; without a dataset, what parity is; and where the export was not scored where it will run."""
    job.say(f"{metrics_module.summary(metrics, models)} ({job.seconds():.0f} s)")
    for pair, distance in metrics.get("parity", {}).items() if "texts" in metrics else ():
        if pair != "tokenizer":
            job.say(
                f"{pair.replace('_vs_', ' against ')}, at {distance['prompts']} places of the texts: mean KL {distance['kl_mean']:.4f}, "
                f"{distance['top1_agreement']:.1%} the same most likely token"
            )
    if provider:
        target, used = provider.values()
        job.say(
            f"{target} is not available here: {onnx} was scored on {used}, and its latency on {target} was not measured"
        )


def refuse_early(section: params.Evaluate, questions: Questions) -> None:
    """Refuse metrics, tasks and constraints that are not there before any model is asked."""
    constraints.check(section.constrain, questions.form, "evaluate.constrain")
    if section.constrain == "tools":
        constrained.refuse_uncheckable(questions)
    for metric in section.answer_metrics:
        function_of(metric)
    if section.lm_eval:
        harness.tasks(section.lm_eval)


def add_facts(
    metrics: dict, facts: dict, answers: dict, onnx: str, section: params.Evaluate, questions, weights
) -> None:
    """Add to `metrics`, and to the answers, what `ask_all` found out about the exported model."""
    if "constrained" in facts:
        answers[f"{onnx}_constrained"], scores = constrained.measure(
            questions, facts["constrained"], answers[onnx], weights, section.answer_metrics
        )
        metrics[onnx] |= scores
    if "tokenizer" in facts:
        metrics["parity"] = metrics.get("parity", {}) | {"tokenizer": facts["tokenizer"]}
    if "provider" in facts:
        metrics["providers"] = {onnx: facts["provider"]}


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--dataset", type=Path, required=True, help="the tokenized dataset's folder")
    parser.add_argument("--base", type=Path, help="the base model's folder")
    parser.add_argument("--adapter", type=Path, help="the adapter's folder (needs the base model it was trained on)")
    parser.add_argument("--adapter-base", type=Path, help="that base model's folder (default: --base)")
    parser.add_argument("--merged", type=Path, help="the merged model's folder")
    parser.add_argument("--onnx", type=Path, help="the exported model's folder")
    parser.add_argument("--metrics", type=Path, required=True, help="JSON file for the scores")
    parser.add_argument("--benchmark", type=Path, required=True, help="JSON file for timings and memory")
    parser.add_argument("--predictions", type=Path, required=True, help="CSV file for every answer")
    args = parser.parse_args(argv)
    with cli.job("evaluate", args.log) as job:
        everything = params.load(args.params)
        section, onnx = everything.evaluate, everything.quantize.precision
        folders = model_folders(args, onnx)
        with outputs.written(files=[args.metrics, args.benchmark, args.predictions]) as (
            metrics_file,
            benchmark_file,
            predictions_file,
        ):
            questions = Questions(args.dataset, section.max_samples)
            refuse_early(section, questions)
            questions.extend_for_parity(section.parity_prompts)
            new_tokens = section.max_new_tokens or questions.form["longest_answer_tokens"]
            weights = metrics_module.resamples(
                questions.scored, section.bootstrap_samples, section.seed, questions.groups()
            )
            quantized = everything.finetune if everything.merge.onto == "dequantized" else None
            runs, facts = ask_all(section, folders, onnx, quantized, questions, new_tokens, job)
            metrics: dict = {"test_rows": questions.scored}
            if questions.without_dataset:
                metrics = {"test_rows": 0, "texts": questions.scored}
            answers: dict[str, list[str]] = {}
            for name, run in runs.items():
                answers[name], scores = measure(questions, run, weights, section.answer_metrics)
                metrics[name] = {**scores, "size_bytes": outputs.folder_size(folders[name])}
            if section.lm_eval:
                for name, figures in harness.run(folders, onnx, section.lm_eval, section.lm_eval_limit, job).items():
                    metrics[name] |= figures
            metrics |= compare(questions, runs, answers, weights, section.answer_metrics)
            add_facts(metrics, facts, answers, onnx, section, questions, weights)
            outputs.write_json(metrics_file, metrics)
            timings = {name: {key: round(value, 3) for key, value in run.timings.items()} for name, run in runs.items()}
            outputs.write_json(benchmark_file, timings)
            write_predictions(predictions_file, questions, answers)
        say_results(job, metrics, list(runs), facts.get("provider"), onnx)


if __name__ == "__main__":
    main()
