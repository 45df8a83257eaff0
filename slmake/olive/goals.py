"""What an Olive search asks for: goals of metrics as gates, and options with several values as candidates (quantize.search)."""

from slmake.olive.fields import ALGORITHMS, OFF, Drop

# Olive's metrics and their sub-types by name here, and whether more is better.
METRICS = {
    ("accuracy", "accuracy_score"): ("accuracy", True),
    ("accuracy", "f1_score"): ("macro_f1", True),
    ("accuracy", "perplexity"): ("answer_perplexity", False),
    ("latency", "avg"): ("latency_ms_p50", False),
    ("latency", "p50"): ("latency_ms_p50", False),
    ("latency", "p90"): ("latency_ms_p95", False),
    ("latency", "p95"): ("latency_ms_p95", False),
    ("latency", "p99"): ("latency_ms_p99", False),
    ("throughput", "avg"): ("generated_tokens_per_s", True),
    ("size_on_disk", "bytes"): ("size_bytes", False),
}
OF_ROWS = ("accuracy", "macro_f1", "answer_perplexity")
OBJECTIVES = {"latency": "latency", "throughput": "latency", "size_on_disk": "size"}  # quantize.search.objective
SEARCHED = ("algo_config", "block_size", "is_symmetric", "accuracy_level")  # what may have several values
SAMPLER = Drop("all combinations are tried if the budget allows, else Optuna's TPE sampler chooses them")


def evaluators(reader, field: str, value: object) -> None:
    """Metrics with a goal are kept for `finish`; without one, `evaluate` measures by itself."""
    entries = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    for name, entry in entries.items():
        metrics = entry.get("metrics") if isinstance(entry, dict) else None
        for i, metric in enumerate(metrics if isinstance(metrics, list) else []):
            kinds = metric.get("sub_types") if isinstance(metric, dict) else None
            for k, kind in enumerate(kinds if isinstance(kinds, list) else []):
                goal, priority = (kind.get("goal"), kind.get("priority")) if isinstance(kind, dict) else (None, None)
                if isinstance(priority, int) and priority > 0 and str(metric.get("type")).lower() in OBJECTIVES:
                    reader.priorities.append((priority, OBJECTIVES[metric["type"].lower()]))
                if goal not in OFF:
                    where = f"{field}.{name}.metrics.{i}.sub_types.{k}.goal"
                    reader.goals.append((where, (metric.get("type"), kind.get("name")), goal))
    reader.row(
        "dropped", field, "`evaluate` measures accuracy, F1, parity, latency and more by itself (docs/quality.md)"
    )


def bound(goal: object, more_is_better: bool) -> dict[str, float] | None:
    """The bound of a gate that says the same as a goal; None where there is none."""
    kind, value = (goal.get("type"), goal.get("value")) if isinstance(goal, dict) else (None, None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    sign = 1 if str(kind).endswith("improvement") else -1
    if kind == "threshold":
        return {"minimum" if more_is_better else "maximum": float(value)}
    if kind in ("percent-max-degradation", "percent-min-improvement"):
        share = round(1 + (sign if more_is_better else -sign) * value / 100, 6)
        return {"minimum_ratio" if more_is_better else "maximum_ratio": share} if share > 0 else None
    if kind in ("max-degradation", "min-improvement") and more_is_better and abs(value) <= 1:
        return {"maximum_drop": float(-sign * value)}
    return None


def finish(reader) -> None:
    """Gates of the goals, when it is known whether there is a dataset."""
    checks = []
    for field, (kind, name), goal in reader.goals:
        figure, more_is_better = METRICS.get((str(kind).lower(), str(name)), (None, False))
        limit = bound(goal, more_is_better) if figure else None
        drops = limit and "maximum_drop" in limit and figure not in ("accuracy", "macro_f1")
        if limit is None or drops:
            reader.row("nearest", field, f"no gate says this of {kind} {name}: choose one (docs/quality.md)")
        elif figure in OF_ROWS and "finetune" not in reader.stages:
            reader.row("nearest", field, f"no dataset, so no {figure}: bound kl_mean or perplexity in gates.checks")
        else:
            checks.append({"metric": figure, **limit})
            reader.row("renamed", field, f"gates.checks: {checks[-1]}")
    if checks:
        reader.params["gates"]["checks"] = checks
        reader.stages.add("gates")


def strategy(reader, field: str, value: object) -> None:
    """search_strategy: how many candidates, and the sampler's seed. What is searched are options with a list of values."""
    if value in OFF:
        reader.row("dropped", field, "nothing is searched")
    elif not isinstance(value, dict):
        reader.unknown(field, f"expected a mapping, found {type(value).__name__}; it becomes quantize.search")
    else:
        reader.strategy = (field, {})
        reader.walk(field, value, STRATEGY)


def setting(name: str):
    """A rule for a setting of the search: kept for `finish_strategy`, when it is known whether anything is searched."""

    def keep(reader, field, value):
        least = 0 if name == "seed" else 1
        if value is None:
            reader.row("dropped", field, f"quantize.search.{name} has its default")
        elif isinstance(value, bool) or not isinstance(value, int) or value < least:
            reader.unknown(field, f"{value!r}: a whole number from {least} is expected")
        elif name in (settings := reader.strategy[1]):
            smaller, larger = sorted([settings[name], (field, value)], key=lambda kept: kept[1])
            settings[name] = smaller
            reader.row("dropped", larger[0], f"{smaller[0]} is smaller")
        else:
            reader.strategy[1][name] = (field, value)

    return keep


def sampler(reader, field: str, value: object) -> None:
    """Settings of the sampler, in a mapping of their own before 0.8."""
    reader.walk(field, value or {}, STRATEGY)


def instead(why: str):
    """A rule for what the search does otherwise."""

    def rule(reader, field, value):
        reader.row("dropped" if value in OFF else "nearest", field, why)

    return rule


STRATEGY = {
    **dict.fromkeys(("num_samples", "max_samples", "max_iter"), setting("budget")),
    "seed": setting("seed"),
    **dict.fromkeys(("search_algorithm_config", "sampler_config"), sampler),
    **dict.fromkeys(("search_algorithm", "sampler", "multivariate", "group", "with_replacement"), SAMPLER),
    "execution_order": Drop(
        "only options of the export have several values: one search", (*OFF, "joint", "pass-by-pass")
    ),
    "include_pass_params": Drop("options with a list of values are searched", (*OFF, True)),
    "output_model_num": instead("one model, the winner, is exported; all candidates are in the report"),
    "max_time": instead("the search ends by quantize.search.budget: results must not depend on a machine's speed"),
    "stop_when_goals_met": instead("the whole budget is tried, and the best that passes the gates is taken"),
}


def algorithms(reader, field: str, values: list) -> None:
    """Several algorithms, whose names may say what keeps 8 bits: one of both is searched."""
    known = [ALGORITHMS.get(name) if isinstance(name, str) else None for name in values]
    if not values or None in known:
        reader.unknown(field, f"{values!r}: algorithms are {', '.join(ALGORITHMS)}")
        return
    names, kept = (list(dict.fromkeys(part)) for part in zip(*known, strict=True))
    if kept == [None]:
        reader.params["quantize"]["matmul_mixed_precision"] = None
        several(reader, field, "algo_config", names)
    elif len(names) == 1:
        reader.params["quantize"]["algo_config"] = names[0]
        several(reader, field, "matmul_mixed_precision", kept)
    else:
        reader.unknown(
            field, f"{values!r}: several algorithms, or what one of them keeps in 8 bits, can be searched, not both"
        )


def several(reader, field: str, name: str, values: list) -> None:
    """An option with several values."""
    if name not in (*SEARCHED, "matmul_mixed_precision") or not values:
        reader.unknown(field, f"{values!r}: one value is expected; several can be searched of {', '.join(SEARCHED)}")
        return
    reader.params["quantize"].setdefault("search", {})[name] = values
    reader.row("renamed", field, f"quantize.search.{name}: {values}")


def finish_strategy(reader) -> None:
    """The search's settings, when it is known what is searched."""
    search = reader.params["quantize"].get("search")
    field, given = reader.strategy or ("passes", {})
    if search and "finetune" not in reader.stages:
        reader.unknown(field, "candidates are compared on a dataset's rows, and no pass names one: give one value each")
    elif reader.strategy and not search:
        reader.row("nearest", field, f"no option has several values; those that may: {', '.join(SEARCHED)}")
        for where, _ in given.values():
            reader.row("dropped", where, "nothing is searched")
    elif search:
        for name, (where, value) in given.items():
            search[name] = value
            reader.row("renamed", where, f"quantize.search.{name}: {value}")
        if reader.priorities:
            search["objective"] = min(reader.priorities)[1]
            reader.row(
                "renamed", "evaluators", f"quantize.search.objective: {search['objective']!r}, the first by priority"
            )
