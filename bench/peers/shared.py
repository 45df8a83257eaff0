"""What the peers share: their command line, their hyper-parameters, and the folder of a merged model."""

import argparse
import json
from pathlib import Path


def arguments(doc: str) -> argparse.Namespace:
    """`--base` model folder, `--rows` JSON Lines, `--hyper` JSON of hyper-parameters, `--output` folder, `--merge`."""
    parser = argparse.ArgumentParser(description=doc)
    for name in ("base", "rows", "hyper", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--merge", action="store_true", help="also write the merged model")
    args = parser.parse_args()
    args.hyper = json.loads(args.hyper.read_text(encoding="utf-8"))
    return args


def training_arguments(hyper: dict, output: Path) -> dict:
    """The fields of transformers' TrainingArguments that say the same as the pipeline's parameters."""
    import torch

    return {
        "output_dir": str(output / "trainer"),
        "max_steps": hyper["steps"],
        "per_device_train_batch_size": hyper["batch"],
        "learning_rate": hyper["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": hyper["warmup_steps"],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "seed": hyper["seed"],
        "use_cpu": not torch.cuda.is_available(),
    }


def lora(hyper: dict):
    """PEFT's configuration of the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=hyper["r"],
        lora_alpha=hyper["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def save(model, tokenizer, output: Path, merge: bool) -> None:
    """The adapter, and the merged model if asked for."""
    model.save_pretrained(output / "adapter")
    if merge:
        model.merge_and_unload().save_pretrained(output / "merged")
        tokenizer.save_pretrained(output / "merged")
