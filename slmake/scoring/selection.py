"""Choose among measured candidates: the gates on tuning rows, the Pareto front, the winner."""

import math
from pathlib import Path

from slmake import outputs, params
from slmake.errors import UserError
from slmake.export.proposals import described
from slmake.scoring.judge import judge, table


def tuning_gates(section: params.Gates) -> params.Gates:
    """The gates that the tuning rows can judge: of the exported model by itself or against merged."""
    checks = [
        gate
        for gate in section.checks
        if gate.model in ("last", "onnx")
        and (gate.kind in ("minimum", "maximum") or gate.against in ("previous", "merged"))
    ]
    return section.model_copy(update={"checks": checks, "published": None})


def pareto(points: list[tuple[float, float]]) -> list[bool]:
    """Which points (accuracy, cost) no other beats: at least as accurate and as cheap, and better in one."""
    return [
        not any(a >= accuracy and c <= cost and (a, c) != (accuracy, cost) for a, c in points)
        for accuracy, cost in points
    ]


def cost(one: dict, objective: str) -> float:
    return one["metrics"]["size_bytes"] if objective == "size" else one["benchmark"]["latency_ms_p50"]


def choose(everything: params.Params, reference: dict, candidates: list[dict]) -> dict:
    """The content of search.json.

    Raises:
        UserError: no candidate passes; the nearest misses are shown.
    """
    section, gates = everything.quantize, tuning_gates(everything.gates)
    name = section.precision
    for one in candidates:
        if "failed" in one:
            continue
        metrics = {"test_rows": reference["rows"], "merged": reference["metrics"], name: one["metrics"]}
        metrics |= {"parity": {f"{name}_vs_merged": one["parity"]}, "drop": {f"{name}_vs_merged": one["drop"]}}
        try:
            one["gates"] = judge(gates, metrics, {"merged": reference["benchmark"], name: one["benchmark"]})
        except UserError as error:
            raise UserError(f"on the {reference['rows']} tuning rows of quantize.search: {error}") from None
        one["passed"] = all(gate["passed"] for gate in one["gates"])
    built = [one for one in candidates if "failed" not in one]
    front = pareto([(one["metrics"]["accuracy"], cost(one, section.search.objective)) for one in built])
    for one, on_it in zip(built, front, strict=True):
        one["pareto"] = on_it
    passed = [one for one in built if one["passed"]]
    if not passed:
        near = sorted(
            built,
            key=lambda one: sum(gate.get("missed_by", 0) / max(abs(gate["bound"]), 1e-9) for gate in one["gates"]),
        )
        shown = "".join(
            f"\ncandidate {one['candidate']}: {described(one['options'], section)}\n{table(one['gates'])}"
            for one in near[:3]
        )
        failed = "".join(
            f"\ncandidate {one['candidate']} could not be built: {one['failed']}"
            for one in candidates
            if "failed" in one
        )
        raise UserError(
            f"none of {len(candidates)} candidates passes the gates on the tuning rows. The nearest:{shown}{failed}\n"
            "Add options to quantize.search (more int8_nodes, block_size 16), raise its budget, or loosen a gate."
        )
    winner = min(
        passed, key=lambda one: (cost(one, section.search.objective), -one["metrics"]["accuracy"], one["candidate"])
    )
    return {
        "winner": winner["candidate"],
        "options": winner["options"],
        "objective": section.search.objective,
        "tuning_rows": reference["rows"],
        "merged": reference["metrics"],
        "candidates": candidates,
    }


def overview(result: dict, section: params.Quantize) -> str:
    """One line per candidate: options, accuracy, divergence, size, latency; * for the Pareto front, > for the winner."""
    lines = [f"  {'':4}{'accuracy':>8}  {'KL':>7}  {'MB':>6}  {'p50 ms':>6}  gates   options"]
    for one in result["candidates"]:
        options = described(one["options"], section)
        if "failed" in one:
            lines.append(f"  {one['candidate']:2}  could not be built: {one['failed'].splitlines()[0]} ({options})")
            continue
        mark = (">" if one["candidate"] == result["winner"] else "") + ("*" if one["pareto"] else "")
        lines.append(
            f"{mark:>2}{one['candidate']:2}  {one['metrics']['accuracy']:8.4f}  {one['parity']['kl_mean']:7.4f}  "
            f"{one['metrics']['size_bytes'] / 1e6:6.1f}  {one['benchmark']['latency_ms_p50']:6.1f}  "
            f"{'passed' if one['passed'] else 'missed'}  {options}"
        )
    return "\n".join(lines)


def measured_figures(folders: list[Path], objective: str) -> list[tuple[float, float] | None]:
    """What the sampler is told of former candidates: divergence and cost; None for one that could not be built."""
    found: list[tuple[float, float] | None] = []
    for folder in folders:
        one = outputs.read_json(folder / "measured.json", output=folder)
        figures = None if "failed" in one else (one["parity"]["kl_mean"], cost(one, objective))
        found.append(figures if figures and all(map(math.isfinite, figures)) else None)
    return found
