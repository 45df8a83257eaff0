"""LoRA's linear layer as one differentiable operation, optionally trained through the weights it will be quantized to.

PEFT computes the base product, the update, its scaling and the sum as separate operations that each read and write a
full activation. Here they are one: y = x W' + s (x A') B', with the gradients written out (Hu et al. 2021,
arXiv:2106.09685). The parameters stay PEFT's own; only `forward` of its layers is replaced.

Quantization-aware training (`finetune.qat`) goes one step further: forward and backward use Q(W + s B A), the weights as
round-to-nearest quantization will leave them, and the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432)
passes the gradient on to A and B. The base stays frozen, so this costs no gradient of W.
"""

import types

import numpy as np
import torch


class LoraLinear(torch.autograd.Function):
    """y = x W' + s (x A') B', or y = x Q' where a quantized weight Q stands for W + s B A.

    Shapes: x [..., in], weight [out, in], bias [out] or None, a [r, in], b [out, r], quantized [out, in] or None.
    The adapter's matrices may be float32 over a bfloat16 base; products are taken in x's type.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling, quantized):
        flat = x.reshape(-1, x.shape[-1])
        a_, b_ = a.to(x.dtype), b.to(x.dtype)
        inner = flat @ a_.t()
        used = weight if quantized is None else quantized
        y = flat @ used.t()
        if quantized is None:
            y.addmm_(inner, b_.t(), alpha=scaling)
        if bias is not None:
            y += bias
        ctx.save_for_backward(flat, inner, used, a_, b_)
        ctx.scaling, ctx.quantized, ctx.types = scaling, quantized is not None, (a.dtype, b.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        flat, inner, used, a, b = ctx.saved_tensors
        grad_flat = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad_flat @ b).mul_(ctx.scaling)
        grad_a = (grad_inner.t() @ flat).to(ctx.types[0])
        grad_b = (grad_flat.t() @ inner).mul_(ctx.scaling).to(ctx.types[1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_flat @ used
            if not ctx.quantized:
                grad_x.addmm_(grad_inner, a)
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        return grad_x, None, None, grad_a, grad_b, None, None


def _forward(self, x, *args, **kwargs):
    adapter = self.active_adapters[0]
    base = self.get_base_layer()
    a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
    return LoraLinear.apply(x, base.weight, base.bias, a, b, self.scaling[adapter], self.fake_quantized)


def lora_layers(peft) -> dict[str, torch.nn.Module]:
    """PEFT's LoRA layers over plain linear ones, by module name."""
    from peft.tuners.lora.layer import Linear

    return {
        name: module
        for name, module in peft.named_modules()
        if type(module) is Linear and type(module.get_base_layer()) is torch.nn.Linear
    }


def fuse(peft) -> int:
    """Replace the forward of every plain LoRA layer without dropout; returns how many were replaced."""
    count = 0
    for module in lora_layers(peft).values():
        if isinstance(module.lora_dropout[module.active_adapters[0]], torch.nn.Identity):
            module.fake_quantized = None
            module.forward = types.MethodType(_forward, module)
            count += 1
    return count


def round_to_nearest(weight: torch.Tensor, bits: int, block_size: int) -> torch.Tensor:
    """Symmetric round-to-nearest quantization, dequantized again, as the model builder's `rtn` does it.

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
    """Keeps the LoRA layers' quantized stand-ins for W + s B A up to date.

    With a rate below 1, every step quantizes a random share of the layers only (Quant-Noise, Fan et al. 2020,
    arXiv:2004.07320): the model then works both quantized and not.
    """

    def __init__(self, peft, block_size: int, target_modules: str | list[str], rate: float, seed: int):
        """Choose the layers: `all-linear`, or those whose last name is in `target_modules`.

        Layers that will keep 8 bits are best left out: their rounding is too small to be worth simulating.
        """
        self.block_size, self.rate, self.seed = block_size, rate, seed
        every = target_modules == "all-linear"
        self.layers = {
            n: module for n, module in lora_layers(peft).items() if every or n.rsplit(".", 1)[-1] in target_modules
        }

    @torch.no_grad()
    def refresh(self, step: int | None) -> None:
        """Quantize W + s B A anew, before optimizer step `step`; None quantizes every one (to evaluate)."""
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
