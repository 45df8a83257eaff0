"""Quantization-aware training (`finetune.qat`).

Forward and backward use Q(W + s B A), the merged weights after round-to-nearest quantization. The straight-through
estimator (Bengio et al. 2013, arXiv:1308.3432) passes the gradient to A and B. The base stays frozen, so this costs no
gradient of W.
"""

import numpy as np
import torch

from slmake.training.lora_linear import lora_layers


def round_to_nearest(weight: torch.Tensor, bits: int, block_size: int) -> torch.Tensor:
    """Symmetric round-to-nearest quantization and dequantization, as the model builder's `rtn` does it.

    Blocks of `block_size` weights along the input share the scale absmax / (2^(bits-1) - 0.5); levels run from -2^(bits-1)
    to 2^(bits-1) - 1.

    Args:
        weight: [out, in], any floating-point type; `in` need not be a multiple of the block.

    Returns:
        A new tensor of the same shape and type.
    """
    top = 2 ** (bits - 1)
    out, width = weight.shape
    padding = -width % block_size
    padded = torch.nn.functional.pad(weight, (0, padding)) if padding else weight
    blocks = padded.reshape(-1, block_size).double()
    scale = blocks.abs().amax(dim=1, keepdim=True).mul_(2).div_(2 * top - 1)
    scale.masked_fill_(scale == 0, 1.0)
    rounded = torch.div(blocks, scale).round_().clamp_(-top, top - 1).mul_(scale.float())
    return rounded.reshape(out, width + padding)[:, :width].to(weight.dtype)


class QuantizationAware:
    """Updates the quantized weights Q(W + s B A) that LoRA layers compute with.

    With a rate below 1, every step quantizes a random share of the layers only (Quant-Noise, Fan et al. 2020,
    arXiv:2004.07320), so that the model works both with and without quantization.
    """

    def __init__(self, peft, block_size: int, target_modules: str | list[str], rate: float, seed: int):
        """Choose from the layers that `lora_linear.fuse` has replaced: `all-linear`, or those whose last name is in
        `target_modules`.

        Leave out layers that will have 8 bits: their rounding is too small to be worth simulating.
        """
        self.block_size, self.rate, self.seed = block_size, rate, seed
        every = target_modules == "all-linear"
        self.layers = {
            name: module
            for name, module in lora_layers(peft).items()
            if hasattr(module, "fake_quantized") and (every or name.rsplit(".", 1)[-1] in target_modules)
        }

    @torch.no_grad()
    def refresh(self, step: int | None) -> None:
        """Quantize W + s B A again, before optimizer step `step`; None quantizes every layer (to evaluate)."""
        chosen = np.ones(len(self.layers), dtype=bool)
        if step is not None and self.rate < 1:
            chosen = np.random.default_rng([self.seed, step]).random(len(self.layers)) < self.rate
        for module, quantize in zip(self.layers.values(), chosen, strict=True):
            module.fake_quantized = None
            if not quantize:
                continue
            adapter, base = module.active_adapters[0], module.get_base_layer().weight
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            merged = torch.addmm(base.float(), b.float(), a.float(), alpha=module.scaling[adapter])
            module.fake_quantized = round_to_nearest(merged, 4, self.block_size).to(base.dtype)
