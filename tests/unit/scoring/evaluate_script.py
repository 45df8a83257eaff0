"""What the tests of the script evaluate share: datasets and exports for it, and the script itself."""

import csv
import json
import shutil
from pathlib import Path

import torch
from tiny import write_params

from scripts import evaluate, prepare
from slmake import params
from slmake.export import builder

TONES = ("sadness", "joy", "fear", "surprise")


def make_dataset(folder: Path, base: Path, rows: list[dict], **changes: object) -> Path:
    """`prepare`'s output for other rows or parameters."""
    folder.mkdir(parents=True)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    given = {"source": str(folder / "rows.json"), **changes}
    file = write_params(
        folder / "params.yaml", all={"stages": ["finetune"]}, prepare=given
    )  # an empty test split may pass
    arguments = ["--params", file, "--base", base, "--output", folder / "dataset", "--report", folder / "report.json"]
    prepare.main([str(argument) for argument in arguments])
    return folder / "dataset"


def export(model: Path, folder: Path, precision: str) -> Path:
    """The model as ONNX."""
    section = params.Quantize(precision=precision, algo_config="rtn", matmul_mixed_precision=None)
    folder.mkdir(parents=True)
    builder.export(section, model, folder, folder.parent / "cache")
    return folder


def random_adapter(base: Path, folder: Path, rank: int = 4):
    """A LoRA adapter of random weights on a base, saved in `folder`; returns PEFT's model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    model.save_pretrained(folder)
    return model


def merged_adapter(base: Path, folder: Path, rank: int = 4) -> dict[str, Path]:
    """A base, a random adapter on it, and the merge of both by PEFT, as the script's models; the last two lie in `folder`."""
    model = random_adapter(base, folder / "adapter", rank)
    shutil.copytree(base, folder / "merged")
    model.merge_and_unload().save_pretrained(folder / "merged")
    return {"base": base, "adapter": folder / "adapter", "merged": folder / "merged"}


def run(
    folder: Path,
    dataset: Path,
    precision: str = "int4",
    models: dict | None = None,
    finetune: dict | None = None,
    merge: dict | None = None,
    **section: object,
) -> Path:
    """Run the script in this process; returns the folder of its outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "max_samples": None,
        "max_new_tokens": None,
        "batch_size": 32,
        "latency_rows": 2,
        "bootstrap_samples": 200,
        **section,
    }
    quantization = {"precision": precision, "calibration": "none", "matmul_mixed_precision": None, "int8_nodes": []}
    others = {"finetune": finetune or {}, "merge": merge or {}}
    file = write_params(folder / "params.yaml", evaluate=settings, quantize=quantization, **others)
    arguments = ["--params", file, "--dataset", dataset]
    for name, path in (models or {}).items():
        arguments += [f"--{name}", path]
    for name, file in (
        ("metrics", "metrics.json"),
        ("benchmark", "benchmark.json"),
        ("predictions", "predictions.csv"),
    ):
        arguments += [f"--{name}", folder / file]
    evaluate.main([str(argument) for argument in arguments])
    return folder


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))
