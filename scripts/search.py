"""Choose among quantization candidates: the smallest or fastest that passes the gates on the tuning rows.

    python scripts/search.py --params params.yaml --reference build/search/merged --candidates build/search/0 build/search/1 \\
        --output results/search.json

Reads the sections `quantize` and `gates` and what scripts/candidate.py measured. Writes every candidate's options and
figures, which of them are on the Pareto front, and the winner, which `quantize` then takes over as it is.
"""

import hashlib
import itertools
import json
import math
from pathlib import Path

from common import cli, outputs, params
from common.errors import UserError
from gates import judge, table

OPTIONS = (
    *("algo_config", "calibration", "block_size", "is_symmetric", "accuracy_level", "matmul_mixed_precision"),
    *("node_accuracy_levels", "int8_nodes", "nodes_to_exclude"),
)
TRIES = 200  # proposals in a row that are known or impossible, before a random one of the rest is taken


def choices(section: params.Quantize) -> dict[str, list]:
    """The values to try of every option: the section's own where the search names none."""
    return {name: getattr(section.search, name) or [getattr(section, name)] for name in OPTIONS}


def valid(section: params.Quantize, plain: dict, options: dict) -> bool:
    """Whether the builder takes this combination, as far as params.yaml can tell; `plain` is the section without its search."""
    try:
        type(section).model_validate(plain | options)
    except ValueError:
        return False
    return True


def grid(section: params.Quantize) -> list[dict]:
    """Every combination that is possible, in the order of the lists; not to be changed.

    Listed once for a section: a plan asks for every candidate, and would go through all of them for each.
    """
    key = section.model_dump_json()
    if key not in _grids:
        values, plain = choices(section), section.model_dump(exclude={"search"})
        made = (dict(zip(values, row, strict=True)) for row in itertools.product(*values.values()))
        _grids[key] = [options for options in made if valid(section, plain, options)]
    return _grids[key]


_grids: dict[str, list[dict]] = {}


def count(section: params.Quantize) -> int:
    """How many candidates there will be.

    Raises:
        UserError: none of the combinations is possible.
    """
    found = len(grid(section))
    if not found:
        raise UserError(
            "quantize.search: none of the combinations is possible. See docs/params.md for what goes together."
        )
    return min(found, section.search.budget)


def earlier(section: params.Quantize, number: int) -> int:
    """How many candidates must be measured before this one can be proposed: those of former batches; none for a grid."""
    if len(grid(section)) <= section.search.budget:
        return 0
    return number // section.search.batch * section.search.batch


def proposal(section: params.Quantize, number: int, measured: list[tuple[float, float] | None]) -> dict:
    """The options of candidate `number`: by its place in the grid, or as Optuna's sampler proposes them.

    The sampler is seeded and told the same results in the same order, so every job comes to the same proposals by itself.

    Args:
        measured: mean KL divergence and size in bytes (or latency in milliseconds) of the candidates of former batches, in
            order; None for one that could not be built.
    """
    everything = grid(section)
    if len(everything) <= section.search.budget:
        return everything[number]
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    batch, values = section.search.batch, choices(section)
    sampler = optuna.samplers.TPESampler(
        seed=section.search.seed, n_startup_trials=batch, multivariate=True, group=True
    )
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    made: list[dict] = []
    trials: list = []
    while len(made) <= number:
        for _ in range(TRIES):
            trial = study.ask()
            options = {
                name: several[trial.suggest_categorical(name, list(range(len(several))))]
                for name, several in values.items()
            }
            if options in everything and options not in made:
                break
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            options, trial = next(one for one in everything if one not in made), None
        made.append(options)
        trials.append(trial)
        if len(made) % batch == 0:
            for told, result in zip(trials, measured[len(made) - batch : len(made)], strict=False):
                if told is not None and result is None:
                    study.tell(told, state=optuna.trial.TrialState.FAIL)
                elif told is not None:
                    study.tell(told, result)
            trials = []
    return made[number]


def depends_on(section: params.Quantize, candidate: str) -> str:
    """What a candidate must be built again for, as text: its own options in a grid, so that a longer list builds only what is new."""
    own = section.model_dump(mode="json", exclude={"search"})
    if candidate == "merged":
        own = {}
    elif len(grid(section)) <= section.search.budget:
        own |= proposal(section, int(candidate), [])
    else:
        whole = json.dumps(section.search.model_dump(mode="json"), sort_keys=True)
        own["search"] = hashlib.sha256(whole.encode()).hexdigest()  # Snakemake keeps this text for every candidate
    return json.dumps({**own, "rows": section.search.rows}, sort_keys=True)


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


def described(options: dict, section: params.Quantize) -> str:
    """The options that differ between candidates, in one line."""
    varied = [name for name, values in choices(section).items() if len(values) > 1]
    return ", ".join(f"{name} {json.dumps(options[name])}" for name in varied) or "the section's own options"


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


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--reference", type=Path, required=True, help="what was measured of the merged model")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="folders of the candidates, in order")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the choice")
    args = parser.parse_args(argv)
    with cli.job("search", args.log) as job:
        everything = params.load(args.params)
        with outputs.written(files=[args.output]) as (target,):
            reference, *candidates = (
                outputs.read_json(folder / "measured.json", output=folder)
                for folder in (args.reference, *args.candidates)
            )
            result = choose(everything, reference, candidates)
            outputs.write_json(target, result)
        job.say(
            f"candidate {result['winner']} of {len(candidates)} is the {'smallest' if result['objective'] == 'size' else 'fastest'} that passes\n"
            + overview(result, everything.quantize)
        )


def measured_figures(folders: list[Path], objective: str) -> list[tuple[float, float] | None]:
    """What the sampler is told of former candidates: divergence and cost; None for one that could not be built."""
    found: list[tuple[float, float] | None] = []
    for folder in folders:
        one = outputs.read_json(folder / "measured.json", output=folder)
        figures = None if "failed" in one else (one["parity"]["kl_mean"], cost(one, objective))
        found.append(figures if figures and all(map(math.isfinite, figures)) else None)
    return found


if __name__ == "__main__":
    main()
