"""What rules ask of a cluster, and what they check when they run on one. The Snakefile calls these functions."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from slmake.errors import UserError
from slmake.outputs import folder_size
from slmake.platforms import container


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


# What Slurm's status, or the job's log, says about a job that was ended from outside.
REASONS = {
    "TIMEOUT": "it ran over its time limit of {runtime} minutes. Raise it: --set-resources {rule}:runtime=MINUTES",
    "CANCELLED": "it was cancelled (scancel, or its partition's limits)",
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "it was preempted",
    "MEMORY": "it was killed over its memory limit of {mem_mb} MB. Raise it: --set-resources {rule}:mem_mb=MB, or lower the batch size",
}
KILLED = re.compile("exceeded memory limit|Exceeded job memory limit|oom.?kill|OUT_OF_ME|: Killed$", re.I | re.M)


def reasons(text: str) -> list[str]:
    """One line for each job that Slurm ended: rule, job id, why, what to do, and the log to read.

    Args:
        text: Snakemake's output, errors included.
    """
    jobs = re.findall(
        r"Error in rule (\w+):\n +message: SLURM-job '(\d+)' failed, SLURM status is: '(\w+)'.*?\n +jobid: (\d+)", text
    )
    last = {number: (rule, job, status) for rule, job, status, number in jobs}  # of several attempts
    messages = []
    for rule, job, status in last.values():
        where = re.search(rf"submitted with SLURM jobid {job} \(log: (.*)\)\.", text)
        log = Path(where[1]) if where else None
        log_text = log.read_text(encoding="utf-8", errors="replace") if log and log.is_file() else ""
        key = "MEMORY" if status not in REASONS and KILLED.search(f"{status}\n{log_text}") else status
        if key in REASONS:
            asked = dict(re.findall(r"\b(mem_mb|runtime)=(\d+)", log_text))
            why = REASONS[key].format(**{"rule": rule, "mem_mb": "?", "runtime": "?"} | asked)
            messages.append(f"rule {rule}, Slurm job {job}: {why}." + (f" Its log: {log}" if log else ""))
    return messages
