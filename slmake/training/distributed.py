"""Data-parallel training: one process per GPU, on one node or several.

`launch` starts the processes on this machine. A Slurm job of several nodes starts them with srun. Under torchrun, or on
Azure Machine Learning, they already run (RANK, WORLD_SIZE and so on are in the environment). Each process computes its
share of a step's sequences, and the gradients are summed. So the number of processes changes the speed and the last
digits, not the training: the batch of a step is the one that params.yaml asks for.

Every process reads the base model; all but the first on a node read it from the page cache. With `finetune.sharding:
full` each process keeps 1/N of it (fully sharded data parallel: Zhao et al. 2023, arXiv:2304.11277). Adapters, their
gradients and the optimizer are small and are replicated.
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

GRACE = 30  # seconds that a process has to end after another process failed


class Group:
    """The processes that train one adapter, seen from one of them."""

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, local_world: int = 1):
        self.rank, self.world = rank, world
        self.local_rank, self.local_world = local_rank, local_world

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which logs and saves."""
        return self.rank == 0

    def share(self, passes: list[np.ndarray]) -> list[tuple[int, np.ndarray, bool]]:
        """What this process computes of some forward passes; every process gets the same number of them.

        Whole passes are dealt out in turn; the remainder is divided by rows, so that no process waits for another.

        Returns:
            For each: a number that is unique in this step, the rows, and whether they count. A process without rows
            computes one that does not count, because sharded weights need every process in every pass.
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

        totals = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(totals)
        return totals.tolist()

    def all_reduce_gradients(self, parameters: Iterable) -> None:
        """Sum the gradients of (float32) parameters over all processes, in one message."""
        if self.world == 1:
            return
        import torch

        parameters = list(parameters)
        flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in parameters])
        torch.distributed.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def broadcast(self, value):
        """Rank 0's value, in every process."""
        if self.world == 1:
            return value
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def check_same(self, tensors: Iterable, step: int) -> None:
        """Raise UserError unless all processes have the same bytes."""
        if self.world == 1:
            return
        import torch

        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        digests = [None] * self.world
        torch.distributed.all_gather_object(digests, digest.hexdigest())
        if len(set(digests)) > 1:
            raise UserError(
                f"at step {step} the processes have different adapters: their machines compute differently. Train on nodes of the "
                "same kind, or on one node."
            )

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run the block in one process of a node after another, so that a node loads one whole model at a time."""
        import torch

        for number in range(self.local_world):
            if number == self.local_rank:
                yield
            torch.distributed.barrier()

    def shard(self, peft, device, kept: set) -> tuple[int, int]:
        """Shard the base: 1/world of its weights stays in this process, and a layer is gathered when it is needed.

        Args:
            peft: the model with its adapters, anywhere.
            device: where the shards go.
            kept: parameters that stay whole (the adapters').

        Returns:
            How many of the base's weights this process has now, and how many there are.
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
    """The log of a rank: rank 0's own, the others' beside it."""
    return log if log is None or rank == 0 else log.with_name(f"{log.stem}.rank{rank}{log.suffix}")


def set_rank() -> None:
    """In a task of `_srun`, give PyTorch's variables of rank and size Slurm's values; torchrun has set them itself."""
    if "SLMAKE_SRUN" in os.environ:
        names = {"RANK": "PROCID", "WORLD_SIZE": "NTASKS", "LOCAL_RANK": "LOCALID"}
        os.environ.update({name: os.environ[f"SLURM_{slurm}"] for name, slurm in names.items()})
        os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // int(os.environ["SLURM_NNODES"]))


def redirect_worker_output(log: Path | None) -> Path | None:
    """The log of rank 0; a worker's output is redirected to a log of its own, and nothing of it reaches the terminal."""
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
def process_group() -> Iterator[Group]:
    """The process group that the environment describes; without one, a group of this process alone.

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
            f"another of the {world} training processes ended, or the connection to it broke. Its log says why. Run the same "
            "command again: training resumes from the last checkpoint."
        ) from None
    torch.distributed.destroy_process_group()


def per_node(asked: str) -> int:
    """Processes on each node: as many as asked for; `auto`: one per GPU, one without a GPU."""
    if asked != "auto":
        return int(asked)
    if not Path("/dev/nvidiactl").exists():
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def launch(asked: str, module: str, arguments: list[str], log: Path | None) -> bool:
    """Start the training processes and wait for them; False if this process is to train itself.

    Args:
        asked: processes per node, a number or `auto`.
        module: the module that each of them runs, with `arguments`.
        log: rank 0's log file.

    Raises:
        SystemExit: one of them failed.
    """
    if "WORLD_SIZE" in os.environ or "SLMAKE_SRUN" in os.environ:
        return False
    count, nodes = per_node(asked), int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    if nodes > 1:
        _srun(nodes, count, [sys.executable, "-m", module, *arguments])
    elif count == 1:
        return False
    else:
        _spawn(count, module, arguments, log)
    return True


def _threads(count: int) -> None:
    """Divide this node's cores among its processes: with more threads than cores, all of them are slower."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))


def _spawn(count: int, module: str, arguments: list[str], log: Path | None) -> None:
    """Train in `count` processes of this machine."""
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    _threads(count)
    if Path("/sys/class/net/lo").exists():  # all processes are on this machine
        os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    with tempfile.TemporaryDirectory(prefix="slmake-") as folder:
        os.environ.update(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), SLMAKE_STORE=f"file://{folder}/store")
        # torch ends a process whose parent has ended, so two runs never write the same checkpoints.
        context = start_processes(_process, (module, arguments), count, join=False, start_method="spawn")
        try:
            with cli.terminable():
                while not context.join(grace_period=GRACE):
                    pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            context.processes[0].join(GRACE)
            message = _failure([process.exitcode for process in context.processes], error, log)
            if message:
                print(f"{module.rpartition('.')[2]}: error: {message}", file=sys.stderr)
            raise SystemExit(getattr(error, "exit_code", None) or 1) from None
        except (KeyboardInterrupt, cli.Interrupted):
            raise SystemExit(130) from None
        finally:
            for process in context.processes:
                process.terminate()
            for process in context.processes:
                process.join(GRACE)
                process.kill()


def _failure(codes: list[int | None], error: Exception, log: Path | None) -> str | None:
    """Which process failed and why, from the exit codes by rank; None if rank 0 has printed its own error already."""
    # A killed process is the cause, whichever process failed first after it (torch ends the rest with SIGTERM).
    killed = [rank for rank, code in enumerate(codes) if (code or 0) < 0 and code != -signal.SIGTERM]
    rank = killed[0] if killed else error.error_index
    if not killed and (not rank or codes[0] == 1):
        return None
    reason = f"ended by {signal.Signals(-codes[rank]).name}" if killed else str(error).strip()
    return f"process {rank + 1} of {len(codes)} failed: {reason}." + (f" Its log: {log_of(log, rank)}" if log else "")


def _process(rank: int, module: str, arguments: list[str]) -> None:
    import runpy

    # SIGINT says that the parent has ended; a process in the background of a shell would ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _srun(nodes: int, count: int, command: list[str]) -> None:
    """One srun for all nodes of this Slurm job, in a step that shares the resources of the current step."""
    if not shutil.which("srun"):
        sys.exit(
            f"{command[2].rpartition('.')[2]}: error: this job has {nodes} nodes, but there is no srun here, so only one of them could be used. "
            "Ask for one node, or run without a container (docs/slurm.md)."
        )
    _threads(count)
    hosts = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    first = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()[0]
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 20000
    environment = os.environ | {"SLMAKE_SRUN": "1", "MASTER_ADDR": first, "MASTER_PORT": str(port)}
    srun = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks-per-node={count}", f"--ntasks={nodes * count}"]
    done = subprocess.run([*srun, "--kill-on-bad-exit=1", *command], env=environment)
    if done.returncode:
        raise SystemExit(done.returncode)
