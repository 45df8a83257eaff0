"""Judge the last model built against the gates; a missed gate fails the build.

    python -m scripts.gates --params params.yaml --metrics results/metrics.json --benchmark results/benchmark.json --output results/gates.json

Reads the section `gates` and evaluate's results. Every gate is judged and shown before the build fails, and the metrics
stay: a gate can be changed and judged again without scoring anything twice.
"""

from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.scoring.gates import advice, judge, number, read_metrics, read_published, read_timings, table


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json of evaluate")
    parser.add_argument("--benchmark", type=Path, help="benchmark.json of evaluate, for gates on time and memory")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the judgement")
    args = parser.parse_args(argv)
    with cli.job("gates", args.log) as job:
        section = params.section(args.params, "gates")
        with outputs.written(files=[args.output]) as (target,):
            metrics = read_metrics(args.metrics)
            benchmark = read_timings(args.benchmark) if args.benchmark else None
            judged = judge(section, metrics, benchmark, read_published(section))
            missed = [gate for gate in judged if not gate["passed"]]
            if missed:
                remedies = "".join(
                    f"\n  {gate['gate']} is missed by {number(gate['missed_by'])}{advice(gate, metrics)}."
                    for gate in missed
                )
                raise UserError(
                    f"{len(missed)} of {len(judged)} gates missed.\n{table(judged)}{remedies}\n{args.metrics} stays as it is."
                )
            outputs.write_json(target, {"gates": judged})
        job.say(f"all {len(judged)} gates passed\n{table(judged)}" if judged else "no gate is set")


if __name__ == "__main__":
    main()
