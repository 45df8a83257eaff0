"""HTML pages of the report."""

import csv
import html
from collections.abc import Collection
from pathlib import Path

from slmake import params
from slmake.csv_files import read_csv
from slmake.errors import UserError
from slmake.export.proposals import described
from slmake.scoring.gates import MODELS, SIGNS, judge, number, read_published
from slmake.scoring.metrics import held_out, is_right
from slmake.text import printable

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; margin: 24px; max-width: 1100px; background: #fff }
h2 { font-size: 17px; margin: 24px 0 8px } p { margin: 8px 0; color: #57606a }
table { border-collapse: collapse; margin: 8px 0 } th, td { padding: 6px 12px; border-bottom: 1px solid #d8dee4; text-align: left; vertical-align: top; white-space: pre-line }
td:first-child { white-space: nowrap } th { color: #57606a; font-weight: 600 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.ok { color: #116329; font-weight: 600 } .bad { color: #a40e26; font-weight: 600 } p.verdict { font-size: 17px; color: inherit }
code, .row { font: 13px ui-monospace, monospace; overflow-wrap: anywhere } div.row { line-height: 1.7; white-space: pre-wrap; padding: 8px 12px; background: #f6f8fa }
.trained { background: #dafbe1; color: #116329 } .special { border: 1px solid #8c959f; border-radius: 3px; padding: 0 2px }
"""


def escape(text: object) -> str:
    """Text for HTML; control characters as symbols."""
    return html.escape(printable(str(text)))


def page(title: str, *parts: str) -> str:
    """A small self-contained HTML page."""
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n{body}\n</html>\n'


def html_table(head: list[str], rows: list[list[object]], classes: list[str] | None = None) -> str:
    """A table; numbers stand right, `classes` adds a class to the first cell of each row."""
    numbers = [
        all(isinstance(row[i], (int, float)) or _looks_numeric(str(row[i])) for row in rows) for i in range(len(head))
    ]
    columns = [' class="n"' if number and rows else "" for number in numbers]
    lines = ["<table>"]
    if any(head):
        lines.append(
            "<tr>" + "".join(f"<th{m}>{escape(name)}</th>" for m, name in zip(columns, head, strict=True)) + "</tr>"
        )
    for k, row in enumerate(rows):
        own = [f' class="{classes[k]}"' if classes and i == 0 else columns[i] for i in range(len(row))]
        lines.append(
            "<tr>" + "".join(f"<td{m}>{escape(cell)}</td>" for m, cell in zip(own, row, strict=True)) + "</tr>"
        )
    return "\n".join([*lines, "</table>"])


def _looks_numeric(text: str) -> bool:
    return (
        text.replace(",", "").replace(".", "", 1).replace("-", "", 1).replace("%", "", 1).replace(" MB", "").isdigit()
        or text == "–"
    )


def models_of(metrics: dict) -> list[str]:
    return [name for name in MODELS if name in metrics]


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def verdict(metrics: dict, gates: list[dict], problem: str) -> str:
    """The last model in one sentence, and whether it passed."""
    names = models_of(metrics)
    last, first = metrics[names[-1]], metrics[names[0]]
    if metrics["test_rows"]:
        ends = f"{last['accuracy_low']:.1%} to {last['accuracy_high']:.1%}"
        score = f"accuracy {last['accuracy']:.1%} ({ends}) on {metrics['test_rows']:,} held-out answers"
    else:
        score = f"no dataset; perplexity {last['perplexity']:,.2f} of {metrics['texts']} fixed texts"
    share = f", {last['size_bytes'] / first['size_bytes']:.0%} of {names[0]}'s size" if len(names) > 1 else ""
    passed = sum(gate["passed"] for gate in gates)
    judged = (
        f"{passed} of {len(gates)} gates passed"
        if gates
        else "the gates cannot be judged"
        if problem
        else "no gate is set"
    )
    look = "bad" if problem or passed < len(gates) else "ok"
    return f'<p class="verdict"><b>{escape(names[-1])}</b>: {score}, {megabytes(last["size_bytes"])}{share}. <span class="{look}">{judged}</span>.</p>'


def overview(
    everything: params.Params, base: dict, dataset: dict, metrics: dict, summary: str, search: dict | None = None
) -> str:
    """What was built from what, with digests, and the settings that matter most."""
    inputs = [["base model", base["source"], base.get("sha256") or "–"]]
    for split, source in dataset["source"].items():
        inputs.append([f"data ({split})", source["source"], source.get("sha256", "–")])
    if "merge" in everything.all.stages and everything.adapter.source:
        inputs.append(["adapter", everything.adapter.source, everything.adapter.sha256 or "–"])
    score, form = ("accuracy", ".1%") if metrics["test_rows"] else ("perplexity", ",.2f")
    sizes = [
        [name, megabytes(metrics[name]["size_bytes"]), format(metrics[name][score], form)]
        for name in models_of(metrics)
    ]
    settings = []
    if "finetune" in everything.all.stages:
        tune = everything.finetune
        settings = [["method", f"{tune.method}, r {tune.lora_r}, alpha {tune.lora_alpha}, {tune.target_modules}"]]
        settings += [["learning rate", f"{tune.learning_rate:g}, {tune.lr_scheduler_type}"]]
        settings += [["steps", tune.max_steps] if tune.max_steps else ["epochs", f"{tune.num_train_epochs:g}"]]
        settings += [["batch", tune.per_device_train_batch_size * tune.gradient_accumulation_steps]]
    quantize = everything.quantize
    if search:
        quantize = quantize.model_copy(update=search["options"])
        settings += [
            ["search", f"candidate {search['winner']} of {len(search['candidates'])}, by {search['objective']}"]
        ]
    if "quantize" in everything.all.stages:
        export = [quantize.precision, f"for {quantize.execution_provider}"]
        if quantize.precision in ("int4", "int8"):
            export += [f"blocks of {quantize.block_size}"]
        if quantize.precision == "int4":
            export += [quantize.algo_config] + ["after GPTQ"] * (quantize.calibration == "gptq")
        settings += [["export", ", ".join(export)]]
        if quantize.precision == "int4":
            eight = ", ".join(filter(None, [quantize.matmul_mixed_precision, *quantize.int8_nodes]))
            settings += [["kept in 8 bits", eight or "nothing"]]
    return page(
        "What was built from what",
        summary,
        "<h2>Inputs</h2>",
        html_table(["", "source", "SHA-256"], inputs),
        _rows_read(dataset, metrics["test_rows"], "finetune" in everything.all.stages),
        "<h2>Models</h2>",
        html_table(["model", "size", score], sizes),
        "<h2>Settings</h2>",
        html_table(["", ""], settings),
    )


def _rows_read(dataset: dict, scored: int, tuned: bool) -> str:
    """How many rows went where, as a paragraph; `scored` answers of the test split; `tuned`: something was trained on the others."""
    rows = dataset["rows"]
    if not dataset["source"]:
        return f"<p>No dataset: {dataset['texts']} fixed texts measure the models.</p>"
    uses = (
        ("to train on", "for the loss during training")
        if tuned
        else ("for training", "for its loss (nothing was trained)")
    )
    answers = held_out(dataset)
    some = f", of whose {answers:,} answers the first {scored:,} are scored" * (scored < answers)
    return (
        f"<p>{rows['read']:,} rows read: {rows['train']:,} {uses[0]}, {rows['eval']:,} {uses[1]}, {rows['test']:,} "
        f"held out for the test{some}. {dataset['truncated']:,} prompts truncated, {dataset['duplicates']['removed_from_train']:,} near copies of "
        "held-out rows removed.</p>"
    )


def scores_page(metrics: dict) -> str:
    """All scores of all models, and the parity of each step."""
    names = models_of(metrics)
    keys = [
        key
        for key, value in metrics[names[-1]].items()
        if isinstance(value, (int, float)) and not key.endswith(("_low", "_high"))
    ]
    rows = []
    for key in keys:
        cells: list[object] = [key]
        for name in names:
            scores = metrics[name]
            if key == "size_bytes":
                cells.append(megabytes(scores[key]))
            else:
                ends = f" ({scores[f'{key}_low']:.3f} to {scores[f'{key}_high']:.3f})" if f"{key}_low" in scores else ""
                cells.append(f"{scores[key]:,.3f}{ends}" if key in scores else "–")
        rows.append(cells)
    about = f"{metrics['test_rows']} held-out answers; 95% intervals by bootstrap in brackets."
    if not metrics["test_rows"]:
        about = f"No dataset: {metrics['texts']} fixed texts, each behind its opening."
    parts = [f"<p>{about}</p>", html_table(["", *names], rows)]
    for name, device in metrics.get("providers", {}).items():
        parts.append(
            f"<p>{escape(name)} was exported for {escape(device['exported_for'])} and scored on {escape(device['scored_on'])}; its latency on "
            "the target was not measured.</p>"
        )
    steps = {key: figures for key, figures in metrics.get("parity", {}).items() if key != "tokenizer"}
    if steps:
        token = "first answer token" if metrics["test_rows"] else "next token"
        parts.append(f"<h2>Parity of the {token}, step by step</h2>")
        head = ["step", "prompts", "mean KL (nats)", "largest KL", f"same {token}", "largest logit difference"]
        rows = [
            [
                " against ".join(key.split("_vs_")),
                difference["prompts"],
                *(f"{difference[field]:.4f}" for field in ("kl_mean", "kl_max")),
                f"{difference['top1_agreement']:.1%}",
                f"{difference['logit_diff_max']:.4f}",
            ]
            for key, difference in steps.items()
        ]
        parts.append(html_table(head, rows))
    if metrics.get("drop"):
        parts.append("<h2>Accuracy lost, in points</h2>")
        lost = [
            [
                " against ".join(key.split("_vs_")),
                f"{100 * difference['accuracy']:.1f}",
                f"{100 * difference['accuracy_low']:.1f} to {100 * difference['accuracy_high']:.1f}",
            ]
            for key, difference in metrics["drop"].items()
        ]
        parts.append(html_table(["step", "points", "95% interval (paired)"], lost))
    return page("Scores", *parts)


def gates_page(gates: list[dict]) -> str:
    """The judged gates."""
    if not gates:
        return page("Gates", "<p>No gate is set. docs/quality.md says how to choose some.</p>")
    rows = [
        [
            "passed" if gate["passed"] else "missed",
            gate["metric"],
            gate["model"] + (f" against {gate['against']}" if "against" in gate else ""),
            gate["kind"].replace("_", " "),
            number(gate["value"]) + (f" ({number(gate['low'])} to {number(gate['high'])})" if "low" in gate else ""),
            f"{SIGNS[gate['kind']]} {number(gate['bound'])}"
            + (f", {gate['interval']} end" if gate.get("interval", "ignore") != "ignore" else ""),
        ]
        for gate in gates
    ]
    classes = ["ok" if gate["passed"] else "bad" for gate in gates]
    return page(
        "Gates", html_table(["verdict", "figure", "model", "kind", "value (95% interval)", "bound"], rows, classes)
    )


def candidates_page(result: dict, section: params.Quantize) -> str:
    """Every candidate of a search: its options, its figures on the tuning rows, and whether it passed."""
    head = ["", "candidate", "options", "accuracy", "mean KL", "same first token", "MB", "p50 ms", "front", "gates"]
    rows, classes = [], []
    for candidate in result["candidates"]:
        options, chosen = described(candidate["options"], section), candidate["candidate"] == result["winner"]
        if "failed" in candidate:
            options += f"\ncould not be built: {candidate['failed'].splitlines()[0]}"
            cells = ["–"] * 7
        else:
            cells = [
                f"{candidate['metrics']['accuracy']:.1%}",
                f"{candidate['parity']['kl_mean']:.4f}",
                f"{candidate['parity']['top1_agreement']:.1%}",
                f"{candidate['metrics']['size_bytes'] / 1e6:,.1f}",
                f"{candidate['benchmark']['latency_ms_p50']:,.1f}",
                "yes" if candidate["pareto"] else "no",
                "passed" if candidate["passed"] else "missed",
            ]
        rows.append(["chosen" if chosen else "", candidate["candidate"], options, *cells])
        classes.append("ok" if chosen else "")
    return page(
        "Quantization candidates",
        f"<p>On {result['tuning_rows']} tuning rows; merged, not quantized, has {result['merged']['accuracy']:.1%}. Of the candidates that pass "
        f"the gates there the {'smallest' if result['objective'] == 'size' else 'fastest'} is chosen. "
        "No other candidate is better in accuracy and cost than one on the front.</p>",
        html_table(head, rows, classes),
    )


def cost_page(timings: dict, benchmarks: Path, built: Collection[str]) -> str:
    """Seconds and memory of every rule, and what each model costs to run.

    Args:
        benchmarks: the folder of Snakemake's benchmark files, in which rules and candidates of earlier builds may have some, too.
        built: names of those of this build.
    """
    rules = []
    files = [file for file in benchmarks.glob("*.tsv") if file.stem in built]
    for file in sorted(files, key=lambda path: path.stat().st_mtime):
        with open(file, encoding="utf-8") as handle:
            runs = list(csv.DictReader(handle, delimiter="\t"))
        if runs:
            last = runs[-1]
            rss = last["max_rss"]
            rules.append(
                [file.stem, f"{float(last['s']):,.1f}", f"{float(rss):,.0f}" if rss not in ("-", "NA") else "–"]
            )
    fields = {
        "load_s": "load s",
        "latency_ms_p50": "p50 ms",
        "latency_ms_p95": "p95 ms",
        "latency_ms_p99": "p99 ms",
        "prefill_tokens_per_s": "prefill tokens/s",
        "decode_tokens_per_s": "decode tokens/s",
        "peak_memory_bytes": "peak MB",
    }
    models = []
    for name in [name for name in MODELS if name in timings]:
        values = [timings[name].get(field) for field in fields]
        cells = [
            "–"
            if value is None
            else f"{value / (1e6 if field == 'peak_memory_bytes' else 1):,.{0 if value > 1000 else 1}f}"
            for field, value in zip(fields, values, strict=True)
        ]
        models.append([name, *cells])
    return page(
        "Time and memory",
        "<h2>Per rule</h2>",
        html_table(["rule", "seconds", "peak MB"], rules) if rules else "<p>Nothing recorded.</p>",
        "<h2>Per model</h2>",
        html_table(["model", *fields.values()], models),
        "<p>Latency is from the prompt to the end of the answer, one row at a time. base, adapter and merged read prompts in batches.</p>",
    )


def rows_page(examples: list[dict]) -> str:
    """Rows as the model sees them: trained text in colour, special tokens framed."""
    parts = [
        '<p>The first rows of train, as the model reads them. <span class="row trained">Green text</span> is what a training teaches it to say, '
        '<span class="row special">framed text</span> a special token. One row in a terminal: <code>make preview ROW=3</code>.</p>'
    ]
    for example in examples:
        text = "".join(
            f'<span class="{" ".join(["trained"] * trained + ["special"] * special)}">{escape(part)}</span>'
            for part, trained, special in example["parts"]
        )
        parts.append(f'<h2>{escape(example["title"])}</h2>\n<div class="row">{text}</div>')
    return page("Rows as the model sees them", *parts)


def read_predictions(path: Path, asked: int) -> list[dict]:
    """The rows of predictions.csv.

    Raises:
        UserError: it is not there or damaged, or has another number of rows than metrics.json has.
    """
    rows = read_csv(path, ("row",))
    if len(rows) != asked:
        raise UserError(
            f"{path} has {len(rows)} rows, {path.with_name('metrics.json')} speaks of {asked}: remove both and run snakemake."
        )
    return rows


def wrong_page(predictions: list[dict], models: list[str], limit: int, task: bool = True) -> str:
    """The first wrong answers of the last model, with every model's answer beside.

    Args:
        task: there is a dataset, so that answers are right or wrong.
    """
    last = models[-1]
    wrong = [row for row in predictions if not task or not is_right(row["expected"], row[last])]
    head = ["row", "prompt", "expected", *models]
    rows = [
        [
            f"{row['row']:.0f}" + (f", turn {row['turn']}" if "turn" in row else ""),
            row["prompt"],
            row["expected"],
            *(row[name] or "(empty)" for name in models),
        ]
        for row in wrong[:limit]
    ]
    summary = f"<p>{len(wrong)} of {len(predictions)} answers of {escape(last)} are wrong; the first {len(rows)} are shown.</p>"
    if not task:
        summary = (
            "<p>No dataset, so no answer is right or wrong: what each model writes behind the opening of a text.</p>"
        )
    return page("Wrong answers" if task else "Continuations", summary, html_table(head, rows) if rows else "")


def judged(section: params.Gates, metrics: dict, timings: dict) -> tuple[list[dict], str]:
    """The gates' verdicts; where they cannot be judged, the reason."""
    try:
        return judge(section, metrics, timings, read_published(section)), ""
    except UserError as error:
        return [], str(error)
