"""Choose among measured candidates: the gates on tuning rows, the Pareto front, the winner."""

import math
from collections.abc import Sequence
from pathlib import Path

from slmake import outputs, params
from slmake.errors import UserError
from slmake.export.proposals import described
from slmake.scoring.gates import judge, table


def tuning_gates(section: params.Gates) -> params.Gates:
    """The gates that the tuning rows can judge: of the exported model alone or against merged."""
    checks = [
        gate
        for gate in section.checks
        if gate.model in ("last", "onnx")
        and not gate.metric.startswith(
            ("lm_eval.", "constrained_", "sampled_", "valid")
        )  # candidates are not asked for these
        and (gate.kind in ("minimum", "maximum") or gate.against in ("previous", "merged"))
    ]
    return section.model_copy(update={"checks": checks, "published": None})


def pareto(points: list[tuple[float, float]]) -> list[bool]:
    """Which points (accuracy, cost) no other beats: at least as accurate and as cheap, and better in at least one of the two."""
    return [
        not any(a >= accuracy and c <= cost and (a, c) != (accuracy, cost) for a, c in points)
        for accuracy, cost in points
    ]


def cost(measured: dict, objective: str) -> float:
    return measured["metrics"]["size_bytes"] if objective == "size" else measured["benchmark"]["latency_ms_p50"]


def choose(everything: params.Params, reference: dict, candidates: list[dict]) -> dict:
    """The content of search.json.

    Raises:
        UserError: no candidate passes; the nearest misses are shown.
    """
    section, gates = everything.quantize, tuning_gates(everything.gates)
    name = section.precision
    for candidate in candidates:
        if "failed" in candidate:
            continue
        metrics = {"test_rows": reference["rows"], "merged": reference["metrics"], name: candidate["metrics"]}
        metrics |= {
            "parity": {f"{name}_vs_merged": candidate["parity"]},
            "drop": {f"{name}_vs_merged": candidate["drop"]},
        }
        try:
            candidate["gates"] = judge(gates, metrics, {"merged": reference["benchmark"], name: candidate["benchmark"]})
        except UserError as error:
            raise UserError(f"on the {reference['rows']} tuning rows of quantize.search: {error}") from None
        candidate["passed"] = all(gate["passed"] for gate in candidate["gates"])
    built = [candidate for candidate in candidates if "failed" not in candidate]
    front = pareto(
        [(candidate["metrics"]["accuracy"], cost(candidate, section.search.objective)) for candidate in built]
    )
    for candidate, on_front in zip(built, front, strict=True):
        candidate["pareto"] = on_front
    passed = [candidate for candidate in built if candidate["passed"]]
    if not passed:
        raise UserError(_nearest(section, candidates))
    winner = min(
        passed,
        key=lambda candidate: (
            cost(candidate, section.search.objective),
            -candidate["metrics"]["accuracy"],
            candidate["candidate"],
        ),
    )
    return {
        "winner": winner["candidate"],
        "options": winner["options"],
        "objective": section.search.objective,
        "tuning_rows": reference["rows"],
        "merged": reference["metrics"],
        "candidates": candidates,
    }


def _nearest(section: params.Quantize, candidates: list[dict]) -> str:
    """The message for a search that no candidate passed: the three nearest misses, and those that could not be built."""

    def distance(candidate: dict) -> float:
        return sum(gate.get("missed_by", 0) / max(abs(gate["bound"]), 1e-9) for gate in candidate["gates"])

    built = sorted((candidate for candidate in candidates if "failed" not in candidate), key=distance)
    misses = "".join(
        f"\ncandidate {candidate['candidate']}: {described(candidate['options'], section)}\n{table(candidate['gates'])}"
        for candidate in built[:3]
    )
    failed = "".join(
        f"\ncandidate {candidate['candidate']} could not be built: {candidate['failed']}"
        for candidate in candidates
        if "failed" in candidate
    )
    return (
        f"none of {len(candidates)} candidates passes the gates on the tuning rows. The nearest:{misses}{failed}\n"
        "Add options to quantize.search (more int8_nodes, block_size 16), raise its budget, or loosen a gate."
    )


def overview(result: dict, section: params.Quantize) -> str:
    """One line per candidate: options, accuracy, divergence, size, latency; * for the Pareto front, > for the winner."""
    lines = [f"  {'':4}{'accuracy':>8}  {'KL':>7}  {'MB':>6}  {'p50 ms':>6}  gates   options"]
    for candidate in result["candidates"]:
        options = described(candidate["options"], section)
        if "failed" in candidate:
            lines.append(
                f"  {candidate['candidate']:2}  could not be built: {candidate['failed'].splitlines()[0]} ({options})"
            )
            continue
        mark = (">" if candidate["candidate"] == result["winner"] else "") + ("*" if candidate["pareto"] else "")
        lines.append(
            f"{mark:>2}{candidate['candidate']:2}  {candidate['metrics']['accuracy']:8.4f}  {candidate['parity']['kl_mean']:7.4f}  "
            f"{candidate['metrics']['size_bytes'] / 1e6:6.1f}  {candidate['benchmark']['latency_ms_p50']:6.1f}  "
            f"{'passed' if candidate['passed'] else 'missed'}  {options}"
        )
    return "\n".join(lines)


def figures_before(folders: list[Path], objective: str) -> list[Sequence[float] | None]:
    """Divergence and cost of all candidates of earlier batches, for the sampler; None for a candidate that could not be built.

    Args:
        folders: the candidates of the batch before; each has the figures of the batches before that.
    """
    results = [outputs.read_json(folder / "measured.json", "figures_before", output=folder) for folder in folders]
    measured = results[0]["figures_before"] if results else []
    for result in results:
        figures = None if "failed" in result else (result["parity"]["kl_mean"], cost(result, objective))
        measured.append(figures if figures and all(map(math.isfinite, figures)) else None)
    return measured
