"""What several runs with other seeds say together (results/seeds.json of `make seeds`): mean, spread, figure and page."""

import json
import statistics
from pathlib import Path

from slmake import params
from slmake.errors import UserError
from slmake.plan import Plan
from slmake.reporting.figures import colour, save
from slmake.reporting.pages import escape, html_table, page
from slmake.text import columns

COLUMNS = ("mean", "sd", "least", "greatest")
# Rules, and sections of params.yaml, that move a score.
BUILT_BY = (
    "fetch_model",
    "prepare",
    "adapter",
    "finetune",
    "merge",
    "quantize",
    "evaluate",
)


def summary(runs: list[dict]) -> list[dict]:
    """For every model and score that all runs have: mean, standard deviation (of a sample), least and greatest value."""
    lines = []
    for model, scores in runs[0]["scores"].items():
        for score in scores:
            values = [run["scores"].get(model, {}).get(score) for run in runs]
            if None not in values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                lines.append(
                    {
                        "model": model,
                        "score": score,
                        "mean": statistics.fmean(values),
                        "sd": spread,
                        "least": min(values),
                        "greatest": max(values),
                    }
                )
    return lines


def table(lines: list[dict]) -> str:
    """The summary as text, in columns."""
    rows = [["model", "score", *COLUMNS]]
    for line in lines:
        figures = [line[name] for name in COLUMNS]
        rows.append([line["model"], line["score"], *("" if value is None else f"{value:.4f}" for value in figures)])
    return columns(rows)


def read_seeds(path: Path) -> dict:
    """What `make seeds` wrote, from the file of report.seeds; its summary is made again from its runs.

    Raises:
        UserError: it is not there, or is something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        runs = result["runs"]
        lines = summary(runs)
        if [line["model"] for line in lines if line["score"] == "accuracy"] != list(runs[0]["scores"]):
            raise ValueError("not every run has an accuracy of every model")
        return {"params": {**result["params"]}, "inputs": {**result["inputs"]}, "runs": runs, "summary": lines}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        other_form = isinstance(error, LookupError | TypeError | AttributeError)
        reason = "it has another form" if other_form else error
        raise UserError(
            f"report.seeds: {path}: {reason}. It should be the results/seeds.json of `make seeds`: bring that back, or set report.seeds "
            "to null."
        ) from None


def draw_seeds(plt, result: dict, path: Path) -> None:
    """Accuracy of every run, a row of dots a model, with the mean and one standard deviation to each side."""
    runs = result["runs"]
    models = list(runs[0]["scores"])
    figure, axes = plt.subplots(figsize=(8, 0.7 * len(models) + 1.6))
    for position, name in enumerate(models):
        values = [run["scores"][name]["accuracy"] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.errorbar(
            statistics.fmean(values), position, xerr=spread, color="#1f2328", marker="|", markersize=18, capsize=4
        )
        axes.scatter(values, [position] * len(values), color=colour(name), s=30, zorder=3)
    axes.set(xlabel="accuracy (line: mean and standard deviation)", title=f"Accuracy of {len(runs)} runs")
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.5, -0.5)
    save(plt, figure, path)


def inputs(everything: params.Params) -> dict[str, str]:
    """Digests of code and files of the rules that move a score, by rule."""
    plan = Plan(everything)
    return {rule: plan.digest(rule) for rule in plan.rules if rule in BUILT_BY}


def seeds_page(result: dict, everything: params.Params) -> str:
    """Every score's mean and spread, what the runs changed, and which sections of params.yaml have changed since."""
    rows = [
        [line["model"], line["score"], *("" if line[name] is None else f"{line[name]:.4f}" for name in COLUMNS)]
        for line in result["summary"]
    ]
    now = params.sums(everything)
    changed = [f"{name} in params.yaml" for name in BUILT_BY if result["params"].get(name) != now[name]]
    current = inputs(everything)
    changed += ["set of stages"] if result["inputs"].keys() != current.keys() else []
    changed += [
        f"code or input of {rule}"
        for rule, digest in current.items()
        if rule in result["inputs"] and result["inputs"][rule] != digest
    ]
    warning = (
        f'<p class="bad">These runs had another {escape(", another ".join(changed))}. Run <code>make seeds</code> again.</p>'
        if changed
        else ""
    )
    return page(
        "Runs with other seeds",
        f"<p>{len(result['runs'])} builds that differ in their seeds, splits and data types alone; standard deviations of a sample.</p>",
        warning,
        html_table(["model", "score", *COLUMNS], rows),
    )
