"""Build everything again in another folder and compare the bytes with this folder's build.

    python -m tools.reproduce
    python -m tools.reproduce --against ../other-clone     compare with what is built there, without building

Copies the files that Git tracks into a temporary folder, runs `snakemake --cores all` there, and compares the SHA-256 of
every built file that must not differ: base, dataset, adapter, merged and exported model, metrics, curves and predictions.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from slmake import cli, params
from slmake.errors import UserError
from slmake.outputs import sha256
from slmake.plan import Plan
from slmake.platforms import dvc, dvc_yaml

DIFFER = {  # timings, and what is free on this machine
    *("results/benchmark.json", "results/estimate.json", "results/search.json"),
    "build/report/cost.html",
    "build/package/model.sig",  # ECDSA is random
}
MEASURED = "measured.json"  # of a candidate: timings, too


def built_files(root: Path) -> dict[str, str]:
    """Relative path to SHA-256 of every file under `root` that the rules of this folder's params.yaml make."""
    digests, named = {}, dvc.entries()
    for output in (root / output for stage in dvc.stages() for output in dvc.outs(named[stage])):
        for path in sorted(output.rglob("*")) if output.is_dir() else [output]:
            name = path.relative_to(root).as_posix()
            if path.is_file() and not path.name.startswith(".") and name not in DIFFER and path.name != MEASURED:
                digests[name] = sha256(path)
    return digests


def copy_inputs(source: Path, scratch: Path, leave_out: tuple[str, ...] = ()) -> tuple[Path, list[str]]:
    """Copy what Git tracks (as it is in the working tree), and link what params.yaml names though Git does not track it.

    Args:
        scratch: an empty folder; the copy lies so deep in it that `../` of a name in params.yaml does not lead out of it.
        leave_out: what the names begin with that are not copied; nothing that is built is.

    Returns:
        The copy's folder, and the files that params.yaml names.

    Raises:
        UserError: the project is in no Git repository.
    """
    named = Plan(params.load(source / "params.yaml")).files
    depth = max([Path(os.path.normpath(name)).parts.count("..") for name in named], default=0)
    target = scratch.joinpath(*["project"] * (depth + 1))
    target.mkdir(parents=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=source, capture_output=True, text=True)
    if listed.returncode:
        raise UserError(
            f"git ls-files: {listed.stderr.strip().splitlines()[0]}. A copy of the project has the files that Git tracks: `git init`, then "
            "`git add .`, and the same command again."
        )
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith(("results/", *leave_out)) and (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)
    for name in map(os.path.normpath, named):
        if not Path(name).is_absolute() and not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).symlink_to((source / name).resolve())
    return target, named


def snakemake(folder: Path, *targets: str) -> bool:
    """Build targets, or everything, in a copy of the project; returns whether it ended well."""
    command = [sys.executable, "-m", "snakemake", *targets, "--cores", "all", "--quiet", "progress"]
    return subprocess.run(command, cwd=folder).returncode == 0


def build_again(here: Path) -> dict[str, str]:
    """`built_files` of a build from nothing in a temporary folder. It publishes nothing."""
    with tempfile.TemporaryDirectory(prefix="slmake-again-") as scratch:
        project, _ = copy_inputs(here, Path(scratch))
        named = dvc.entries()
        if not snakemake(project, *(output for stage in dvc.stages() for output in dvc.outs(named[stage]))):
            raise UserError("the second build failed; the message is above.")
        return built_files(project)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="compare with the build in another copy of the project"
    )
    args = parser.parse_args(argv)
    with cli.job("reproduce"):
        dvc_yaml.update()
        first = built_files(Path.cwd())
        if not first:
            raise UserError("nothing is built here. Run `make` first.")
        second = built_files(args.against) if args.against else build_again(Path.cwd())
        if not second:
            raise UserError(f"nothing is built in {args.against}.")
    names = sorted(first.keys() | second.keys())
    different = [name for name in names if first.get(name) != second.get(name)]
    for name in names:
        print(f"{'DIFFERS' if name in different else 'same   '}  {second.get(name, first.get(name))[:16]}  {name}")
    print(f"{len(names) - len(different)} of {len(names)} files are byte-identical")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
