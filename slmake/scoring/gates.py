"""Judge metrics against gates."""

import json
import textwrap
import unicodedata
from pathlib import Path

from slmake import outputs, params
from slmake.errors import UserError
from slmake.params.gates import OF_LABELS, OF_OPEN_TEXT, OF_TEXTS, PARITY, TIMINGS
from slmake.text import columns

MODELS = ("base", "adapter", "merged", "int4", "int8", "fp16", "fp32")  # in the order they are made
SIGNS = {"minimum": "≥", "minimum_ratio": "≥", "maximum": "≤", "maximum_ratio": "≤", "maximum_drop": "≤"}
INTERVAL = ("accuracy", "accuracy_low", "accuracy_high")
# What evaluate always writes into each entry of these parts of metrics.json.
PARTS = {"parity": ("prompts", *PARITY), "drop": INTERVAL, "per_class": ("precision", "recall", "f1", "rows")}
TOKENIZER = ("rows", "encode_differ", "decode_differ")
ADVICE = {
    "minimum": "train longer (finetune.num_train_epochs), raise finetune.lora_r, or add training rows",
    "maximum_drop": "choose a milder quantization (quantize.algo_config k_quant, matmul_mixed_precision, int8_nodes, or precision int8), or "
    "let quantize.search choose",
}


def judge(
    section: params.Gates, metrics: dict, benchmark: dict | None = None, published: dict | None = None
) -> list[dict]:
    """One entry per gate: its name, figure, models, bound, value (with its interval where there is one), and whether it passed.

    Raises:
        UserError: a gate that cannot be judged: its figure or model is not there, or the test split is too small for it.
    """
    names = [name for name in MODELS if name in metrics]
    if not names:
        raise UserError("no model was scored, so no gate can be judged. Build results/metrics.json again.")
    judged = []
    for name, gate in section.every().items():
        model = _model(name, gate, names)
        rows = _rows(name, gate, metrics, model)
        if rows < gate.rows_needed():
            raise UserError(
                f"gates.{name}: {gate.kind} {gate.bound:g} of {gate.metric} needs at least {gate.rows_needed()} test rows; there are {rows}. "
                "Add rows, raise prepare.test_fraction or evaluate.max_samples, or set a wider bound."
            )
        entry = {"gate": name, "metric": gate.metric, "kind": gate.kind, "model": model}
        value, low, high = _value(name, gate, model, names, metrics, benchmark or {}, published, entry)
        upward = gate.kind.startswith("minimum")
        decisive = value
        if gate.interval != "ignore":
            decisive = low if upward == (gate.interval == "worst") else high
        passed = decisive >= gate.bound if upward else decisive <= gate.bound
        entry |= {"bound": gate.bound, "value": value}
        if low is not None:
            entry |= {"low": low, "high": high, "interval": gate.interval}
        entry["passed"] = bool(passed)
        judged.append(entry if passed else entry | {"missed_by": round(abs(decisive - gate.bound), 6)})
    return judged + tokenizer_gate(section, metrics, names[-1])


def tokenizer_gate(section: params.Gates, metrics: dict, model: str) -> list[dict]:
    """The gate on the runtime's tokenizer, where an exported model was scored: one entry, or none."""
    agreement, bound = metrics.get("parity", {}).get("tokenizer"), section.max_tokenizer_differences
    if agreement is None or bound is None:
        return []
    value = agreement["encode_differ"] + agreement["decode_differ"]
    entry = {"gate": "max_tokenizer_differences", "metric": "tokenizer_differences", "kind": "maximum", "model": model}
    entry |= {"bound": bound, "value": value, "passed": value <= bound}
    return [entry if entry["passed"] else entry | {"missed_by": value - bound}]


def advice(entry: dict, metrics: dict) -> str:
    """What to do about a missed gate, as the end of a sentence; empty where it depends on the task."""
    if entry["gate"] != "max_tokenizer_differences":
        return f": {ADVICE[entry['kind']]}" if entry["kind"] in ADVICE else ""
    first = metrics["parity"]["tokenizer"]["first"]
    return (
        f": row {first['row']} has {first['training']!r} in training and {first['runtime']!r} in the runtime, so users get other answers "
        "than evaluate would show. Clean such characters from the dataset, use another base model or version of onnxruntime-genai, "
        "or allow so many differences with gates.max_tokenizer_differences"
    )


def check_figures(section: params.Gates, labels: list[str] | None) -> None:
    """Raise UserError if a gate is on a figure that answers of this dataset do not have, or on that of a label that is not there.

    Args:
        labels: the dataset's; None for open text.
    """
    for name, gate in section.every().items():
        if gate.metric in (OF_OPEN_TEXT if labels else OF_LABELS):
            kinds = ("open text", "a classification")
            of, here = kinds if labels else kinds[::-1]
            instead = "accuracy or macro_f1" if labels else "accuracy or rouge_l, or set prepare.labels"
            raise UserError(
                f"gates.{name}: {gate.metric} is a figure of {of}, and the dataset is {here}. Bound {instead}, or take the gate out."
            )
        if gate.metric.startswith("per_class."):
            _figure(
                name,
                gate.metric,
                {"per_class": {label: {gate.metric.rpartition(".")[2]: 0.0} for label in labels or []}},
                "",
            )


def check_published(section: params.Gates) -> None:
    """Raise UserError if the published model's metrics cannot be read, or lack a figure that a gate compares with."""
    published = read_published(section) or {}
    for name, gate in section.every().items():
        if gate.against == "published" and gate.kind not in ("minimum", "maximum"):
            _figure(name, gate.metric, _last(published), "published")


def _last(metrics: dict) -> dict:
    """The figures of the last model that was scored."""
    return metrics[[known for known in MODELS if known in metrics][-1]]


def _model(name: str, gate: params.Gate, names: list[str]) -> str:
    if gate.model == "last":
        return names[-1]
    wanted = (
        next((model for model in names if model not in ("base", "adapter", "merged")), "onnx")
        if gate.model == "onnx"
        else gate.model
    )
    if wanted not in names:
        raise UserError(
            f"gates.{name}: {gate.model} was not scored. Add it to evaluate.models, or change the gate's model."
        )
    return wanted


def _rows(name: str, gate: params.Gate, metrics: dict, model: str) -> int:
    """Rows behind the figure: those of the class for a class's figure, the compared prompts for a parity."""
    if gate.metric in PARITY:
        return max((entry.get("prompts", 0) for entry in metrics.get("parity", {}).values()), default=0)
    if gate.metric.startswith("per_class."):
        return _figure(name, gate.metric.rpartition(".")[0] + ".rows", metrics[model], model)
    return metrics["test_rows"] or metrics["texts"]


def _figure(name: str, metric: str, figures: dict, model: str) -> float:
    """A figure by its dotted name (a label may have dots in it itself).

    Raises:
        UserError: this model has no such figure.
    """
    first, _, rest = metric.partition(".")
    if first == "per_class" and first in figures:
        label, _, what = rest.rpartition(".")
        figures_of = {unicodedata.normalize("NFC", known): row for known, row in figures[first].items()}
        row = figures_of.get(unicodedata.normalize("NFC", label))  # evaluate writes labels in the tokenizer's form
        if row:
            return row[what]
        raise UserError(f"gates.{name}: no label `{label}`. Labels: {', '.join(figures[first])}.")
    if metric not in figures:
        there = [key for key in figures if isinstance(figures[key], (int, float))]
        raise UserError(f"gates.{name}: {model} has no figure `{metric}` on this task. It has: {', '.join(there)}.")
    return figures[metric]


def _value(name, gate, model, names, metrics, benchmark, published, entry) -> tuple[float, float | None, float | None]:
    """The gated value, and the ends of its interval (None where there is none). Adds `against` to the entry."""
    if gate.metric in PARITY:
        pair = next((key for key in metrics.get("parity", {}) if key.startswith(f"{model}_vs_")), None)
        if pair is None:
            raise UserError(
                f"gates.{name}: {model} was compared with no model. Score the one before it too (evaluate.models)."
            )
        entry["against"] = pair.partition("_vs_")[2]
        return metrics["parity"][pair][gate.metric], None, None

    scored = metrics.get("providers", {}).get(model)
    if scored and gate.metric in TIMINGS:
        raise UserError(
            f"gates.{name}: {model} was exported for {scored['exported_for']}, but {gate.metric} was measured on {scored['scored_on']}. "
            "Run evaluate on the target, or remove the gate."
        )

    def figures(of: str) -> dict:
        return metrics[of] | benchmark.get(of, {})

    value = _figure(name, gate.metric, figures(model), model)
    ends = figures(model).get(f"{gate.metric}_low"), figures(model).get(f"{gate.metric}_high")
    if gate.kind in ("minimum", "maximum"):
        return _with_interval(name, gate, value, *ends)
    if gate.against == "published":
        other, before = "published", _last(published)
    else:
        wanted = [earlier for earlier in names[: names.index(model)] if earlier != "adapter"]
        wanted = (
            wanted[-1:] if gate.against == "previous" else [earlier for earlier in wanted if earlier == gate.against]
        )
        if not wanted:
            raise UserError(
                f"gates.{name}: no model {'before ' + model if gate.against == 'previous' else gate.against} was scored to compare with; "
                "add it to evaluate.models, or remove the gate."
            )
        other, before = wanted[0], figures(wanted[0])
    entry["against"] = other
    was = _figure(name, gate.metric, before, other)
    if gate.kind.endswith("ratio"):
        if not was:
            raise UserError(f"gates.{name}: {gate.metric} of {other} is 0, so there is no ratio to it.")
        return round(value / was, 6), None, None
    drop = round(was - value, 6)
    paired = metrics.get("drop", {}).get(f"{model}_vs_{other}", {})
    if f"{gate.metric}_low" in paired:
        return _with_interval(name, gate, drop, paired[f"{gate.metric}_low"], paired[f"{gate.metric}_high"])
    if (
        None not in ends and f"{gate.metric}_low" in before
    ):  # another test set, perhaps: independent, so the variances add up
        halves = ((ends[1] - ends[0]) / 2, (before[f"{gate.metric}_high"] - before[f"{gate.metric}_low"]) / 2)
        wide = (halves[0] ** 2 + halves[1] ** 2) ** 0.5
        return _with_interval(name, gate, drop, round(drop - wide, 6), round(drop + wide, 6))
    return _with_interval(name, gate, drop, None, None)


def _with_interval(name, gate, value, low, high) -> tuple[float, float | None, float | None]:
    if gate.interval != "ignore" and low is None:
        raise UserError(
            f"gates.{name}: there is no interval for {gate.metric} here. Run evaluate again, or set interval: ignore."
        )
    return value, low, high


def number(value: float) -> str:
    """A figure as a person reads it: four digits behind the point, none for large ones."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"


def table(judged: list[dict]) -> str:
    """The judged gates as aligned lines of text."""
    rows = []
    for entry in judged:
        gate = (
            entry["gate"]
            if not entry["gate"].startswith("checks")
            else f"{entry['gate']} {entry['kind']} of {entry['metric']}"
        )
        models = entry["model"] + (f" against {entry['against']}" if "against" in entry else "")
        ends = f"[{number(entry['low'])}, {number(entry['high'])}]" if "low" in entry else ""
        asked = f" ({entry['interval']} end)" if entry.get("interval", "ignore") != "ignore" else ""
        verdict = "passed" if entry["passed"] else "MISSED"
        rows.append(
            (
                verdict,
                gate,
                models,
                number(entry["value"]),
                ends,
                f"{SIGNS[entry['kind']]} {number(entry['bound'])}{asked}",
            )
        )
    return textwrap.indent(columns(rows), "  ")


def read_metrics(path: Path) -> dict:
    """metrics.json of evaluate, in the shape that evaluate writes.

    Raises:
        UserError: it is not there or damaged.
    """
    return outputs.read_json(path, "test_rows", check=check_metrics)


def read_timings(path: Path) -> dict:
    """benchmark.json of evaluate.

    Raises:
        UserError: it is not there or damaged.
    """
    return outputs.read_json(path, check=lambda timings: _check_part("benchmark", timings))


def check_metrics(metrics: dict) -> None:
    """Raise ValueError where metrics do not have the shape that evaluate writes."""
    counts = {key: metrics[key] for key in ("test_rows", "texts") if key in metrics}
    _check_figures("metrics", counts, () if metrics["test_rows"] else ("texts",))
    scores = INTERVAL if metrics["test_rows"] else OF_TEXTS
    names = [name for name in MODELS if name in metrics]
    if not names:
        raise ValueError("no model was scored in it")
    for name in names:
        _check_model(name, metrics[name], (*scores, "size_bytes"))
    parity = dict(_named("parity", metrics.get("parity", {})))
    if "tokenizer" in parity:
        agreement = dict(_named("parity.tokenizer", parity.pop("tokenizer")))
        agreement.pop("first", None)
        _check_figures("parity.tokenizer", agreement, TOKENIZER)
    _check_part("parity", parity, PARTS["parity"])
    _check_part("drop", metrics.get("drop", {}), PARTS["drop"])


def _check_model(name: str, entry: object, needed: tuple[str, ...] = ()) -> None:
    entry = _named(name, entry)
    labels, counts = entry.get("per_class", {}), entry.get("confusion")
    _check_figures(name, {key: entry[key] for key in entry if key not in ("per_class", "confusion")}, needed)
    _check_part(f"{name}.per_class", labels, PARTS["per_class"])
    width = len(labels) + 1
    rows = counts if isinstance(counts, list) else [counts]
    fits = len(rows) == len(labels) and all(isinstance(row, list) and len(row) == width for row in rows)
    if counts is not None and not (fits and all(_is_number(count) for row in rows for count in row)):
        raise ValueError(f"`{name}.confusion` is not {len(labels)} rows of {width} counts")


def _check_part(where: str, entries: object, needed: tuple[str, ...] = ()) -> None:
    for name, figures in _named(where, entries).items():
        _check_figures(f"{where}.{name}", figures, needed)


def _check_figures(where: str, figures: object, needed: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless these are numbers by name, the needed ones and both ends of every interval among them."""
    figures = _named(where, figures)
    ends = [name.removesuffix("_low") + "_high" for name in figures if name.endswith("_low")]
    for name in (*needed, *ends):
        if name not in figures:
            raise ValueError(f"`{where}` has no `{name}`")
    for name, value in figures.items():
        if not _is_number(value):
            raise ValueError(f"`{where}.{name}` is not a number but {json.dumps(value)[:60]}")


def _named(where: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"`{where}` is not an object of figures but {json.dumps(value)[:60]}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_published(section: params.Gates) -> dict | None:
    """The last published model's metrics, from a metrics.json or a file that has it under `metrics`.

    Raises:
        UserError: the file is not there or holds no model's metrics.
    """
    if section.published is None:
        return None
    path = Path(section.published)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            content = content.get("metrics", content)
        names = [name for name in MODELS if isinstance(content, dict) and name in content]
        if not names:
            raise ValueError("no model's metrics in it")
        for name in names:
            _check_model(name, content[name])
    except FileNotFoundError:
        raise UserError(
            f"gates.published: {path}: no such file. Save the published model's metrics.json there; nothing published yet: set it to null."
        ) from None
    except (IsADirectoryError, ValueError, RecursionError) as error:
        reason = "a folder" if isinstance(error, IsADirectoryError) else error
        raise UserError(
            f"gates.published: {path}: {reason}. It should be the published model's metrics.json, or a file with it under `metrics`."
        ) from None
    return content
