"""Score base, merged and exported model on the held-out test split.

    python scripts/evaluate.py --params params.yaml --dataset build/dataset --base build/base --merged build/merged \\
        --onnx build/onnx-int4 --metrics results/metrics.json --benchmark results/benchmark.json --predictions results/predictions.csv

Reads the section `evaluate` and the test split, with the very prompt tokens of training. Every model answers greedily
through the runtime it ships on: base and merged through transformers, the exported one through onnxruntime-genai, row by
row as a user would ask it. Writes metrics.json (only what is the same in every run), benchmark.json (timings) and
predictions.csv (every model's answer to every row).
"""

import csv
import time
from pathlib import Path

import numpy as np

from common import cli, outputs, params, prompts
from common.errors import UserError


class Questions:
    """The test rows: prompt tokens, expected answers, and how an answer is read off generated text."""

    def __init__(self, dataset: Path, limit: int | None):
        import pyarrow.parquet

        self.form = prompts.load_prompt(dataset)
        table = pyarrow.parquet.read_table(
            dataset / "test.parquet", columns=["row", "prompt", "answer", "input_ids", "labels"]
        )
        if not len(table):
            raise UserError(
                f"{dataset}: the test split is empty, so nothing can be scored. Raise prepare.test_fraction, or name a test file."
            )
        table = table.slice(0, limit or len(table))
        self.rows = table["row"].to_pylist()
        self.texts = table["prompt"].to_pylist()
        labels = table["labels"].to_pylist()
        self.prompts = [
            np.array(ids[: len(tags) - sum(tag != -100 for tag in tags)], dtype=np.int64)
            for ids, tags in zip(
                _unpadded(table["input_ids"].to_pylist(), labels), _unpadded(labels, labels), strict=True
            )
        ]
        self.expected = [answer.strip() for answer in table["answer"].to_pylist()]
        self.end = self.form["end_token_id"]

    def read(self, text: str, index: int) -> str:
        """The answer in generated text: as many first lines as the expected answer has."""
        return prompts.first_answer(text, self.expected[index].count("\n") + 1)


def _unpadded(columns: list[list[int]], labels: list[list[int]]) -> list[list[int]]:
    """Drop what stands behind the last answer token (padding of pad_to_max_len)."""
    ends = [max(i for i, tag in enumerate(tags) if tag != -100) + 1 for tags in labels]
    return [column[:end] for column, end in zip(columns, ends, strict=True)]


def answer_with_transformers(
    folder: Path, questions: Questions, new_tokens: int, batch_size: int, job: cli.Job, name: str
) -> tuple[list[str], dict]:
    """Greedy answers of a Hugging Face model, in batches of similar length, in the model's own data type.

    Returns:
        One text per question, and timings in seconds.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=False, local_files_only=True, use_safetensors=True
    ).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model.eval()
    loaded = time.monotonic()
    texts = [""] * len(questions.prompts)
    order = sorted(range(len(texts)), key=lambda i: -len(questions.prompts[i]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else questions.end
    with job.progress(len(order), f"rows of {name}") as bar, torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = max(len(questions.prompts[i]) for i in chosen)
            ids = torch.full((len(chosen), longest), pad)
            mask = torch.zeros((len(chosen), longest), dtype=torch.long)
            for k, i in enumerate(chosen):  # left padding: generation goes on at the right end
                length = len(questions.prompts[i])
                ids[k, longest - length :] = torch.from_numpy(questions.prompts[i])
                mask[k, longest - length :] = 1
            made = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=questions.end,
                pad_token_id=pad,
            )
            for k, i in enumerate(chosen):
                texts[i] = tokenizer.decode(made[k, longest:], skip_special_tokens=True)
            bar.update(len(chosen))
    return texts, {"load_s": loaded - began, "score_s": time.monotonic() - loaded}


def answer_with_onnx(
    folder: Path, questions: Questions, new_tokens: int, job: cli.Job, name: str
) -> tuple[list[str], dict]:
    """Greedy answers of an exported model through onnxruntime-genai, one row at a time.

    Returns:
        One text per question, and timings: load in seconds, latency percentiles in milliseconds, tokens per second.
    """
    import onnxruntime_genai as og

    began = time.monotonic()
    try:
        model = og.Model(str(folder))
    except Exception as error:
        raise UserError(
            f"{folder}: ONNX Runtime cannot load this model: {str(error).splitlines()[0]}. Build it again: remove the folder and run snakemake."
        ) from error
    tokenizer = og.Tokenizer(model)
    loaded = time.monotonic()

    def ask(prompt: np.ndarray) -> np.ndarray:
        settings = og.GeneratorParams(model)
        settings.set_search_options(max_length=len(prompt) + new_tokens, do_sample=False)
        generator = og.Generator(model, settings)
        generator.append_tokens(prompt.astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return generator.get_sequence(0)[len(prompt) :]

    for prompt in questions.prompts[:3]:  # warm-up
        ask(prompt)
    texts, latencies, tokens = [], [], 0
    with job.progress(len(questions.prompts), f"rows of {name}") as bar:
        for prompt in questions.prompts:
            start = time.perf_counter()
            made = ask(prompt)
            latencies.append(1000 * (time.perf_counter() - start))
            tokens += len(made)
            texts.append(
                tokenizer.decode(np.array([token for token in made if token != questions.end], dtype=np.int32))
            )
            bar.update(1)
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
    timings = {
        "latency_ms_p50": p50,
        "latency_ms_p95": p95,
        "latency_ms_p99": p99,
        "load_s": loaded - began,
        "score_s": sum(latencies) / 1000,
    }
    return texts, {**timings, "generated_tokens_per_s": 1000 * tokens / sum(latencies)}


def macro_f1(expected: list[str], answers: list[str], labels: list[str]) -> float:
    """Unweighted mean over labels of F1 = 2 TP / (2 TP + FP + FN); an answer outside the labels is wrong for its own."""
    scores = []
    for label in labels:
        hits = sum(e == label and a == label for e, a in zip(expected, answers, strict=True))
        wrong = sum((e == label) != (a == label) for e, a in zip(expected, answers, strict=True))
        scores.append(2 * hits / (2 * hits + wrong) if hits or wrong else 0.0)
    return sum(scores) / len(scores)


def score(questions: Questions, answers: list[str]) -> dict:
    """Accuracy (exact match), and for a classification macro-F1 and the share of answers outside the labels."""
    expected = questions.expected
    found = {"accuracy": round(sum(e == a for e, a in zip(expected, answers, strict=True)) / len(expected), 6)}
    labels = questions.form["labels"]
    if labels:
        found["macro_f1"] = round(macro_f1(expected, answers, labels), 6)
        found["outside_labels"] = round(sum(answer not in labels for answer in answers) / len(answers), 6)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--dataset", type=Path, required=True, help="the tokenized dataset's folder")
    parser.add_argument("--base", type=Path, help="the base model's folder")
    parser.add_argument("--merged", type=Path, help="the merged model's folder")
    parser.add_argument("--onnx", type=Path, help="the exported model's folder")
    parser.add_argument("--metrics", type=Path, required=True, help="JSON file for what is the same in every run")
    parser.add_argument("--benchmark", type=Path, required=True, help="JSON file for timings")
    parser.add_argument("--predictions", type=Path, required=True, help="CSV file for every answer")
    args = parser.parse_args(argv)
    with cli.job("evaluate", args.log) as job:
        everything = params.load(args.params)
        section = everything.evaluate
        with outputs.written(files=[args.metrics, args.benchmark, args.predictions]) as (
            metrics_file,
            benchmark_file,
            predictions_file,
        ):
            questions = Questions(args.dataset, section.max_samples)
            new_tokens = section.max_new_tokens or questions.form["longest_answer_tokens"]
            metrics: dict = {"test_rows": len(questions.rows)}
            benchmark: dict = {}
            answers: dict[str, list[str]] = {}
            for name, folder in (
                ("base", args.base),
                ("merged", args.merged),
                (everything.quantize.precision, args.onnx),
            ):
                if folder is None:
                    continue
                if not folder.is_dir():
                    raise UserError(f"{folder}: no model here. Build it with `snakemake --cores all {folder}`.")
                if folder is args.onnx:
                    texts, benchmark[name] = answer_with_onnx(folder, questions, new_tokens, job, name)
                else:
                    texts, benchmark[name] = answer_with_transformers(
                        folder, questions, new_tokens, section.batch_size, job, name
                    )
                answers[name] = [questions.read(text, i) for i, text in enumerate(texts)]
                metrics[name] = {**score(questions, answers[name]), "size_bytes": outputs.folder_size(folder)}
            if not answers:
                raise UserError("nothing to score: give --base, --merged or --onnx.")
            outputs.write_json(metrics_file, metrics)
            rounded = {
                name: {key: round(value, 3) for key, value in values.items()} for name, values in benchmark.items()
            }
            outputs.write_json(benchmark_file, rounded)
            with open(predictions_file, "w", newline="", encoding="utf-8") as handle:
                writer = csv.writer(handle, lineterminator="\n")
                writer.writerow(["row", "expected", *answers, "prompt"])
                writer.writerows(
                    zip(questions.rows, questions.expected, *answers.values(), questions.texts, strict=True)
                )
        shown = ", ".join(
            f"{name} {values['accuracy']:.1%}" for name, values in metrics.items() if isinstance(values, dict)
        )
        job.say(f"accuracy on {metrics['test_rows']} test rows: {shown} ({job.seconds():.0f} s)")


if __name__ == "__main__":
    main()
