"""The pipeline on Azure Machine Learning: one step per rule, on clusters of a workspace.

    python -m tools.azureml compile              write azureml/pipeline.yml (nothing is sent)
    python -m tools.azureml submit --wait        run it, and say how it goes
    python -m tools.azureml status               how the last run stands
    python -m tools.azureml download             bring its results to build/ and results/, and check them
    python -m tools.azureml register             register the package as a model, with metrics and lineage
    python -m tools.azureml cancel               stop it

Reads params.yaml and azureml/settings.yaml. Whoever is logged in (`az login`, a managed identity, AZURE_CLIENT_ID and the like:
azure-identity's DefaultAzureCredential) is who runs it. All but `compile` need the package azure-ai-ml: `make azureml`.
`step` is what the steps themselves run. docs/azureml.md walks through all of it.
"""

import argparse
from pathlib import Path

from slmake import cli

SETTINGS = Path("azureml/settings.yaml")
PIPELINE = Path("azureml/pipeline.yml")


def pair(text: str) -> tuple[str, Path]:
    """`PATH=MOUNTED` as path and place."""
    path, equals, mounted = text.partition("=")
    if not equals or not path or not mounted:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form PATH=PLACE")
    return path, Path(mounted)


def compiled(settings_file: Path, target: Path):
    """Settings and plan, with pipeline.yml and the steps' code written."""
    from slmake.azureml import pipeline, settings

    loaded = settings.load(settings_file)
    planned = pipeline.plan(loaded)
    pipeline.write_code(planned)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(pipeline.text(planned, loaded, target.parent), encoding="utf-8")
    return loaded, planned


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, remote: bool = True) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=text, description=text)
        subparser.add_argument("--settings", type=Path, default=SETTINGS, help=f"settings (default: {SETTINGS})")
        if remote and name != "submit":
            subparser.add_argument("--job", help="name of the run (default: the last one that `submit` made here)")
        return subparser

    for name, text in (("compile", "write the pipeline job"), ("submit", "compile it and run it")):
        subparser = command(name, text, remote=name == "submit")
        subparser.add_argument("--output", type=Path, default=PIPELINE, help=f"file to write (default: {PIPELINE})")
        if name == "submit":
            subparser.add_argument(
                "--wait", action="store_true", help="say how it goes until it ends; fail if it fails"
            )
    subparser = command("status", "how a run stands, step by step")
    subparser.add_argument("--wait", action="store_true", help="say how it goes until it ends; fail if it fails")
    subparser = command("download", "bring a run's results here and check them")
    subparser.add_argument("paths", nargs="*", help="what to bring, such as build/package (default: everything)")
    command("register", "register a run's package as a model of the workspace")
    command("cancel", "stop a run")
    subparser = commands.add_parser("step", help="run one rule in a step (Azure ML calls this)")
    subparser.add_argument("rule")
    subparser.add_argument("--input", type=pair, action="append", default=[], metavar="PATH=MOUNTED")
    subparser.add_argument("--output", type=pair, action="append", default=[], metavar="PATH=TARGET")
    subparser.add_argument("--receipt", type=Path, required=True, help="file for the digests of the outputs")
    subparser.add_argument("--checkpoints", type=Path, help="folder for checkpoints that outlive the machine")
    args = parser.parse_args(argv)

    with cli.job("azureml") as job:
        if args.command == "step":
            from slmake.azureml import step

            step.main(args.rule, dict(args.input), dict(args.output), args.receipt, args.checkpoints)
        elif args.command == "compile":
            _, planned = compiled(args.settings, args.output)
            job.say(f"{args.output}: {len(planned.rules)} steps: {', '.join(planned.rules)}")
        else:
            from slmake.azureml import service

            service.run(args, job)


if __name__ == "__main__":
    main()
