"""Several processes that train one adapter together: one per GPU, on one node or several.

`launch` starts them on this machine; a Slurm job of several nodes goes through srun; under torchrun, or on Azure Machine
Learning, they are there already (RANK, WORLD_SIZE and so on in the environment). Each process computes its share of a
step's sequences. What they add up is the gradient of the whole step's loss, so the number of processes changes the
speed and the last digits, not the training: the step's batch stays the one that params.yaml asks for.

The base model is read by every process, from the page cache of its node after the first; with `finetune.sharding: full`
each keeps 1/N of it (fully sharded data parallel: Zhao et al. 2023, arXiv:2304.11277). Adapters, their gradients and the
optimizer are small and are held by all.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from slmake import cli
from slmake.errors import UserError

GRACE = 30  # seconds that a process has to end after another one failed


class Group:
    """The processes of one training, seen from one of them."""

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, local_world: int = 1):
        self.rank, self.world = rank, world
        self.local_rank, self.local_world = local_rank, local_world

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def share(self, passes: list[np.ndarray]) -> list[tuple[int, np.ndarray, bool]]:
        """What this process computes of some forward passes; every process gets the same number of them.

        Whole passes go round; what does not come out even is divided by rows, so that no process waits for another.

        Returns:
            For each: a number that no other pass of this step has, the rows, and whether they count (a process
            for which no row is left computes one that does not: sharded weights need all processes in step).
        """
        even = len(passes) // self.world * self.world
        mine = [(i, passes[i], True) for i in range(self.rank, even, self.world)]
        for i in range(even, len(passes)):
            rows = np.array_split(passes[i], self.world)[self.rank]
            mine.append((i + self.rank * len(passes), rows if len(rows) else passes[i][:1], len(rows) > 0))
        return mine

    def sums(self, *values: float) -> list[float]:
        """Each value summed over all processes, in double precision."""
        if self.world == 1:
            return list(values)
        import torch

        together = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(together)
        return together.tolist()

    def add_gradients(self, parameters: Iterable) -> None:
        """Sum the gradients of (float32) parameters over all processes, in one message."""
        if self.world == 1:
            return
        import torch

        parameters = list(parameters)
        flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in parameters])
        torch.distributed.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def agree(self, value):
        """The first process's value, in all of them."""
        if self.world == 1:
            return value
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def check_same(self, tensors: Iterable, step: int) -> None:
        """Raise UserError unless all processes hold the same bytes."""
        if self.world == 1:
            return
        import torch

        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        found = [None] * self.world
        torch.distributed.all_gather_object(found, digest.hexdigest())
        if len(set(found)) > 1:
            raise UserError(
                f"at step {step} the processes hold different adapters: their machines compute differently. Train on nodes of one "
                "kind, or on one node."
            )

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The processes of a node run the block one after another: a node holds one whole model at a time."""
        import torch

        for number in range(self.local_world):
            if number == self.local_rank:
                yield
            torch.distributed.barrier()

    def shard(self, peft, device, kept: set) -> tuple[int, int]:
        """Leave 1/world of the base's weights in this process; layers are gathered when they are needed.

        Args:
            peft: the model with its adapters, anywhere.
            device: where the shards go.
            kept: parameters that stay whole (the adapters').

        Returns:
            How many of the base's weights this process holds now, and of how many.
        """
        import torch
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (self.world,))
        for parameter in kept:
            parameter.data = parameter.data.to(device)
        base = peft.get_base_model()
        blocks = set(base._no_split_modules or ())
        for module in [module for module in base.modules() if type(module).__name__ in blocks]:
            fully_shard(module, mesh=mesh, ignored_params=kept)
        fully_shard(peft, mesh=mesh, ignored_params=kept)
        shards = [value for value in peft.parameters() if value not in kept]
        return sum(value.to_local().numel() for value in shards), sum(value.numel() for value in shards)


def log_of(log: Path | None, rank: int) -> Path | None:
    """A process's own log beside the first one's."""
    return log if log is None or rank == 0 else log.with_name(f"{log.stem}.rank{rank}{log.suffix}")


def one_voice(log: Path | None) -> Path | None:
    """The log of this process if it is the first one; the others' output goes to logs of their own, and none to the terminal."""
    if "SLMAKE_SPREAD" in os.environ:  # a task of `_spread`'s srun
        names = {"RANK": "PROCID", "WORLD_SIZE": "NTASKS", "LOCAL_RANK": "LOCALID"}
        os.environ.update({name: os.environ[f"SLURM_{slurm}"] for name, slurm in names.items()})
        os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // int(os.environ["SLURM_NNODES"]))
    rank = int(os.environ.get("RANK", 0))
    if log is None or not rank:
        return log
    own = log_of(log, rank)
    own.parent.mkdir(parents=True, exist_ok=True)
    with open(own, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return None


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """The group that this process belongs to, as the environment says; else it is alone.

    Raises:
        UserError: in the block, another process of the group ended.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Group()
        return
    import torch

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(
        backend, init_method=os.environ.get("SLMAKE_STORE", "env://"), rank=rank, world_size=world
    )
    try:
        yield Group(rank, world, local, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error).lower():
            raise
        traceback.print_exc()
        raise UserError(
            f"another of the {world} processes that train together ended, or the connection to it broke. Its log says why; then run the "
            "same command again: it goes on from the last checkpoint."
        ) from None
    torch.distributed.destroy_process_group()


def per_node(asked: str) -> int:
    """Processes on each node: as many as asked for; `auto`: one for each GPU, one where there is none."""
    if asked != "auto":
        return int(asked)
    if not Path("/dev/nvidiactl").exists():
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def launch(asked: str, module: str, arguments: list[str], log: Path | None) -> bool:
    """Start the processes that train together, and wait for them; False if this process shall do the work itself.

    Args:
        asked: processes per node, a number or `auto`.
        module: the module that each of them runs, with `arguments`.
        log: the first process's log file.

    Raises:
        SystemExit: one of them failed.
    """
    if "WORLD_SIZE" in os.environ or "SLMAKE_SPREAD" in os.environ:
        return False
    count, nodes = per_node(asked), int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    if nodes > 1:
        _spread(nodes, count, [sys.executable, "-m", module, *arguments])
    elif count == 1:
        return False
    else:
        _spawn(count, module, arguments, log)
    return True


def _threads(count: int) -> None:
    """Share this node's cores among the processes on it: threads that wait for each other's core slow all of them."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))


def _spawn(count: int, module: str, arguments: list[str], log: Path | None) -> None:
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    _threads(count)
    if Path("/sys/class/net/lo").exists():  # nothing outside this machine takes part
        os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    with tempfile.TemporaryDirectory(prefix="slmake-") as folder:
        os.environ.update(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), SLMAKE_STORE=f"file://{folder}/store")
        # A process whose parent is gone ends, too (torch sees to it): two trainings never write the same checkpoints.
        context = start_processes(_process, (module, arguments), count, join=False, start_method="spawn")
        try:
            with cli.terminable():
                while not context.join(grace_period=GRACE):
                    pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            context.processes[0].join(GRACE)
            codes = [process.exitcode for process in context.processes]
            # The one that was killed is the reason, whoever noticed it first (torch ends the rest with SIGTERM).
            killed = [rank for rank, code in enumerate(codes) if (code or 0) < 0 and code != -signal.SIGTERM]
            rank = killed[0] if killed else error.error_index
            # Where the first process failed by itself, it has told its error, which may be that of all.
            if killed or (rank and codes[0] != 1):
                why = f"ended by {signal.Signals(-codes[rank]).name}" if killed else str(error).strip()
                where = f" Its log: {log_of(log, rank)}" if log else ""
                print(
                    f"{module.rpartition('.')[2]}: error: process {rank + 1} of {count} failed: {why}.{where}",
                    file=sys.stderr,
                )
            raise SystemExit(getattr(error, "exit_code", None) or 1) from None
        except (KeyboardInterrupt, cli.Interrupted):
            raise SystemExit(130) from None
        finally:
            for process in context.processes:
                process.terminate()
            for process in context.processes:
                process.join(GRACE)
                process.kill()


def _process(rank: int, module: str, arguments: list[str]) -> None:
    import runpy

    # How it learns that its parent is gone; what runs in the background of a shell ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _spread(nodes: int, count: int, command: list[str]) -> None:
    """One srun for all nodes of this Slurm job, in a step that shares the resources of the step we are in."""
    if not shutil.which("srun"):
        sys.exit(
            f"{command[2].rpartition('.')[2]}: error: this job has {nodes} nodes, but srun cannot be reached, so only one of them could work. "
            "Ask for one node, or run without a container (docs/slurm.md)."
        )
    _threads(count)
    hosts = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    first = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()[0]
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 20000
    environment = os.environ | {"SLMAKE_SPREAD": "1", "MASTER_ADDR": first, "MASTER_PORT": str(port)}
    srun = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks-per-node={count}", f"--ntasks={nodes * count}"]
    done = subprocess.run([*srun, "--kill-on-bad-exit=1", *command], env=environment)
    if done.returncode:
        raise SystemExit(done.returncode)
