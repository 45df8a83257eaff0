"""What the tests of the script finetune share: its call, its outputs, and datasets for it."""

import csv
import json
from pathlib import Path

import pytest
from tiny import make_rows, write_params

from scripts import finetune, prepare

SETTINGS = {
    "method": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "compute_dtype": "float32",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "num_train_epochs": 2.0,
    "max_steps": None,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "group_by_length": True,
    "max_grad_norm": 1.0,
    "eval_steps": 4,
    "logging_steps": 1,
    "save_steps": 1000,
    "early_stopping_patience": 0,
    "early_stopping_threshold": 0.0,
    "qat": "none",
    "seed": 42,
    "data_seed": 42,
}
FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "train_loss.csv", "eval_loss.csv")


def command(folder: Path, base: Path, dataset: Path, checkpoints: Path | None = None, **changes: object) -> list[str]:
    """Arguments of the script, with its parameter file written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {
        "params": write_params(folder / "params.yaml", finetune={**SETTINGS, **changes}),
        "base": base,
        "dataset": dataset,
        "output": folder / "adapter",
        "train-loss": folder / "train_loss.csv",
        "eval-loss": folder / "eval_loss.csv",
        "checkpoints": checkpoints or folder / "checkpoints",
    }
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))]


def tune(folder: Path, base: Path, dataset: Path, checkpoints: Path | None = None, **changes: object) -> Path:
    """Run the script in this process; returns the folder of its outputs."""
    finetune.main(command(folder, base, dataset, checkpoints, **changes))
    return folder


def refused(capsys, folder: Path, *arguments: Path, **changes: object) -> str:
    """The script's error; it exits with 1 and leaves nothing but the parameter file."""
    with pytest.raises(SystemExit) as caught:
        tune(folder, *arguments, **changes)
    assert caught.value.code == 1
    assert [path.name for path in folder.iterdir()] == ["params.yaml"]
    message = capsys.readouterr().err
    return message[message.index("finetune: error: ") :]


def curve(path: Path) -> list[dict[str, float]]:
    """A loss curve as numbers."""
    with open(path, newline="", encoding="utf-8") as handle:
        return [{key: float(value) for key, value in line.items()} for line in csv.DictReader(handle)]


def contents(folder: Path) -> dict[str, bytes]:
    """The four outputs' bytes."""
    return {name: (folder / name).read_bytes() for name in FILES}


def make_dataset(folder: Path, base: Path, rows: int = 96, **changes: object) -> Path:
    """`prepare`'s output for other parameters."""
    folder.mkdir(parents=True)
    (folder / "rows.json").write_text(json.dumps(make_rows(rows)), encoding="utf-8")
    file = write_params(folder / "params.yaml", prepare={"source": str(folder / "rows.json"), **changes})
    arguments = ["--params", file, "--base", base, "--output", folder / "dataset", "--report", folder / "report.json"]
    prepare.main([str(argument) for argument in arguments])
    return folder / "dataset"


def plain_loss(model, dataset: Path, split: str = "eval") -> float:
    """Mean cross entropy per answer token, row by row, from full logits."""
    import pyarrow.parquet
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for row in pyarrow.parquet.read_table(dataset / f"{split}.parquet").to_pylist():
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logits = model(input_ids=ids).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            total, count = total + loss.item(), count + int((labels[1:] != -100).sum())
    return total / count
