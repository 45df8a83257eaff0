"""Score base, adapter, merged and exported model on the held-out test split, and compare each with the one before it.
Without a dataset: on the fixed texts, by their perplexity.

    python -m scripts.evaluate --params params.yaml --dataset build/dataset --base build/base --adapter build/adapter \\
        --merged build/merged --onnx build/onnx-int4 --metrics results/metrics.json --benchmark results/benchmark.json \\
        --predictions results/predictions.csv

Reads the section `evaluate`, of QLoRA also `merge` and `finetune`, and the test split. Every model answers greedily through the
runtime that it ships on: base, adapter and merged through transformers with the prompt tokens of training; the exported one
through onnxruntime-genai with the text, row by row, as a user asks it. The adapter is asked the rows to which it may have
another answer than the merged model (slmake/scoring/adapter_answers.py). Writes metrics.json (the same in every run), benchmark.json (timings and memory)
and predictions.csv (every model's answer to every row, and to every trained turn of a conversation). docs/quality.md explains every field.
"""

from pathlib import Path

from slmake import cli, outputs, params
from slmake.scoring import harness
from slmake.scoring import metrics as metrics_module
from slmake.scoring.evaluation import (
    add_facts,
    model_folders,
    refuse_early,
    sampled_answers,
    say_results,
    write_predictions,
)
from slmake.scoring.measure import ask_all, compare, measure
from slmake.scoring.questions import Questions


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
            answers |= sampled_answers(questions, runs)
            add_facts(metrics, facts, answers, onnx, section, questions, weights)
            outputs.write_json(metrics_file, metrics)
            timings = {name: {key: round(value, 3) for key, value in run.timings.items()} for name, run in runs.items()}
            outputs.write_json(benchmark_file, timings)
            write_predictions(predictions_file, questions, answers)
        say_results(job, metrics, list(runs), facts.get("provider"), onnx)


if __name__ == "__main__":
    main()
