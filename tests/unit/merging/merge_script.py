"""What the tests of the script merge share: its call, adapters for it, and the model's logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_params

from scripts import merge

IDS = torch.arange(2, 42).reshape(2, 20)


def load(folder: Path, dtype=torch.float32):
    """A model of transformers; missing or unexpected tensors fail the test."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def make_adapter(base: Path, folder: Path, std: float = 0.1, **config: object) -> Path:
    """A PEFT adapter with random A and B for a base model; the seed is fixed."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    torch.manual_seed(13)
    peft = get_peft_model(load(base), LoraConfig(**settings))
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=std)
    peft.save_pretrained(folder)
    (folder / "README.md").unlink()
    return folder


def run(tmp_path: Path, base: Path, adapter: Path, finetune: dict | None = None, **section: object) -> Path:
    """Run the script in this process; returns the merged folder."""
    settings = {"dtype": "auto", "onto": "full_precision", **section}
    params = write_params(tmp_path / "params.yaml", merge=settings, finetune=finetune or {})
    target = tmp_path / "build" / "merged"
    arguments = ["--params", params, "--base", base, "--adapter", adapter, "--output", target]
    merge.main([str(argument) for argument in arguments])
    return target


def refused(tmp_path: Path, capsys, *arguments: object, **section: object) -> str:
    """The script's error; it exits with 1 and leaves nothing behind."""
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, *arguments, **section)
    assert caught.value.code == 1
    assert list((tmp_path / "build").iterdir()) == []
    message = capsys.readouterr().err
    return message[message.index("merge: error: ") :]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits.float()


def edited(adapter: Path, folder: Path, change=None, **config: object) -> Path:
    """A copy of an adapter with changed tensors and configuration."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **config}), encoding="utf-8")
    if change:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
