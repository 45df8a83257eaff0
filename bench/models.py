"""Models with random weights of any size, written shard by shard, and adapters for them.

Nothing bigger than one tensor is in memory, so that a seven-billion-parameter model can be made on a small machine.
"""

import json
import math
import struct
from pathlib import Path

import numpy as np

# hidden, intermediate, layers, heads, key-value heads, vocabulary
SIZES = {
    "10m": (256, 704, 8, 4, 2, 8192),
    "30m": (448, 1216, 12, 7, 7, 8192),
    "100m": (640, 1728, 18, 10, 10, 16384),
    "300m": (1024, 2816, 22, 16, 8, 32000),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}
SHARD = 2 * 2**30  # bytes
PIECE = 2**22  # values that are drawn at a time


def tensors(size: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Llama model."""
    width, inner, layers, heads, kv, vocabulary = SIZES[size]
    kv_width = width // heads * kv
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, shape in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (kv_width, width),
            "self_attn.v_proj": (kv_width, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }.items():
            shapes[f"{at}.{name}.weight"] = shape
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (width,)
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def parameters(size: str) -> int:
    return sum(math.prod(shape) for shape in tensors(size).values())


def write_model(folder: Path, size: str) -> Path:
    """A bfloat16 Llama of a size of SIZES in Hugging Face layout (without a tokenizer)."""
    from transformers import LlamaConfig

    width, inner, layers, heads, kv, vocabulary = SIZES[size]
    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    shards: list[dict] = [{}]
    for name, shape in tensors(size).items():
        if shards[-1] and sum(2 * math.prod(tensor) for tensor in [*shards[-1].values(), shape]) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    draw, index = np.random.default_rng(7), {}
    for number, shapes in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shapes.items():
            length = 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + length]}
            offset += length
            index[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name, shape in shapes.items():
                count = math.prod(shape)
                for start in range(0, count, PIECE):
                    length = min(PIECE, count - start)
                    # The upper half of a float32 is a bfloat16.
                    values = draw.random(length, dtype=np.float32) - np.float32(0.5)
                    values = 1 + 0 * values if name.endswith("norm.weight") else values * np.float32(0.05)
                    out.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    if len(shards) > 1:
        content = {"metadata": {"total_size": 2 * parameters(size)}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_adapter(folder: Path, size: str, rank: int = 16) -> Path:
    """A PEFT adapter of random weights on every linear layer of such a model."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(7)
    weights = {}
    for name, shape in tensors(size).items():
        if "_proj" in name:
            at = "base_model.model." + name.removesuffix(".weight")
            weights[f"{at}.lora_A.weight"] = torch.randn(rank, shape[1]) * 0.02
            weights[f"{at}.lora_B.weight"] = torch.randn(shape[0], rank) * 0.02
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": modules}), encoding="utf-8")
    return folder
