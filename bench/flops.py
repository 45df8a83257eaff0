"""How much arithmetic a LoRA training step has to do, and how fast this machine does that arithmetic and nothing else.

    python -m bench.flops --base build/base --rank 64 --rows 256 --labels 24 --dtype bfloat16

Counted per token whose state has to be computed (2 FLOP per multiplication and addition), for a frozen base. What all rows of a
batch begin with has one state for all of them, and what stands behind a row's last prediction needs none (slmake/training/shared_prefix.py).

- every linear layer of the decoder: 2 per weight forward, 2 backward for the gradient of its input, none for its weights. The
  first layer's q, k and v need no gradient of their input: nothing below them is trained;
- LoRA's matrices: 6 per weight (forward, gradient of the input, gradient of the weights);
- attention: the two products of each pair of tokens that causality leaves, forward once and backward twice;
- the output head: 4 per weight, at the positions that have a label, and nowhere else.

Norms, activations, rotary embedding, softmax, the optimizer and padding are not counted: they are not products, or need not be done.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np


def linear_shapes(config: dict) -> list[tuple[str, int, int]]:
    """Name, inputs and outputs of a Llama-like decoder layer's linear layers, from its config.json; Phi-3's are fused."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    kv = head * config.get("num_key_value_heads", heads)
    inner = config["intermediate_size"]
    if config.get("model_type") == "phi3":
        fused = [("qkv", width, heads * head + 2 * kv), ("o", heads * head, width)]
        return [*fused, ("gate_up", width, 2 * inner), ("down", inner, width)]
    return [
        ("q", width, heads * head),
        ("k", width, kv),
        ("v", width, kv),
        ("o", heads * head, width),
        ("gate", width, inner),
        ("up", width, inner),
        ("down", inner, width),
    ]


def step_flops(config: dict, rank: int, tokens: int, lengths: np.ndarray, labels: int) -> dict[str, int]:
    """FLOP of one optimizer step, or of several.

    Args:
        config: the model's config.json.
        rank: LoRA's, on every linear layer of the decoder.
        tokens: states that have to be computed, over all rows.
        lengths: tokens of each row up to its last prediction.
        labels: positions that have a label, over all rows.

    Returns:
        FLOP by kind: base, lora, attention, head.
    """
    shapes, layers = linear_shapes(config), config["num_hidden_layers"]
    weights = sum(inputs * outputs for _, inputs, outputs in shapes)
    first = sum(inputs * outputs for name, inputs, outputs in shapes if name in "qkv")
    around = sum(inputs + outputs for _, inputs, outputs in shapes)
    first_around = sum(inputs for name, inputs, _ in shapes if name in "qkv")
    pairs = int(np.sum(np.asarray(lengths, dtype=np.int64) * (np.asarray(lengths, dtype=np.int64) + 1)) // 2)
    attended = config["num_attention_heads"] * (
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )
    return {
        "base": tokens * (4 * weights * layers - 2 * first),
        "lora": tokens * rank * (6 * around * layers - 2 * first_around),
        "attention": 3 * 4 * pairs * attended * layers,
        "head": 4 * labels * config["hidden_size"] * config["vocab_size"],
    }


def products_rate(config: dict, rank: int, rows: int, labels: int, dtype, repeats: int = 5) -> float:
    """FLOP/s of the products of a training step of `rows` tokens and nothing else, in their own shapes; the best of some repeats."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def tensor(*shape: int):
        return torch.randn(*shape, dtype=dtype, device=device)

    shapes = linear_shapes(config)
    work = [
        (
            tensor(rows, inputs),
            tensor(outputs, inputs),
            tensor(rank, inputs),
            tensor(outputs, rank),
            tensor(rows, outputs),
        )
        for _ in range(config["num_hidden_layers"])
        for _, inputs, outputs in shapes
    ]
    head, state, slope = (
        tensor(config["vocab_size"], config["hidden_size"]),
        tensor(labels, config["hidden_size"]),
        tensor(labels, config["vocab_size"]),
    )
    count = sum(4 * w.numel() * rows + 6 * rows * (a.numel() + b.numel()) for _, w, a, b, _ in work)
    count += 4 * labels * head.numel()
    best = float("inf")
    with torch.inference_mode():
        for _ in range(repeats):
            began = time.perf_counter()
            for x, w, a, b, g in work:
                inner = x @ a.t()
                (x @ w.t()).addmm_(inner, b.t())
                back = g @ b
                (g @ w).addmm_(back, a)
                back.t() @ x
                g.t() @ inner
            state @ head.t()
            slope @ head
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    return count / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the model's folder")
    parser.add_argument("--rank", type=int, required=True, help="LoRA's rank")
    parser.add_argument("--rows", type=int, required=True, help="tokens of a step")
    parser.add_argument("--labels", type=int, required=True, help="labelled positions of a step")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    args = parser.parse_args()
    import torch

    from bench.measure import matmul_rate

    config = json.loads((args.base / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, args.dtype)
    rate = products_rate(config, args.rank, args.rows, args.labels, dtype)
    print(json.dumps({"square": matmul_rate(dtype), "shapes": rate}), flush=True)


if __name__ == "__main__":
    main()
