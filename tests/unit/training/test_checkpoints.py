"""finetune: a run that was killed resumes and gives the same bytes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetune_script import FILES, SETTINGS, command, contents, curve, tune

from slmake import params
from slmake.training import checkpoints as checkpoints_module

# save_steps changes no result, so that the undisturbed runs need not write a checkpoint after every step.
KILLED = {"save_steps": 1, "max_steps": 40, "lora_dropout": 0.1, "logging_steps": 7, "eval_steps": 10}
ENDED = {
    "save_steps": 1,
    "max_steps": 40,
    "logging_steps": 7,
    "eval_steps": 3,
    "early_stopping_patience": 8,
    "early_stopping_threshold": 0.5,
}


def interrupt(folder: Path, number: signal.Signals, base: Path, dataset: Path, **changes: object):
    """Start the script, wait for its fifth checkpoint, send a signal; returns the exit code and its messages."""
    arguments = [sys.executable, "-m", "scripts.finetune", *command(folder, base, dataset, **changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 600
        while not any(int(path.name[5:]) >= 5 for path in (folder / "checkpoints").glob("*/step-*")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        _, messages = process.communicate(timeout=60)
    assert list((folder / "checkpoints").glob("*/step-*")), "the run was over before the signal came"
    assert not any((folder / name).exists() for name in FILES)
    return process.returncode, messages


@pytest.fixture(scope="module")
def killed(tmp_path_factory, base, dataset) -> Path:
    """What a run killed with SIGKILL leaves behind; copy it."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    code, _ = interrupt(folder, signal.SIGKILL, base, dataset, **KILLED)
    assert code == -signal.SIGKILL
    return folder


def resumed_from(messages: str) -> int:
    """Step in the line that says where a run goes on."""
    (line,) = [line for line in messages.splitlines() if "resumes from step" in line]
    assert line.endswith(" of 40")
    return int(line.split()[-3])


def test_killed_run_goes_on_and_gives_the_bytes_of_an_undisturbed_one(tmp_path, base, dataset, killed, capsys):
    """With dropout; a half-written later checkpoint is not used."""
    undisturbed = tune(tmp_path / "undisturbed", base, dataset, **{**KILLED, "save_steps": 1000})
    assert "since step" not in capsys.readouterr().err
    folder = Path(shutil.copytree(killed, tmp_path / "killed"))
    (run,) = (folder / "checkpoints").iterdir()
    last = max(int(path.name[5:]) for path in run.glob("step-*"))
    (run / ".step-00000039.partial").mkdir()
    (run / ".step-00000039.partial" / "tensors.safetensors").write_bytes(b"half")
    tune(folder, base, dataset, **KILLED)
    said = capsys.readouterr().err
    assert resumed_from(said) == last >= 5
    assert f" s since step {last}: " in said  # the seconds are not those of the whole training
    assert contents(folder) == contents(undisturbed)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in undisturbed.iterdir())


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tensors.safetensors", None, "Error while deserializing header: "),
        ("tensors.safetensors", "", "Error while deserializing header: "),
        ("state.json", "", "state.json is damaged: Expecting value"),
        ("state.json", '{"step": 7}', "state.json is damaged: it has no `bad_evaluations`"),
    ],
    ids=["cut", "empty", "empty-state", "state-lacks"],
)
def test_damaged_checkpoint_is_discarded(tmp_path, base, dataset, killed, capsys, file, content, told):
    """The run resumes from an older one, or starts from the beginning."""
    undisturbed = tune(tmp_path / "undisturbed", base, dataset, **{**KILLED, "save_steps": 1000})
    folder = Path(shutil.copytree(killed, tmp_path / "killed"))
    (run,) = (folder / "checkpoints").iterdir()
    older = sorted(run.glob("step-*"))[-1]
    for name in ("step-00000037", "step-00000038"):
        damaged = Path(shutil.copytree(older, run / name))
        cut = (damaged / file).read_bytes()[:-50]
        (damaged / file).write_bytes(cut if content is None else content.encode())
    if content is None:  # none is left
        shutil.rmtree(older)
    capsys.readouterr()
    tune(folder, base, dataset, **KILLED)
    messages = capsys.readouterr().err
    for name in ("step-00000037", "step-00000038"):
        assert f"finetune: the checkpoint {run / name} is damaged and is discarded: {told}" in messages
    assert "error" not in messages.replace("Error while deserializing", "")
    if content is None:
        assert "goes on" not in messages
    else:
        assert resumed_from(messages) == int(older.name[5:])
    assert contents(folder) == contents(undisturbed)
    assert not (folder / "checkpoints").exists()


def test_run_ended_by_sigterm_goes_on_and_gives_the_bytes_of_an_undisturbed_one(tmp_path, base, dataset, capsys):
    """With early stopping: the best adapter so far and the count of bad evaluations survive too."""
    undisturbed = tune(tmp_path / "undisturbed", base, dataset, **{**ENDED, "save_steps": 1000})
    folder = tmp_path / "ended"
    code, messages = interrupt(folder, signal.SIGTERM, base, dataset, **ENDED)
    assert code == 130
    assert "finetune: error: interrupted. Run the same command again to resume." in messages
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "params.yaml"]
    capsys.readouterr()
    tune(folder, base, dataset, **ENDED)
    assert resumed_from(capsys.readouterr().err) >= 5
    assert contents(folder) == contents(undisturbed)
    held_out = curve(folder / "eval_loss.csv")
    assert held_out[-1]["step"] < 40  # it did stop early


@pytest.mark.parametrize("change", [{"learning_rate": 4e-3}, {"seed": 1}, {"lora_dropout": 0.05}])
def test_checkpoint_of_other_parameters_is_not_used(tmp_path, base, dataset, killed, capsys, change):
    checkpoints = Path(shutil.copytree(killed / "checkpoints", tmp_path / "checkpoints"))
    changes = {**KILLED, "max_steps": 6, **change}
    before = sorted(path.relative_to(checkpoints) for path in checkpoints.rglob("*"))
    folder = tune(tmp_path / "run", base, dataset, checkpoints, **changes)
    said = capsys.readouterr().err
    assert "resumes" not in said
    assert f"starts anew: the checkpoints in {checkpoints} are of other inputs" in said
    assert contents(folder) == contents(tune(tmp_path / "fresh", base, dataset, **changes))
    assert "starts anew" not in capsys.readouterr().err
    assert sorted(path.relative_to(checkpoints) for path in checkpoints.rglob("*")) == before


def test_checkpoint_of_another_number_of_threads_is_not_used(tmp_path, base, dataset, killed, capsys, monkeypatch):
    """It decides the last digits of a wide product, so the loss curve names it."""
    folder = Path(shutil.copytree(killed, tmp_path / "killed"))
    before = list((folder / "checkpoints").iterdir())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    tune(folder, base, dataset, **KILLED)
    said = capsys.readouterr().err
    assert "starts anew" in said
    assert "resumes" not in said
    assert list((folder / "checkpoints").iterdir()) == before
    assert {(line["processes"], line["threads"]) for line in curve(folder / "train_loss.csv")} == {(1, 3)}


def test_fingerprint_depends_on_parameters_base_and_dataset_and_not_on_places(tmp_path, base, dataset):
    section = params.Finetune(**SETTINGS)
    key = checkpoints_module.fingerprint(section, base, dataset, "float32")
    assert len(key) == 32
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (base, dataset)]
    (copies[1] / ".snakemake_timestamp").touch()
    assert checkpoints_module.fingerprint(section, *copies, "float32") == key
    assert checkpoints_module.fingerprint(section, base, dataset, "bfloat16") != key
    assert checkpoints_module.fingerprint(section, base, dataset, "float32", world=2) != key
    assert checkpoints_module.fingerprint(section, base, dataset, "float32", threads=2) != key
    assert checkpoints_module.fingerprint(section, base, dataset, "float32", packed=True) != key
    assert checkpoints_module.fingerprint(params.Finetune(**{**SETTINGS, "seed": 1}), base, dataset, "float32") != key
    for folder, name in zip(copies, ("config.json", "prompt.json"), strict=True):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text + " ", encoding="utf-8")
        assert checkpoints_module.fingerprint(section, *copies, "float32") != key
        (folder / name).write_text(text, encoding="utf-8")
    assert checkpoints_module.fingerprint(section, *copies, "float32") == key
