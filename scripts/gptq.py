"""GPTQ: round weights to 4 bits so that the layer's outputs on real prompts change least (Frantar et al. 2022, arXiv:2210.17323).

Plain rounding moves every weight to its nearest level by itself. GPTQ goes column by column and lets the columns that are
still free make up for the error already made, weighted by how the inputs of the layer vary together. The model
builder has no such method; but it rounds to nearest, so weights that already lie where they should end up survive its
rounding unchanged. Those are what `calibrate` writes: an ordinary model folder for the ordinary exporter.
"""

import math
from pathlib import Path

import numpy as np
import torch

from lora import round_to_nearest

LEVELS = 8  # symmetric 4 bits: -8 to 7


def round_with_inputs(
    weight: torch.Tensor, gram: torch.Tensor, block_size: int, damping: float = 0.01
) -> torch.Tensor:
    """Weights that round-to-nearest leaves where GPTQ wants them.

    Args:
        weight: [out, in].
        gram: [in, in], sum over tokens of x x' of the layer's inputs.
        block_size: weights along `in` that share one scale.
        damping: share of the mean diagonal that is added to it.

    Returns:
        float32 [out, in] of multiples of each block's scale, except that each block's largest weight stands half a level
        outside, where it fixes the scale to absmax / 7.5 and is rounded to -8 or 7.
    """
    work = weight.detach().double().clone()
    gram = gram.double().clone()
    width = work.shape[1]
    unused = torch.diagonal(gram) == 0
    gram[unused, unused] = 1.0
    torch.diagonal(gram).add_(damping * torch.diagonal(gram).mean())
    # Upper Cholesky factor of the inverse: row j holds how an error in column j spreads over the columns after it.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    result = torch.empty_like(work)
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        block = work[:, start:end]
        largest, anchor = block.abs().max(dim=1)
        scale = (largest / (LEVELS - 0.5)).float().double()
        scale[scale == 0] = 1.0
        sign = torch.sign(block.gather(1, anchor[:, None]).squeeze(1))
        outer = torch.where(sign < 0, -LEVELS, LEVELS - 1) * scale
        errors = torch.empty_like(block)
        for j in range(end - start):
            column = block[:, j]
            rounded = torch.round(column / scale).clamp_(-LEVELS, LEVELS - 1) * scale
            here = anchor == j
            rounded = torch.where(here, outer, rounded)
            errors[:, j] = (column - rounded) / factor[start + j, start + j]
            if j + 1 < end - start:
                block[:, j + 1 :] -= errors[:, j : j + 1] * factor[start + j, start + j + 1 : end]
            result[:, start + j] = torch.where(here, sign * (LEVELS - 0.5) * scale, rounded)
        work[:, end:] -= errors @ factor[start:end, end:]
    return result.float()


def gram_matrices(model, names: list[str], batches) -> dict[str, torch.Tensor]:
    """Sum of x x' over all real tokens for the inputs x of some linear modules, in one pass over the prompts.

    Modules that read the same tensor (q, k and v; gate and up) share one matrix.

    Args:
        model: a transformers causal language model.
        batches: dicts with input_ids int64 [batch, time] and lengths int64 [batch], padded on the right.

    Returns:
        float32 [in, in] by module name.
    """
    sums: dict[str, torch.Tensor] = {}
    owner: dict[str, str] = {}
    seen: dict[str, object] = {"input": None, "name": ""}
    real = None

    def watch(name: str):
        def before(_module, arguments):
            if arguments[0] is seen["input"]:
                owner[name] = seen["name"]
                return
            seen["input"], seen["name"] = arguments[0], name
            owner[name] = name
            x = arguments[0][real].float()
            product = x.t() @ x
            sums[name] = sums[name].add_(product) if name in sums else product

        return before

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in names]
    try:
        with torch.inference_mode():
            for batch in batches:
                ids = batch["input_ids"]
                real = torch.arange(ids.shape[1])[None, :] < batch["lengths"][:, None]
                seen["input"] = None
                model(input_ids=ids, attention_mask=real.long(), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[owner[name]] for name in names}
