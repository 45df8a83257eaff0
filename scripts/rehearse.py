"""Run the whole chain on a shrunken twin of the base model, and estimate what the real build needs.

    python -m scripts.rehearse --params params.yaml --base build/base --dataset build/dataset --output results/rehearsal.json \\
        --estimate results/estimate.json

Reads the base model's configuration and tokenizer, params.yaml and the first training rows. The twin has the same architecture,
vocabulary, head size, norms and rotary style, but few layers and heads, and random weights from a seed. It is trained, merged and
exported as params.yaml asks for; the export's logits are compared with those of transformers. Writes which checks passed, their
figures, and the estimate of memory, time and disk. What fails here would fail after hours of training.
"""

from pathlib import Path

from slmake import cli, constraints, memory, outputs, params
from slmake.prompts import load_prompt
from slmake.rehearsal import estimate
from slmake.rehearsal.checks import context_of, rehearse, try_metrics
from slmake.scoring import harness
from slmake.scoring.answer_metrics import function_of
from slmake.scoring.gates import check_figures


def refuse_what_is_not_there(everything: params.Params, form: dict) -> None:
    """Raise UserError where a constraint or a gate asks for what the dataset does not have, or a metric cannot be used."""
    for stage in ("evaluate", "package"):
        if stage in everything.all.stages:
            constraints.check(getattr(everything, stage).constrain, form, f"{stage}.constrain")
    if {"evaluate", "quantize"} & set(everything.all.stages):  # the search of quantize scores its candidates, too
        for metric in everything.evaluate.answer_metrics:
            function_of(metric)
    if "gates" in everything.all.stages:
        check_figures(everything.gates, form["labels"])


def rehearse_tasks(everything: params.Params, context: int) -> dict[str, float]:
    """Names of the figures of `evaluate.lm_eval`, with made-up values; a UserError where a task cannot be run."""
    section = everything.evaluate
    if "evaluate" not in everything.all.stages or not section.lm_eval:
        return {}
    return harness.rehearse(section.lm_eval, section.lm_eval_limit, context)


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--dataset", type=Path, required=True, help="the tokenized dataset's folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the checks that passed")
    parser.add_argument(
        "--estimate", type=Path, required=True, help="JSON file for the checks' figures and the estimate"
    )
    args = parser.parse_args(argv)
    with cli.job("rehearse", args.log) as job:
        everything = params.load(args.params)
        refuse_what_is_not_there(everything, load_prompt(args.dataset))
        try_metrics(everything, args.dataset)
        of_tasks = rehearse_tasks(everything, context_of(args.base))
        context = estimate.probe_context()
        scratch = args.output.parent / f".{args.output.stem}.partial"
        outputs.remove(scratch)
        free = estimate.free_disk(Path())
        try:
            with outputs.written(files=[args.output, args.estimate]) as (checks_file, estimate_file):
                checks = rehearse(everything, args.base, args.dataset, scratch, of_tasks, job)
                outputs.write_json(checks_file, {"passed": list(checks)})
                needs = estimate.estimate(everything, args.base, args.dataset, scratch, job, context)
                section = everything.rehearse
                room = (section.memory_gb or 0) * 1e9 or memory.available()
                disk = (section.disk_gb or 0) * 1e9 or free
                outputs.write_json(
                    estimate_file,
                    {
                        "checks": checks,
                        "stages": {stage: need._asdict() for stage, need in needs.items()},
                        "memory": room,
                        "disk": disk,
                    },
                )
                if needs:
                    job.say("what the build needs:\n" + estimate.table(needs, room, disk))
                    if section.refuse:
                        estimate.refuse_too_large(needs, room, disk)
        finally:
            outputs.remove(scratch)
        job.say(f"every stage works on the twin ({job.seconds():.0f} s)")


if __name__ == "__main__":
    main()
