"""Figures of the report (SVG)."""

from pathlib import Path

from slmake.csv_files import read_csv
from slmake.reporting.pages import models_of
from slmake.text import one_line

LONGEST = 40  # characters of a label in a figure
MOST = 30  # labels in a figure

COLOURS = {
    "base": "#9aa0a6",
    "adapter": "#56b4e9",
    "merged": "#0072b2",
    "last": "#d55e00",
}  # distinct for colour-blind readers


def colour(name: str) -> str:
    return COLOURS.get(name, COLOURS["last"])


def plain_plots():
    """matplotlib without a screen, with SVG that is the same in every run."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "slmake",
            "svg.fonttype": "none",
            "text.parse_math": False,  # `$5-$10` is a label, not mathematics
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.h_pad": 0.12,
            "figure.constrained_layout.w_pad": 0.12,
        }
    )
    import matplotlib.pyplot

    return matplotlib.pyplot


def shown(labels: list[str]) -> list[str]:
    """Labels of a dataset as a figure can show them."""
    return [one_line(label, LONGEST) or "(empty)" for label in labels]


def save(plt, figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def draw_loss(plt, losses: list[Path], path: Path) -> None:
    """Training and eval loss over the steps, in nats per answer token."""
    from matplotlib.ticker import LogFormatter

    figure, axes = plt.subplots(figsize=(8, 4.2))
    drawn = False
    for file, name, look in zip(
        losses,
        ("train", "eval"),
        ({"color": COLOURS["merged"]}, {"color": COLOURS["last"], "marker": "o"}),
        strict=False,
    ):
        points = [(row["step"], row["loss"]) for row in read_csv(file, ("step", "loss"))]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **look)
            drawn = True
    if drawn:
        axes.set(xlabel="optimizer step", ylabel="cross entropy per answer token (nats)", title="Loss", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")  # 0.1, not 10⁻¹
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))  # none where they would overlap
        axes.legend()
    else:
        draw_note(axes, "Nothing was fine-tuned.")
    save(plt, figure, path)


def draw_note(axes, text: str) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", color="#57606a")


def draw_data(plt, dataset: dict, path: Path) -> None:
    """Histogram of sequence lengths, and rows per label and split."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    lengths = {int(key): count for key, count in dataset["length"]["histogram"].items()}
    left.bar(list(lengths), list(lengths.values()), width=1.0, color=COLOURS["merged"])
    left.axvline(dataset["length"]["p95"], color="#57606a", linestyle="--", linewidth=1)
    left.set(xlabel="tokens (dashed: 95th percentile)", ylabel="sequences", title="Length")
    left.locator_params(integer=True)
    labels = sorted(dataset["labels"]["train"], key=lambda label: -dataset["labels"]["train"][label])[:MOST]
    if labels:
        start = [0] * len(labels)
        for split, shade in (("train", COLOURS["merged"]), ("eval", COLOURS["adapter"]), ("test", COLOURS["last"])):
            counts = [dataset["labels"][split].get(label, 0) for label in labels]
            right.barh(range(len(labels)), counts, left=start, color=shade, label=split)
            start = [a + b for a, b in zip(start, counts, strict=True)]
        right.set_yticks(range(len(labels)), shown(labels))
        right.invert_yaxis()
        right.set(xlabel="rows", title="Labels")
        right.locator_params(axis="x", integer=True)
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    else:
        draw_note(right, "Open text: no labels.")
    save(plt, figure, path)


def draw_scores(plt, metrics: dict, path: Path) -> None:
    """Accuracy of every model with its 95% interval."""
    names = models_of(metrics)
    figure, axes = plt.subplots(figsize=(8, 0.7 * len(names) + 1.6))
    if not metrics["test_rows"]:
        draw_note(axes, "No dataset, so no accuracy.")
        save(plt, figure, path)
        return
    for position, name in enumerate(names):
        scores = metrics[name]
        ends = [
            [max(0, scores["accuracy"] - scores["accuracy_low"])],
            [max(0, scores["accuracy_high"] - scores["accuracy"])],
        ]
        axes.barh(position, scores["accuracy"], xerr=ends, color=colour(name), height=0.6, capsize=4, ecolor="#1f2328")
        axes.text(min(scores["accuracy_high"] + 0.015, 1.02), position, f"{scores['accuracy']:.1%}", va="center")
        if "restricted_accuracy" in scores:
            axes.plot(
                scores["restricted_accuracy"], position, marker="D", color="#1f2328", markersize=5, linestyle="none"
            )
    axes.set(
        xlim=(0, 1.1),
        xlabel="accuracy with 95% interval (diamond: choosing among the labels only)",
        title="Accuracy on the test split",
    )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    save(plt, figure, path)


def draw_confusion(plt, metrics: dict, path: Path) -> None:
    """A confusion matrix per model: a row per expected label, a column per answer, shares of the row as shades.

    Of many labels, those whose rows the last model got wrong most often.
    """
    names = [name for name in models_of(metrics) if "confusion" in metrics[name]]
    if not names:
        figure, axes = plt.subplots(figsize=(8, 2))
        draw_note(axes, "Open text: no labels to confuse.")
        save(plt, figure, path)
        return
    every = list(metrics[names[0]]["per_class"])
    wrong = [sum(row) - row[i] for i, row in enumerate(metrics[names[-1]]["confusion"])]
    kept = sorted(sorted(range(len(every)), key=lambda i: -wrong[i])[:MOST])
    labels, others = [every[i] for i in kept], "(other)" if len(kept) == len(every) else "(any other)"
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    side = max(3.4, 0.62 * len(labels) + 1.4)
    figure, grid = plt.subplots(lines, columns, figsize=(columns * side * 1.25, lines * side), squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names, strict=False):
        rows = [metrics[name]["confusion"][i] for i in kept]
        counts = [[*(own := [row[k] for k in kept]), sum(row) - sum(own)] for row in rows]
        shares = [[count / max(1, sum(row)) for count in row] for row in counts]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        if len(labels) <= 12:
            for i, row in enumerate(counts):
                for k, count in enumerate(row):
                    axes.text(
                        k, i, count, ha="center", va="center", color="white" if shares[i][k] > 0.55 else "#1f2328"
                    )
        axes.set_xticks(range(len(labels) + 1), [*shown(labels), others], rotation=35, ha="right")
        axes.set_yticks(range(len(labels)), shown(labels))
        title = name if len(kept) == len(every) else f"{name}: the {MOST} of {len(every)} labels with the most errors"
        axes.set(title=title, xlabel="answer", ylabel="expected")
        axes.spines[:].set_visible(False)
    save(plt, figure, path)


def draw_candidates(plt, result: dict, path: Path) -> None:
    """Accuracy on the tuning rows over the cost that was searched by, the other cost as colour; the Pareto front as a line."""
    built = [candidate for candidate in result["candidates"] if "failed" not in candidate]
    figure, axes = plt.subplots(figsize=(8, 5))
    costs = {
        "size (MB)": [candidate["metrics"]["size_bytes"] / 1e6 for candidate in built],
        "latency p50 (ms)": [candidate["benchmark"]["latency_ms_p50"] for candidate in built],
    }
    along, shade = list(costs) if result["objective"] == "size" else list(costs)[::-1]
    sizes, values = costs[along], [candidate["metrics"]["accuracy"] for candidate in built]
    dots = axes.scatter(sizes, values, c=costs[shade], cmap="viridis", s=60, zorder=3)
    figure.colorbar(dots, ax=axes, label=shade)
    front = sorted(
        (size, value) for size, value, candidate in zip(sizes, values, built, strict=True) if candidate["pareto"]
    )
    axes.plot(*zip(*front, strict=True), color="#57606a", linewidth=1, zorder=2, label="Pareto front")
    for size, value, candidate in zip(sizes, values, built, strict=True):
        axes.annotate(str(candidate["candidate"]), (size, value), textcoords="offset points", xytext=(6, 5))
    winner = [candidate["candidate"] for candidate in built].index(result["winner"])
    axes.scatter(
        [sizes[winner]],
        [values[winner]],
        s=220,
        facecolors="none",
        edgecolors=COLOURS["last"],
        linewidths=2,
        zorder=4,
        label="chosen",
    )
    axes.axhline(
        result["merged"]["accuracy"],
        color=COLOURS["merged"],
        linestyle="--",
        linewidth=1,
        label="merged, not quantized",
    )
    axes.set(xlabel=along, ylabel=f"accuracy on {result['tuning_rows']} tuning rows", title="Quantization candidates")
    figure.legend(loc="outside lower center", ncols=3)
    save(plt, figure, path)
