"""What the script evaluate does before and after the models are asked: their folders, early refusals, and what it writes and says."""

import csv
from pathlib import Path

from slmake import cli, constraints, params
from slmake.errors import UserError
from slmake.scoring import constrained, harness, sampled
from slmake.scoring import metrics as metrics_module
from slmake.scoring.answer_metrics import function_of
from slmake.scoring.questions import Questions
from slmake.scoring.run import Run
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


def sampled_answers(questions: Questions, runs: dict[str, Run]) -> dict[str, list[str]]:
    """The sampled answers of every model, by the name of their column in predictions.csv."""
    return {
        f"{name}_sample_{number}": answers
        for name, run in runs.items()
        for number, answers in enumerate(sampled.answers_of(questions, run.sampled), 1)
    }


def say_results(job: cli.Job, metrics: dict, models: list[str], provider: dict | None, onnx: str) -> None:
    """The scores in a line; without a dataset, what parity is; and where the export was not scored where it will run."""
    job.say(f"{metrics_module.summary(metrics, models)} ({job.seconds():.0f} s)")
    if shares := [
        f"{name} {metrics[name]['sampled_accuracy']:.1%}" for name in models if "sampled_accuracy" in metrics[name]
    ]:
        job.say(f"accuracy of sampled answers: {', '.join(shares)}")
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
    """Add to `metrics`, and to the answers, what `ask_all` found out beside the models' own answers."""
    if "constrained" in facts:
        answers[f"{onnx}_constrained"], scores = constrained.measure(
            questions, facts["constrained"], answers[onnx], weights, section.answer_metrics
        )
        metrics[onnx] |= scores
    if "adapter_rows_asked" in facts:
        metrics["adapter"]["rows_asked"] = facts["adapter_rows_asked"]
    if "tokenizer" in facts:
        metrics["parity"] = metrics.get("parity", {}) | {"tokenizer": facts["tokenizer"]}
    if "provider" in facts:
        metrics["providers"] = {onnx: facts["provider"]}
