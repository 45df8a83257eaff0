"""Build what params.yaml asks for, with a few lines per rule: what starts and why, its progress, and its result.

    python -m tools.build                  build everything, put the report on one page, record it all with DVC
    python -m tools.build build/adapter    build one thing and what it needs
    python -m tools.build --verbose        show all that Snakemake prints (`make VERBOSE=1`)

Snakemake decides what to build and builds it, as `snakemake --cores all` does; where no file has moved since the last record, it is not
asked. Exit code 0 means that all of it is up to date.
"""

import argparse
import os
import sys
from pathlib import Path

from slmake import cli, params
from slmake.errors import UserError
from slmake.outputs import read_json
from slmake.platforms import building, dvc, dvc_yaml, unmoved
from slmake.platforms.screen import Screen, run
from slmake.scoring.metrics import summary
from tools import page, record

NEXT = {  # a command to try: what it does, and the stage that it needs
    'make ask TEXT="your text"': ("ask the exported model", "quantize"),
    "make verify": ("check the package: checksums, provenance, and that it generates", "package"),
    "edit params.yaml, then make": ("build what depends on the change, and nothing else", None),
    "make help": ("list all commands", None),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="what to build (default: all that params.yaml asks for)")
    parser.add_argument("--verbose", action="store_true", help="show all that Snakemake prints")
    args = parser.parse_args(argv)
    if links := [folder for folder in ("build", "results") if Path(folder).is_symlink()]:
        parser.error(
            f"{links[0]} is a link, and DVC records nothing behind one. Mount the other disk there, or move the whole project to it."
        )
    screen = Screen(sys.stderr, args.verbose)
    # Where no file has moved since the last record, neither Snakemake nor DVC need look; but a profile may name another environment.
    asked = bool(args.targets) or args.verbose or "SNAKEMAKE_PROFILE" in os.environ or not unmoved.unmoved()
    if asked:
        if not args.targets:  # of a single target nothing is recorded
            with cli.job("build"):
                refuse_unrecordable()
        update(recorded=not args.targets)
    with building.until_recorded():
        if asked and not run(screen, args.targets):
            for line in screen.ending():
                screen.write(line)
            page.remove_stale(screen.write)
            return 130 if screen.interrupted else 1
        return finish(screen, args.targets, asked)


def finish(screen: Screen, targets: list[str], asked: bool) -> int:
    """Record what was built, put the report on one page and say what there is.

    Args:
        asked: Snakemake was.
    """
    with cli.job("build") as job:
        stages = params.load("params.yaml").stages
        if page.OVERVIEW.exists() and with_report(targets, stages):
            page.write()
        if targets:
            job.say(f"{', '.join(targets)}: {'built' if screen.started else 'nothing to do'}")
            return 0
        if asked:
            record.main([])
        made = {"report": page.PAGE} if "report" in stages else {}
        made |= {"package": Path("build/package")} if "package" in stages else {}
        scores = [scores_line("gates" in stages)] if "evaluate" in stages else []
        if screen.started:
            paths = [f"{name + ':':8} {path}" for name, path in made.items()]
            commands = [f"  {command:28} {use}" for command, (use, stage) in NEXT.items() if stage in (None, *stages)]
            print("", *scores, *paths, "", "Next:", *commands, sep="\n")
        else:
            names = " and ".join(map(str, made.values())) or "everything"
            print(f"build: nothing to do: {names} {'are' if len(made) > 1 else 'is'} up to date", *scores, sep="\n")
    return 0


def update(recorded: bool) -> None:
    """Bring dvc.yaml up to date. Where it cannot be, the build says why; but it would run a rule that cannot be `recorded`."""
    with cli.job("build") as job:
        if recorded and (repaired := dvc.repair_lock()):
            job.say(repaired)
        try:
            dvc_yaml.update()
        except UserError as error:
            if recorded and isinstance(error, dvc_yaml.UnknownRule):
                raise
        else:
            if recorded:
                record.refuse_ignored()


def refuse_unrecordable() -> None:
    """Raise UserError if DVC could not record what is built here: that would show after the last rule."""
    from dvc.config import Config, ConfigError

    if not Path(".dvc").is_dir():
        raise UserError(
            "DVC has no folder .dvc here, so it could not record what is built; one in a folder above does not count. "
            "`.venv/bin/dvc init --subdir` makes it (where this is no part of a Git repository, `--no-scm`)."
        )
    try:
        config = Config(dvc_dir=str(Path(".dvc").absolute()))
    except ConfigError as error:
        raise UserError(
            f".dvc/config: {dvc.reason(f'ERROR: {error}')} Correct it, or bring back what Git has."
        ) from None
    here = Path.cwd()
    if not config["core"].get("no_scm") and not any((folder / ".git").exists() for folder in (here, *here.parents)):
        raise UserError(
            "this folder is no part of a Git repository, so DVC could not record what is built. `git init` makes one; without Git: "
            "`.venv/bin/dvc config core.no_scm true`."
        )
    cache = Path(config["cache"].get("dir") or ".dvc/cache")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        why = "" if os.access(cache, os.W_OK) else "it may not be written"
    except OSError as error:
        why = error.strerror
    if why:
        raise UserError(
            f"{cache}: DVC's cache cannot be there ({why}), so it could not record what is built. Mount its disk, or name another folder: "
            "`.venv/bin/dvc cache dir PATH`."
        )


def with_report(targets: list[str], stages: list[str]) -> bool:
    """Whether these targets, rules or outputs, have the report's figures among them; other figures than those asked for may be on disk."""
    asked = targets or ["all"]
    whole = "all" in asked and "report" in stages
    return whole or any(target == "report" or Path(target).parent == page.OVERVIEW.parent for target in asked)


def scores_line(judged: bool) -> str:
    """The scores of the last evaluation, one line."""
    metrics = read_json(Path("results/metrics.json"))
    names = [name for name, value in metrics.items() if isinstance(value, dict) and "size_bytes" in value]
    passed = f"; {len(read_json(Path('results/gates.json'))['gates'])} gates passed" if judged else ""
    return summary(metrics, names) + passed


if __name__ == "__main__":
    sys.exit(main())
