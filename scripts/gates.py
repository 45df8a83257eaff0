"""Judge the last model built against the gates; a missed gate fails the build.

    python scripts/gates.py --params params.yaml --metrics results/metrics.json --output results/gates.json

Reads the section `gates` and the metrics that evaluate wrote. Every gate is judged and shown before the build fails, and
the metrics stay where they are: a gate can be changed and judged again without scoring anything twice.
"""

import json
from pathlib import Path

from common import cli, outputs, params
from common.errors import UserError

ADVICE = {
    "min_accuracy": "train longer (finetune.num_train_epochs), raise finetune.lora_r, or add training rows",
    "max_accuracy_drop": "choose a milder quantization (quantize.algo_config k_quant, matmul_mixed_precision, or precision int8)",
}


def judge(section: params.Gates, metrics: dict) -> list[dict]:
    """One entry per gate that is set: its name, the models compared, bound, value, and whether it passed."""
    models = [name for name, value in metrics.items() if isinstance(value, dict)]
    last = models[-1]
    found = []
    if section.min_accuracy is not None:
        value = metrics[last]["accuracy"]
        found.append(
            {
                "gate": "min_accuracy",
                "model": last,
                "bound": section.min_accuracy,
                "value": value,
                "passed": value >= section.min_accuracy,
            }
        )
    if section.max_accuracy_drop is not None and len(models) < 2:
        raise UserError(
            "gates.max_accuracy_drop: only one model was scored; add another to evaluate.models, or set it to null."
        )
    if section.max_accuracy_drop is not None:
        against = models[-2]
        value = round(metrics[against]["accuracy"] - metrics[last]["accuracy"], 6)
        passed = value <= section.max_accuracy_drop
        found.append(
            {
                "gate": "max_accuracy_drop",
                "model": last,
                "against": against,
                "bound": section.max_accuracy_drop,
                "value": value,
                "passed": passed,
            }
        )
    return found


def table(found: list[dict]) -> str:
    """The judged gates as lines of text."""
    lines = []
    for one in found:
        sign = "≥" if one["gate"].startswith("min") else "≤"
        against = f" against {one['against']}" if "against" in one else ""
        lines.append(
            f"  {'passed' if one['passed'] else 'MISSED'}  {one['gate']}: {one['model']}{against} {one['value']:.4f} {sign} {one['bound']:.4f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json of evaluate")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the judgement")
    args = parser.parse_args(argv)
    with cli.job("gates", args.log) as job:
        section = params.section(args.params, "gates")
        with outputs.written(files=[args.output]) as (target,):
            found = judge(section, json.loads(args.metrics.read_text(encoding="utf-8")))
            missed = [one for one in found if not one["passed"]]
            if missed:
                advice = "".join(
                    f"\n  {one['gate']} is missed by {abs(one['value'] - one['bound']):.4f}: {ADVICE[one['gate']]}."
                    for one in missed
                )
                raise UserError(
                    f"{len(missed)} of {len(found)} gates missed.\n{table(found)}{advice}\n{args.metrics} stays as it is."
                )
            outputs.write_json(target, {"gates": found})
        job.say(f"all {len(found)} gates passed\n{table(found)}" if found else "no gate is set")


if __name__ == "__main__":
    main()
