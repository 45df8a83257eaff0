"""Build with several seeds and show how far the scores move: mean, standard deviation and range of every score.

    python -m tools.seeds --runs 5                              the seeds of params.yaml, and the four after them
    python -m tools.seeds --runs 5 --splits 42 7 8              the same on three splits of the data: 15 builds
    python -m tools.seeds --runs 5 --dtypes float32 bfloat16    and in two data types: 10 builds

A run changes finetune.seed and finetune.data_seed, a split prepare.seed, a data type finetune.compute_dtype; all else is
as params.yaml says. Each run is a build up to the scores in a copy of the project below build/seeds, from the base model that is
built here. Its models are removed when it is scored. Its scores stay, so a call that was interrupted resumes where it was;
with another parameter, other code or other data, they are measured again.

Writes results/seeds.json (parameters and scores of every run) and results/seeds.svg; `report.seeds` shows both on the report's page.
"""

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from itertools import product
from pathlib import Path

import yaml

from slmake import cli, outputs, params
from slmake.code_inputs import digest
from slmake.errors import UserError
from slmake.platforms.origins import refuse_unbuilt
from slmake.reporting.figures import plain_plots
from slmake.reporting.pages import models_of
from slmake.reporting.seeds import draw_seeds, inputs, summary, table
from tools.reproduce import copy_inputs, snakemake

KEPT, COPY, IN_USE = Path("build/seeds"), "slmake-seed", ".in-use"
RESULT, PICTURE = Path("results/seeds.json"), Path("results/seeds.svg")
METRICS = "results/metrics.json"
BASE, MADE_BY = ["build/base", "results/base.json"], "fetch_model"
CHANGED = (
    "parameters, code or data changed since the runs began, so they do not belong together. Run the same command again: those of what "
    f"is there now are kept in {KEPT}."
)
OTHER = ("docs/", "tests/", "bench/", "README.md", "CHANGELOG.md", "dvc.lock")  # tracked, but no run reads them


def variants(own: params.Params, runs: int, splits: list[int] | None, dtypes: list[str] | None) -> list[dict]:
    """What every run changes, by section: each split in each data type with each seed."""
    tune = own.finetune
    return [
        {
            "prepare": {"seed": split},
            "finetune": {
                "seed": tune.seed + number,
                "data_seed": tune.data_seed + number,
                "compute_dtype": dtype,
            },
        }
        for split, dtype, number in product(splits or [own.prepare.seed], dtypes or [tune.compute_dtype], range(runs))
    ]


def copy_project(here: Path, scratch: Path) -> tuple[Path, str]:
    """Copy the project (see `reproduce.copy_inputs`), and link the base model.

    Returns:
        The copy's folder, and its content, with that of the base model and of all files that params.yaml names, as 64 hex digits.
    """
    target, named = copy_inputs(here, scratch, OTHER)
    model, report = BASE
    (target / report).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(here / report, target / report)
    files = sorted(path.relative_to(target) for path in target.rglob("*") if path.is_file())
    shutil.copytree(here / model, target / model, copy_function=os.link)
    content = digest([*files, *sorted(named)], root=target) + outputs.folder_digest(target / model)
    return target, sha256(content.encode()).hexdigest()


@contextlib.contextmanager
def scratch(kept: Path) -> Iterator[Path]:
    """A folder for a copy of the project, which others see is in use."""
    with tempfile.TemporaryDirectory(prefix=f"{COPY}-", dir=kept) as name:
        folder = Path(name)
        with outputs.alone(folder / IN_USE, wait=True):
            yield folder


def remove_left_over(kept: Path) -> None:
    """Remove copies of the project, with their models, of runs that were killed."""
    for mark in kept.glob(f"{COPY}-*/{IN_USE}"):
        with outputs.alone(mark, wait=False) as left_over:
            if left_over:
                outputs.remove(mark.parent)


def content_of(here: Path) -> str:
    """The project's content now, as `copy_project` gives it."""
    with scratch(here / KEPT) as folder:
        return copy_project(here, folder)[1]


def write_params(project: Path, change: dict) -> None:
    """Change parameters of a copy, by section."""
    path = project / "params.yaml"
    settings = yaml.load(path.read_text(encoding="utf-8"), params.Loader)
    for section, fields in change.items():
        settings[section] = {**(settings.get(section) or {}), **fields}
    path.write_text(params.dumped(settings), encoding="utf-8")


def build(folder: Path, *targets: str) -> None:
    if not snakemake(folder, *targets):
        raise UserError(
            f"the build of {' '.join(targets)} failed; the message is above. Finished runs are kept in {KEPT}."
        )


def measured(here: Path, change: dict, planned: str) -> dict:
    """The scores of one run: those that were kept, or a build's.

    Args:
        planned: the project's content when the runs began, as `copy_project` gives it.

    Raises:
        UserError: the project is another now, the base model changed meanwhile, or the build failed.
    """
    with scratch(here / KEPT) as folder:
        project, content = copy_project(here, folder)
        if content != planned:
            raise UserError(CHANGED)
        write_params(project, change)
        kept = here / KEPT / f"{sha256(f'{content} {json.dumps(change)}'.encode()).hexdigest()[:16]}.json"
        if kept.exists():
            return json.loads(kept.read_text(encoding="utf-8"))
        began, base = time.monotonic(), outputs.seen_of(project / BASE[0])
        build(project, METRICS)
        if outputs.only(outputs.LINKED, outputs.seen_of(project / BASE[0])) != outputs.only(outputs.LINKED, base):
            raise UserError(CHANGED)  # it is a link: what is written into it here is written into the copy's
        metrics = json.loads((project / METRICS).read_text(encoding="utf-8"))
        scores = {name: numbers(metrics[name]) for name in models_of(metrics)}
        run = {"changes": change, "seconds": round(time.monotonic() - began, 1), "scores": scores}
        replace_json(kept, run)
        return run


def replace_json(path: Path, value: dict) -> None:
    outputs.replace(path, (json.dumps(value, indent=2) + "\n").encode())


def numbers(scores: dict) -> dict[str, float]:
    """A model's scores without their intervals and parts."""
    return {
        name: value
        for name, value in scores.items()
        if isinstance(value, float) and not name.endswith(("_low", "_high"))
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="seeds (default: 5)")
    parser.add_argument(
        "--splits", type=int, nargs="+", metavar="SEED", help="values of prepare.seed (default: its own)"
    )
    parser.add_argument(
        "--dtypes", nargs="+", metavar="TYPE", help="values of finetune.compute_dtype (default: its own)"
    )
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error("--runs is 1 or more.")
    with cli.job("seeds") as job:
        repeat(Path.cwd(), args, job)


def repeat(here: Path, args: argparse.Namespace, job: cli.Job) -> None:
    """All runs, and what they say together.

    Raises:
        UserError: params.yaml has a mistake, nothing is trained or scored, the base model is not what was built, or a build failed.
    """
    own = params.load(here / "params.yaml")
    missing = sorted({"finetune", "evaluate"} - set(own.stages)) + ["prepare"] * (own.prepare is None)
    if missing:
        raise UserError(
            f"params.yaml leaves out {', '.join(missing)}, so nothing is trained and scored. Add the stages to all.stages, and a "
            "dataset to prepare."
        )
    (here / KEPT).mkdir(parents=True, exist_ok=True)
    build(here, *BASE)
    refuse_unbuilt([MADE_BY])  # Snakemake goes by times and by what it recorded, not by what is in the file
    with base_to_be_linked():
        run_all(here, own, args, job)


@contextlib.contextmanager
def base_to_be_linked() -> Iterator[None]:
    """Links to the base model change its inodes' times: what was as it was built then counts as such."""
    built = outputs.as_built(BASE[0])
    if built:
        outputs.note_built(BASE[:1], to_be_linked=True)
    try:
        yield
    finally:
        if built and outputs.as_built(BASE[0]):
            outputs.note_built(BASE[:1])


def run_all(here: Path, own: params.Params, args: argparse.Namespace, job: cli.Job) -> None:
    """All runs of `repeat`, whose base model is built."""
    remove_left_over(here / KEPT)
    planned, read = content_of(here), inputs(own)
    if params.sums(params.load(here / "params.yaml")) != params.sums(own):
        raise UserError(CHANGED)
    changes = variants(own, args.runs, args.splits, args.dtypes)
    runs: list[dict] = []
    for number, change in enumerate(changes, 1):
        values = ", ".join(f"{section}.{name} {value}" for section, of in change.items() for name, value in of.items())
        job.say(f"run {number} of {len(changes)}: {values}")
        runs.append(measured(here, change, planned))
        shown = ", ".join(f"{name} {scores['accuracy']:.1%}" for name, scores in runs[-1]["scores"].items())
        job.say(f"run {number} of {len(changes)}: accuracy {shown} ({runs[-1]['seconds']:.0f} s)")
    if content_of(here) != planned:  # what the result says that it is of
        raise UserError(CHANGED)
    lines = summary(runs)
    replace_json(here / RESULT, {"summary": lines, "params": params.sums(own), "inputs": read, "runs": runs})
    draw_seeds(plain_plots(), {"runs": runs}, here / PICTURE)
    print(table(lines))
    job.say(f"{len(runs)} runs in {RESULT}, drawn in {PICTURE}")


if __name__ == "__main__":
    main()
