"""Candidates of a quantization search: all combinations, or the proposals of Optuna's sampler."""

import hashlib
import itertools
import json

from slmake import params
from slmake.errors import UserError

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


def described(options: dict, section: params.Quantize) -> str:
    """The options that differ between candidates, in one line."""
    varied = [name for name, values in choices(section).items() if len(values) > 1]
    return ", ".join(f"{name} {json.dumps(options[name])}" for name in varied) or "the section's own options"
