"""SiLU(gate) * up of one tensor that holds both halves, as Triton kernels: Phi's `gate_up_proj`.

Liger's kernel takes two contiguous tensors, so each half would be copied, and their gradients be joined by another copy.
"""

import torch
import triton
import triton.language as tl

COLUMNS = 2048  # of a program


@triton.jit
def _forward(both, out, width, block: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(both + row * 2 * width + column, mask=inside).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + column, mask=inside)
    # SiLU is rounded to the tensor's type before the product, as in transformers.
    tl.store(out + row * width + column, (gate * tl.sigmoid(gate)).to(up.dtype) * up, mask=inside)


@triton.jit
def _backward(grad, both, out, width, block: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    given = tl.load(grad + row * width + column, mask=inside).to(tl.float32)
    gate = tl.load(both + row * 2 * width + column, mask=inside).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + column, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(out + row * 2 * width + column, given * up * (silu * (1 - sigmoid) + sigmoid), mask=inside)
    tl.store(out + row * 2 * width + width + column, given * silu, mask=inside)


class GatedSiLU(torch.autograd.Function):
    """[..., 2 * width], gate before up, to [..., width]."""

    @staticmethod
    def forward(ctx, both):
        width = both.shape[-1] // 2
        flat = both.reshape(-1, 2 * width)
        out = flat.new_empty(len(flat), width)
        _forward[(len(flat), triton.cdiv(width, COLUMNS))](flat, out, width, block=COLUMNS)
        ctx.save_for_backward(flat)
        ctx.shape = both.shape
        return out.view(*both.shape[:-1], width)

    @staticmethod
    def backward(ctx, grad):
        (flat,) = ctx.saved_tensors
        width = flat.shape[1] // 2
        grad, out = grad.reshape(-1, width).contiguous(), torch.empty_like(flat)
        _backward[(len(flat), triton.cdiv(width, COLUMNS))](grad, flat, out, width, block=COLUMNS)
        return out.view(ctx.shape)
