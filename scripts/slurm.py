"""What rules ask of a cluster, and what they check when they run on one. The Snakefile calls these functions."""

import os
from collections.abc import Callable
from pathlib import Path

import container
from common.errors import UserError
from common.outputs import folder_size


def memory(least: int, factor: float = 0) -> Callable:
    """A rule's `mem_mb`: `least` MB and `factor` times the folders it reads, doubled with every further attempt."""

    def mb(wildcards, input, attempt: int) -> int:
        folders = [Path(path) for path in input if path.startswith("build/")]
        for folder in folders:
            folder.stat()  # not there yet: Snakemake asks again when it is
        return int(least + factor * sum(map(folder_size, folders)) / 1e6) * 2 ** (attempt - 1)

    return mb


def refuse_missing_gpu(setting: str | None) -> None:
    """Raise UserError in a Slurm job that was given a GPU which cannot be used: no device, or a torch without CUDA.

    Args:
        setting: `all.container` where rules run in containers; None for this Python's environment.
    """
    devices, job = os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.environ.get("SLURM_JOB_ID")
    if not job or devices in ("", "-1", "NoDevFiles"):
        return
    where = f"Slurm job {job} on {os.uname().nodename} was given a GPU (CUDA_VISIBLE_DEVICES={devices})"
    ask = "or ask for none: `gpu: 0` under set-resources in profiles/slurm/config.yaml"
    if not container.has_gpu():
        raise UserError(f"{where}, but no NVIDIA driver is there. Name a partition with GPUs, {ask}.")
    if container.kind(setting) == "cpu":
        raise UserError(
            f"{where}, but the environment holds the CPU build of torch. Make one for GPUs "
            f"(`make image sif MACHINE=cuda`, or `make setup MACHINE=cuda` without containers), {ask}."
        )
