"""A full disk and a read-only folder, met by whole rules: one clear message, and everything that was built is still there."""

import contextlib
import os
import shutil
import subprocess

import pytest
from project import digests, run

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root"
)
OUTPUTS = {
    "fetch_model": ("build/base", "results/base.json"),
    "prepare": ("build/dataset", "results/dataset.json"),
    "finetune": ("build/adapter", "results/train_loss.csv", "results/eval_loss.csv"),
    "merge": ("build/merged",),
    "quantize": ("build/onnx-int4",),
    "package": ("build/package",),
}


@pytest.fixture
def small(copy_of_built):
    """A built project whose build/ is a file system of its own, of 16 MB."""
    build = copy_of_built / "build"
    kept = copy_of_built / "kept"
    build.rename(kept)
    build.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", build], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        subprocess.run(["cp", "-a", f"{kept}/.", build], check=True)
        shutil.rmtree(kept)
        yield copy_of_built
    finally:
        subprocess.run(["umount", "--lazy", build], check=True)


def fill(folder) -> None:
    """Write until nothing more fits."""
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as handle:
        while True:
            handle.write(bytes(4096))


def make(project, rule: str):
    """Run one rule as DVC and Azure ML do."""
    return run(
        project, "snakemake", "--cores", "all", "--nocolor", "--quiet", "host", "--rerun-triggers", "mtime",
        "--allowed-rules", rule, "--", OUTPUTS[rule][0],
    )  # fmt: skip


def without_outputs(project, rule: str) -> dict[str, str]:
    """Remove what the rule makes; digests of everything else."""
    for name in OUTPUTS[rule]:
        path = project / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return digests(project)


def assert_failed_cleanly(project, rule: str, done, told: str, before: dict[str, str]) -> None:
    assert done.returncode != 0
    messages = [line for line in done.stdout.splitlines() if line.startswith(f"{rule}: error: ")]
    assert len(messages) == 1, done.stdout
    assert told in messages[0]
    assert "Traceback" not in done.stdout
    after = digests(project)
    after.pop("build/filler", None)
    assert after == before
    assert not list((project / "build").glob(".*.partial"))


@pytest.mark.parametrize("rule", OUTPUTS)
def test_full_disk(small, rule):
    whole = digests(small)
    before = without_outputs(small, rule)
    fill(small / "build")
    done = make(small, rule)
    assert_failed_cleanly(small, rule, done, "the disk is full", before)
    assert "Free some space and run the same command again" in done.stdout
    if rule == "finetune":  # it has checkpoints, and so the most to go wrong
        (small / "build" / "filler").unlink()
        again = make(small, rule)
        assert again.returncode == 0, again.stdout
        assert digests(small) == whole


def test_read_only_folder(small):
    """Said before any job: by us where an output is missing, by Snakemake where one is there."""
    before = without_outputs(small, "merge")
    subprocess.run(["mount", "-o", "remount,ro", small / "build"], check=True)
    for arguments, told in (
        (("--allowed-rules", "merge", "--", "build/merged"), "cannot write to build/: it is read-only here"),
        (("--forceall",), "Write-protected output files for rule "),
    ):
        done = run(small, "snakemake", "--cores", "all", "--nocolor", "--rerun-triggers", "mtime", *arguments)
        assert done.returncode != 0
        assert told in done.stdout
        assert "Traceback" not in done.stdout
        assert "Shell command: python" not in done.stdout
        assert digests(small) == before
