"""Candidates of a quantization search: all combinations, or the proposals of Optuna's sampler."""

import hashlib
import itertools
import json
from collections.abc import Sequence

from slmake import params
from slmake.errors import UserError

OPTIONS = (
    *("algo_config", "calibration", "block_size", "is_symmetric", "accuracy_level", "matmul_mixed_precision"),
    *("node_accuracy_levels", "int8_nodes", "nodes_to_exclude"),
)
TRIES = 200  # known or impossible proposals in a row, after which the first combination not yet made is taken


def choices(section: params.Quantize) -> dict[str, list]:
    """The values to try of every option: the section's own where the search names none."""
    return {name: getattr(section.search, name) or [getattr(section, name)] for name in OPTIONS}


def valid(section: params.Quantize, plain: dict, options: dict) -> bool:
    """Whether the parameters allow this combination; `plain` is the section without its search."""
    try:
        type(section).model_validate(plain | options)
    except ValueError:
        return False
    return True


def grid(section: params.Quantize) -> list[dict]:
    """Every combination that the parameters allow, in the order of the lists; do not change the list.

    It is cached by section, because a plan asks for it once per candidate.
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
    combinations = len(grid(section))
    if not combinations:
        raise UserError(
            "quantize.search: none of the combinations is possible. See docs/params.md for what goes together."
        )
    return min(combinations, section.search.budget)


def batch_before(section: params.Quantize, number: int) -> slice:
    """The candidates that must be measured before this one is proposed, the batch before its own; none for a grid, or a first batch.

    Each of them has the figures of all batches before it, so that a candidate depends on one batch of files only.
    """
    if len(grid(section)) <= section.search.budget:
        return slice(0)
    begin = number // section.search.batch * section.search.batch
    return slice(max(0, begin - section.search.batch), begin)


def proposal(section: params.Quantize, number: int, measured: list[Sequence[float] | None]) -> dict:
    """The options of candidate `number`: from the grid, or as Optuna's sampler proposes them.

    The sampler has a seed and gets the same results in the same order, so every job computes the same proposals.

    Args:
        measured: mean KL divergence and size in bytes (or latency in milliseconds) of the candidates of earlier batches, in
            order; None for a candidate that could not be built.
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
            options, trial = next(options for options in everything if options not in made), None
        made.append(options)
        trials.append(trial)
        if len(made) % batch == 0:
            for trial, result in zip(trials, measured[len(made) - batch : len(made)], strict=False):
                if trial is not None and result is None:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                elif trial is not None:
                    study.tell(trial, result)
            trials = []
    return made[number]


def applied(section: params.Quantize, options: dict) -> params.Quantize:
    """The section with a candidate's options in place of its own, without the search."""
    return type(section).model_validate(section.model_dump(exclude={"search"}) | options)


def depends_on(section: params.Quantize, candidate: str) -> str:
    """The text whose change rebuilds a candidate: in a grid its own options, so that a longer list builds the new candidates only."""
    own = section.model_dump(mode="json", exclude={"search"})
    if candidate == "merged":
        own = {}
    elif len(grid(section)) <= section.search.budget:
        own |= proposal(section, int(candidate), [])
    else:
        whole = json.dumps(section.search.model_dump(mode="json"), sort_keys=True)
        own["search"] = hashlib.sha256(
            whole.encode()
        ).hexdigest()  # short, because Snakemake records it for every candidate
    return json.dumps({**own, "rows": section.search.rows}, sort_keys=True)


def described(options: dict, section: params.Quantize) -> str:
    """The options that differ between candidates, in one line."""
    varied = [name for name, values in choices(section).items() if len(values) > 1]
    return ", ".join(f"{name} {json.dumps(options[name])}" for name in varied) or "the section's own options"
