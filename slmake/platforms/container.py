"""The image that rules run in: found, checked, and given what a rule may see of this machine.

    python -m slmake.platforms.container containers/slmake-cpu.sif

checks an image against envs/*.lock and prints the line for params.yaml. The Snakefile calls the same functions whenever
Snakemake runs rules in containers (`--software-deployment-method apptainer`). Standard library only: `differences` runs
inside the image, which may hold anything.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path

from slmake import cli
from slmake.errors import UserError

NAMED = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT", "PIP_FIND_LINKS")
GIVEN = ("APPTAINERENV", "SINGULARITYENV")  # with these before their names, variables are set in a container
OFFLINE = ["--net", "--network", "none"]


def image(setting: str | None) -> str | None:
    """The SIF file that `all.container` names: as written, or where a reference to a registry is pulled to."""
    if setting is None:
        return None
    where, _, digest = setting.partition("@sha256:")
    return where if where.endswith(".sif") and "://" not in where else f"containers/sha256-{digest[:16]}.sif"


def outside(files: list[str], folder: Path) -> list[Path]:
    """What of `files` (and of build, data, logs and results) really lies outside the project's folder."""
    folder = folder.resolve()
    real = [Path(file).resolve() for file in [*files, "build", "data", "logs", "results", "benchmarks"]]
    return sorted({path for path in real if path.exists() and not path.is_relative_to(folder)})


def prepare(setting: str, files: list[str], online: list[str]) -> None:
    """Set the variables by which Apptainer gives a rule this machine's GPU and the files it reads, and nothing of our Python.

    SLMAKE_OFFLINE holds the options that take the network away, if the engine grants them here; SLMAKE_ONLINE is a pattern
    for the commands that keep it. The profiles read both.

    Args:
        setting: `all.container`.
        files: what rules read, as written in params.yaml; what lies outside the project's folder is made visible.
        online: scripts that need the network.
    """
    given = {"PYTHONPATH": "", cli.IMAGE: setting}
    os.environ.update({f"{prefix}_{name}": value for prefix in GIVEN for name, value in given.items()})
    os.environ.update(SLMAKE_OFFLINE="", SLMAKE_ONLINE="|".join(online))
    binds = [f"{path}:{path}:ro" if path.is_file() else f"{path}:{path}" for path in outside(files, Path())]
    # A site's own certificates and wheels, where the environment names them by these variables, which go into the image, too.
    named = [Path(os.environ[name]) for name in NAMED if name in os.environ]
    binds += [f"{path}:{path}:ro" for path in named if path.is_absolute() and path.exists()]
    if binds:
        os.environ["APPTAINER_BIND"] = ",".join(
            dict.fromkeys([*os.environ.get("APPTAINER_BIND", "").split(","), *binds])
        ).strip(",")
    if has_gpu():
        os.environ["APPTAINER_NV"] = "1"
    if engine() and Path(image(setting)).is_file():
        probe = subprocess.run([engine(), "exec", *OFFLINE, image(setting), "true"], capture_output=True)
        os.environ["SLMAKE_OFFLINE"] = "" if probe.returncode else " ".join(OFFLINE)


def engine() -> str | None:
    """Apptainer's program, or Singularity's."""
    return shutil.which("apptainer") or shutil.which("singularity")


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA driver with a device."""
    return Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists()


def kind(setting: str | None) -> str:
    """`cpu` or `cuda`: what the image, or without one this Python's environment, was made for."""
    if setting is None:
        return "cpu" if version("torch").endswith("+cpu") else "cuda"
    done = subprocess.run(
        [engine() or "apptainer", "exec", image(setting), "printenv", "SLMAKE_MACHINE"], capture_output=True, text=True
    )
    return done.stdout.strip() or "cpu"


def check(setting: str, envs: Path = Path("envs")) -> None:
    """Raise UserError unless the image is there, has the digest asked for and holds the locked environment.

    An image in a registry is pulled first; the registry's digest is checked by the engine that pulls it.
    """
    where, _, digest = setting.partition("@sha256:")
    sif = Path(image(setting))
    if engine() is None:
        raise UserError(
            "all.container: rules are to run in containers, but neither apptainer nor singularity is installed."
        )
    if "://" in where:
        if not sif.exists():
            _pull(setting, sif)
    elif not sif.is_file():
        raise UserError(f"all.container: {sif}: no such image. Build it with `make sif`, or correct params.yaml.")
    elif (actual := sha256(sif)) != digest:
        raise UserError(
            f"all.container: {sif} is not the image that params.yaml names.\n  params.yaml: sha256:{digest}\n  the file:    "
            f"sha256:{actual}\nIf the new image is meant, put its digest into params.yaml; everything is then built again."
        )
    compare(sif, envs)


def _pull(setting: str, sif: Path) -> None:
    partial = sif.with_name(f".{sif.name}.partial")
    done = subprocess.run([engine(), "pull", "--force", str(partial), setting], capture_output=True, text=True)
    if done.returncode:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"all.container: {setting} cannot be pulled: {_last_line(done.stderr)} Check the name, the digest and your access."
        )
    os.replace(partial, sif)


def compare(sif: Path, envs: Path) -> None:
    """Raise UserError if the packages inside the image are not those of the lock it was made from."""
    command = ["--home", str(Path.cwd()), "--bind", f"{Path(__file__).resolve().parents[2]}:/mnt,{envs.resolve()}:/srv"]
    inside = "import sys; sys.path.insert(0, '/mnt'); from slmake.platforms import container; container.print_differences('/srv')"
    done = subprocess.run(
        [engine(), "exec", *command, str(sif), "python", "-c", inside],
        capture_output=True,
        text=True,
        env=os.environ | {"APPTAINERENV_PYTHONPATH": ""},
    )
    try:
        different = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise UserError(
            f"all.container: {sif} cannot be used: {_last_line(done.stderr)} It should be an image that `make sif` made."
        ) from None
    if different:
        rest = [f"… and {len(different) - 10} more"] * (len(different) > 10)
        raise UserError(
            f"all.container: {sif} does not hold the locked environment. Build it again with `make sif`.\n  "
            + "\n  ".join([*different[:10], *rest])
        )


def print_differences(envs: str) -> None:
    """Inside the image: print what differs from the lock as JSON, one line of text per package."""
    print(json.dumps(differences(Path(envs))))


def differences(envs: Path) -> list[str]:
    """What this Python's packages and the lock for this kind of machine (SLMAKE_MACHINE) do not have in common."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    machine = os.environ.get("SLMAKE_MACHINE", "cpu")
    present = {canonicalize_name(item.metadata["Name"]): item.version for item in distributions()}
    locked = (envs / f"{machine}.lock").read_text(encoding="utf-8").splitlines()
    locked += re.findall(r"^torch==.*$", (envs / f"{machine}.in").read_text(encoding="utf-8"), re.M)
    lines = []
    for line in locked:
        if not re.match(r"[A-Za-z0-9]", line):
            continue
        wanted = Requirement(line.partition("\\")[0].strip())
        if wanted.marker and not wanted.marker.evaluate():
            continue
        pinned = next(iter(wanted.specifier)).version
        installed = present.get(canonicalize_name(wanted.name))
        if installed is None:
            lines.append(f"{wanted.name}: {pinned} in {machine}.lock, missing in the image")
        elif installed.partition("+")[0] != pinned.partition("+")[0]:
            lines.append(f"{wanted.name}: {pinned} in {machine}.lock, {installed} in the image")
    return lines


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _last_line(text: str) -> str:
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "no message").rstrip(".") + "."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="a .sif file")
    args = parser.parse_args(argv)
    try:
        if not args.image.is_file():
            raise UserError(f"{args.image}: no such image. Build it with `make sif`.")
        setting = f"{args.image}@sha256:{sha256(args.image)}"
        check(setting)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{args.image}: {args.image.stat().st_size / 1e6:.0f} MB, holds the locked environment. In params.yaml:\n")
    print(f"all:\n  container: {setting}")


if __name__ == "__main__":
    main()
