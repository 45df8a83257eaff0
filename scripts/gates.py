"""Judge the last model built against the gates; a missed gate fails the build.

    python -m scripts.gates --params params.yaml --metrics results/metrics.json --benchmark results/benchmark.json --output results/gates.json

Reads the section `gates` and what evaluate wrote. Every gate is judged and shown before the build fails, and the metrics
stay where they are: a gate can be changed and judged again without scoring anything twice.
"""

from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.scoring.judge import ADVICE, judge, number, read_metrics, read_published, read_timings, table


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
            found = judge(section, metrics, benchmark, read_published(section))
            missed = [one for one in found if not one["passed"]]
            if missed:
                advice = "".join(
                    f"\n  {one['gate']} is missed by {number(one['missed_by'])}"
                    + (f": {ADVICE[one['kind']]}." if one["kind"] in ADVICE else ".")
                    for one in missed
                )
                raise UserError(
                    f"{len(missed)} of {len(found)} gates missed.\n{table(found)}{advice}\n{args.metrics} stays as it is."
                )
            outputs.write_json(target, {"gates": found})
        job.say(f"all {len(found)} gates passed\n{table(found)}" if found else "no gate is set")


if __name__ == "__main__":
    main()
