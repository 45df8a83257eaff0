"""Draw the figures and tables of build/report.html.

    python -m scripts.report --params params.yaml --base-report results/base.json --dataset-report results/dataset.json \\
        --metrics results/metrics.json --timings results/benchmark.json --predictions results/predictions.csv \\
        --losses results/train_loss.csv results/eval_loss.csv --benchmarks benchmarks --output build/report

Reads what the other rules wrote, and the figures that gates.published and report.seeds name; `snakemake --report build/report.html` (`make report`) then puts all of it on
one page. Missed gates are shown here too. The same inputs give the same bytes (SVG without dates, ids from a fixed salt).
"""

from functools import partial
from pathlib import Path

from slmake import cli, outputs, params
from slmake.outputs import read_json
from slmake.plan import Plan
from slmake.reporting.figures import draw_candidates, draw_confusion, draw_data, draw_loss, draw_scores, plain_plots
from slmake.reporting.pages import (
    candidates_page,
    cost_page,
    escape,
    gates_page,
    judged,
    models_of,
    overview,
    page,
    read_predictions,
    rows_page,
    scores_page,
    verdict,
    wrong_page,
)
from slmake.reporting.seeds import draw_seeds, read_seeds, seeds_page
from slmake.scoring.gates import read_metrics, read_timings


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--base-report", type=Path, required=True, help="what fetch_model read (base.json)")
    parser.add_argument("--dataset-report", type=Path, required=True, help="what prepare read (dataset.json)")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json of evaluate")
    parser.add_argument("--timings", type=Path, required=True, help="benchmark.json of evaluate")
    parser.add_argument("--predictions", type=Path, required=True, help="predictions.csv of evaluate")
    parser.add_argument("--losses", type=Path, nargs="*", default=[], help="loss curves: train, then eval")
    parser.add_argument("--search", type=Path, help="search.json of search")
    parser.add_argument("--seeds", type=Path, help="seeds.json of make seeds")
    parser.add_argument(
        "--benchmarks", type=Path, default=Path("benchmarks"), help="folder of Snakemake's benchmark files"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    args = parser.parse_args(argv)
    with cli.job("report", args.log) as job:
        everything = params.load(args.params)
        metrics, timings = read_metrics(args.metrics), read_timings(args.timings)
        base, dataset = (
            read_json(args.base_report, "source"),
            read_json(args.dataset_report, "source", "rows", "examples"),
        )
        predictions = read_predictions(args.predictions, metrics["test_rows"] or metrics["texts"])
        result = read_json(args.search) if args.search else None
        seeds = read_seeds(args.seeds) if args.seeds else None
        gates, problem = judged(everything.gates, metrics, timings)
        pages = {
            "overview.html": overview(everything, base, dataset, metrics, verdict(metrics, gates, problem), result),
            "scores.html": scores_page(metrics),
            "gates.html": page("Gates", f"<p>{escape(problem)}</p>") if problem else gates_page(gates),
            "cost.html": cost_page(timings, args.benchmarks, Plan(everything).timed),
            "wrong_answers.html": wrong_page(
                predictions, models_of(metrics), everything.report.wrong_answers, task=metrics["test_rows"] > 0
            ),
            "rows.html": rows_page(dataset["examples"]),
        }
        plt = plain_plots()
        figures = {
            "loss.svg": partial(draw_loss, plt, args.losses),
            "data.svg": partial(draw_data, plt, dataset),
            "scores.svg": partial(draw_scores, plt, metrics),
            "confusion.svg": partial(draw_confusion, plt, metrics),
        }
        if result:
            pages["candidates.html"] = candidates_page(result, everything.quantize)
            figures["candidates.svg"] = partial(draw_candidates, plt, result)
        if seeds:
            pages["seeds.html"] = seeds_page(seeds, everything)
            figures["seeds.svg"] = partial(draw_seeds, plt, seeds)
        names = [*pages, *figures]
        with outputs.written(files=[args.output / name for name in names]) as files:
            file = dict(zip(names, files, strict=True))
            for name, text in pages.items():
                file[name].write_text(text, encoding="utf-8")
            for name, draw in figures.items():
                draw(file[name])
        job.say(
            f"{len(names)} figures and tables in {args.output} ({job.seconds():.0f} s). One page of them: make report"
        )


if __name__ == "__main__":
    main()
