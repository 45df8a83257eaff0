"""distributed: several processes train as one does, each its own share: the same losses, one adapter, resumed together."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import preloaded
import pytest
from finetune_script import FILES, command, contents, curve, tune

from slmake.training.distributed import Group

SCRIPT = ("-m", "scripts.finetune")
# One process sums a batch's losses and gradients in one order, two in another. In float32 that is an error of about 1e-7
# of each sum, which 20 steps of AdamW carry on; seen: 1e-6 in the losses, written with six digits.
CLOSE = 5e-6


def start(
    folder: Path, base: Path, dataset: Path, launcher: tuple = (), fresh: bool = True, **changes: object
) -> subprocess.Popen:
    """The script in processes of its own; what they print to the terminal is its stdout. `fresh`: they import all libraries."""
    arguments = [*command(folder, base, dataset, **changes), "--log", str(folder / "logs" / "finetune.log")]
    how = [*launcher, *SCRIPT, *arguments] if launcher else [*SCRIPT, *arguments, "--nproc-per-node", "2"]
    variables = dict(os.environ)
    python = sys.executable if fresh else preloaded.program("python", variables)
    return subprocess.Popen(
        [python, *how],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def tune_by_two(folder: Path, base: Path, dataset: Path, launcher: tuple = (), **changes: object) -> str:
    """Run it to its end; returns what it printed."""
    process = start(folder, base, dataset, launcher, fresh=bool(launcher), **changes)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def losses(folder: Path, name: str = "train") -> list[float]:
    return [line["loss"] for line in curve(folder / f"{name}_loss.csv")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, base, dataset) -> Path:
    """One run by two processes; do not write into it."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    (folder.parent / "printed.txt").write_text(tune_by_two(folder, base, dataset))
    return folder


# -- the share of each -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [[8], [8, 8], [8, 8, 8, 8, 3], [1], [2, 2, 2, 1]])
def test_every_row_is_computed_once_and_no_process_waits(world, sizes):
    offsets = np.cumsum([0, *sizes])
    passes = [np.arange(a, b) for a, b in itertools.pairwise(offsets)]
    shares = [Group(rank, world).share(passes) for rank in range(world)]
    rows = [int(row) for share in shares for _, part, counts in share if counts for row in part]
    assert sorted(rows) == list(range(offsets[-1]))
    assert len({len(share) for share in shares}) == 1
    numbers = [number for share in shares for number, _, _ in share]
    assert len(set(numbers)) == len(numbers)
    assert all(len(part) for share in shares for _, part, _ in share)
    largest = max(sum(len(part) for _, part, counts in share if counts) for share in shares)
    assert largest <= -(-offsets[-1] // world) + len(sizes)


def test_one_process_computes_every_pass():
    passes = [np.array([3, 1]), np.array([2])]
    assert [(number, part.tolist(), counts) for number, part, counts in Group().share(passes)] == [
        (0, [3, 1], True),
        (1, [2], True),
    ]


# -- together ----------------------------------------------------------------------------------------------------------


def test_two_processes_train_to_the_losses_of_one(tmp_path, base, dataset, pair):
    single = tune(tmp_path / "one", base, dataset)
    assert np.abs(np.subtract(losses(single), losses(pair))).max() < CLOSE
    assert np.abs(np.subtract(losses(single, "eval"), losses(pair, "eval"))).max() < CLOSE
    mine, theirs = weights(single), weights(pair)
    assert mine.keys() == theirs.keys()
    # Adam divides by the root of a mean square: where a gradient is near 0, a last digit can become a part of a step.
    differences = np.concatenate([np.abs(mine[name] - theirs[name]).ravel() for name in mine])
    assert np.median(differences) < 1e-6
    assert differences.max() < 1e-3


def test_one_adapter_one_output_and_a_log_for_each(pair):
    files = sorted(path.relative_to(pair).as_posix() for path in pair.rglob("*") if path.is_file())
    assert files == sorted([*FILES, "params.yaml", "logs/finetune.log", "logs/finetune.rank1.log"])
    printed = (pair.parent / "printed.txt").read_text()
    assert printed.count(": 20 steps, loss") == 1
    assert "2 processes" in (pair / "logs" / "finetune.log").read_text()


def test_again_and_under_torchrun_the_same_bytes(tmp_path, base, dataset, pair):
    tune_by_two(tmp_path / "again", base, dataset)
    assert contents(tmp_path / "again") == contents(pair)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--")
    tune_by_two(tmp_path / "torchrun", base, dataset, torchrun)
    assert contents(tmp_path / "torchrun") == contents(pair)


def test_whole_passes_are_shared_with_the_dropout_of_one(tmp_path, base, dataset):
    """Where gradient_accumulation_steps is a multiple of the devices, even the random numbers are those of one process."""
    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "lora_dropout": 0.2}
    single = tune(tmp_path / "one", base, dataset, **changes)
    tune_by_two(tmp_path / "two", base, dataset, **changes)
    assert np.abs(np.subtract(losses(single), losses(tmp_path / "two"))).max() < CLOSE
    undropped = tune(tmp_path / "undropped", base, dataset, **{**changes, "lora_dropout": 0.0})
    assert np.abs(np.subtract(losses(single), losses(undropped))).max() > 100 * CLOSE


def test_sharded_base_gives_the_same_bytes_and_each_process_has_half(tmp_path, base, dataset, pair):
    folder = tmp_path / "sharded"
    tune_by_two(folder, base, dataset, sharding="full")
    assert contents(folder) == contents(pair)
    for name in ("finetune.log", "finetune.rank1.log"):
        local, total = map(int, re.search(r"has (\d+) of (\d+)", (folder / "logs" / name).read_text()).groups())
        assert local == pytest.approx(total / 2, rel=0.02)


@pytest.mark.parametrize(
    "changes", [{"method": "qlora"}, {"gradient_checkpointing": True}, {"compute_dtype": "bfloat16"}]
)
def test_other_ways_to_train_work_for_two(tmp_path, base, dataset, changes):
    single = tune(tmp_path / "one", base, dataset, **changes)
    tune_by_two(tmp_path / "two", base, dataset, **changes)
    # bfloat16 has 8 bits: its rounding is what differs.
    close = CLOSE if "gradient_checkpointing" in changes else 0.02
    assert np.abs(np.subtract(losses(single), losses(tmp_path / "two"))).max() < close


def test_sharding_and_gradient_checkpointing(tmp_path, base, dataset, pair):
    tune_by_two(tmp_path / "run", base, dataset, sharding="full", gradient_checkpointing=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(pair), abs=CLOSE)


def test_early_stopping_is_one_decision(tmp_path, base, dataset):
    """A learning rate that ruins the adapter: both stop at the same step, with the best adapter."""
    printed = tune_by_two(
        tmp_path / "run",
        base,
        dataset,
        learning_rate=1.0,
        eval_steps=2,
        early_stopping_patience=2,
        num_train_epochs=8.0,
    )
    assert "stopped early" in printed


# -- killed ------------------------------------------------------------------------------------------------------------


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not list(folder.glob("checkpoints/*/step-*/state.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


LONG = {"max_steps": 300, "save_steps": 10, "eval_steps": 0}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, base, dataset) -> Path:
    """One long run by two processes; do not write into it."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    tune_by_two(folder, base, dataset, **LONG)
    return folder


@pytest.mark.parametrize("whom", ["all", "launcher", "second", "first", "sigterm"])
def test_killed_processes_resume_together(tmp_path, base, dataset, uninterrupted, whom):
    """Whichever process is killed, the others end too; the next run resumes and ends in the bytes of an uninterrupted one."""
    folder = tmp_path / "run"
    process = start(folder, base, dataset, **LONG)
    wait_for_checkpoint(folder, process)
    both = children(process.pid)
    assert len(both) == 2
    if whom == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif whom in ("first", "second"):
        os.kill(both[whom == "second"], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGTERM if whom == "sigterm" else signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode
    deadline = time.monotonic() + 60
    while any(map(alive, both)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if whom in ("first", "second"):
        number, log = (1, "finetune.log") if whom == "first" else (2, "finetune.rank1.log")
        assert f"process {number} of 2 failed: ended by SIGKILL. Its log: {folder / 'logs' / log}" in printed
        assert "gloo" not in printed
    assert not (folder / "adapter").exists()
    assert not (folder / "train_loss.csv").exists()
    said = tune_by_two(folder, base, dataset, **LONG)
    assert "resumes from step" in said
    assert contents(folder) == contents(uninterrupted)
    assert not (folder / "checkpoints").exists()


def test_a_checkpoint_of_one_process_is_not_taken_for_one_of_two(tmp_path, base, dataset, pair):
    """Another number of processes is another run: its last digits differ."""
    folder = tmp_path / "run"
    process = start(folder, base, dataset, (), **LONG)
    wait_for_checkpoint(folder, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (key,) = [path.name for path in (folder / "checkpoints").iterdir()]
    tune(folder, base, dataset, **LONG)
    assert (folder / "checkpoints" / key).exists()


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_error_of_all_is_printed_once(tmp_path, base, dataset):
    process = start(tmp_path / "run", tmp_path / "nowhere", dataset)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert printed.count("error:") == 1
    assert "no model here. Build it with `snakemake --cores all" in printed
    assert "Traceback" not in printed


def test_adapters_that_drift_apart_are_noticed(tmp_path):
    """Two processes with different bytes: both report it, with the step."""
    code = (
        "import torch\n"
        "from slmake.errors import UserError\n"
        "from slmake.training import distributed\n"
        "with distributed.process_group() as group:\n"
        "    group.check_same([torch.ones(3)], 1)\n"
        "    try:\n"
        "        group.check_same([torch.ones(3) + group.rank * 1e-7], 7)\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    (tmp_path / "code.py").write_text(code)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "code.py"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("at step 7 the processes have different adapters") == 2


def test_slurm_tasks_know_their_ranks(monkeypatch, tmp_path):
    """A task of srun takes rank and size from Slurm's variables."""
    from slmake.training import distributed

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    slurm = {"PROCID": "0", "NTASKS": "4", "LOCALID": "0", "NNODES": "2"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLMAKE_SRUN", "1")
    distributed.set_rank()
    assert distributed.redirect_worker_output(tmp_path / "log") == tmp_path / "log"
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == [
        "0",
        "4",
        "0",
        "2",
    ]
