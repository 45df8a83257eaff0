"""Fixtures of the tests of scoring."""

import shutil
from pathlib import Path

import pytest
import torch
from evaluate_script import export


@pytest.fixture(scope="session")
def taught(tmp_path_factory, base, dataset) -> Path:
    """The tiny base after full training on train and test rows: it knows the answers whatever the processor's last bits, and when to stop."""
    import pyarrow.parquet
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("taught") / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [
        row
        for split in ("train", "test")
        for row in pyarrow.parquet.read_table(dataset / f"{split}.parquet").to_pylist()
    ]
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(200):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.002:
            break
    assert loss.item() < 0.005
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory, taught) -> dict[str, Path]:
    """The taught model as ONNX, in float32 and int4."""
    folder = tmp_path_factory.mktemp("exported")
    return {name: export(taught, folder / name, name) for name in ("fp32", "int4")}
