"""A decoder layer's small operations with their gradients written out: attention, rotary embedding, RMSNorm.

On a CPU a training step spends as long between the matrix products as in them: autograd records every factor and sum of
these operations and goes back through a full activation for each. Here each operation is one node. A module or function
is replaced only where the replacement gives the same result on a probe.
"""

import sys
import types
from collections.abc import Callable
from functools import partial

import torch

from slmake.training.probe import close

SHORT = 256  # tokens; longer sequences use the library's kernel, which does not store the scores of all pairs


class RMSNorm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x²) + eps), the root taken in float32 (Zhang and Sennrich 2019, arXiv:1910.07467).

    Shapes: x [..., width], weight [width]; weight is frozen.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return torch.mul(wide, inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, inverse, weight = ctx.saved_tensors
        grad_hat, wide = torch.mul(grad, weight).float(), x.float()
        along = torch.linalg.vecdot(grad_hat, wide).unsqueeze(-1).mul_(inverse**3).div_(-x.shape[-1])
        return grad_hat.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None


class Rotary(torch.autograd.Function):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated against each other as in Llama.

    Shapes: x [batch, heads, time, width], cos and sin [batch or 1, 1, time, width].
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        return _rotated(grad, *ctx.saved_tensors, -1), None, None


def _rotated(x, cos, sin, sign: int):
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x[..., :half], cos, out=out[..., :half]).addcmul_(x[..., half:], sin, value=-sign)
    torch.mul(x[..., half:], cos, out=out[..., half:]).addcmul_(x[..., :half], sin, value=sign)
    return out


class Attention(torch.autograd.Function):
    """softmax(q k' s + mask) v with grouped key and value heads, without a copy of them for each query head.

    Shapes: q [batch, heads, time, width], k and v [batch, kv_heads, time, width], mask [batch or 1, 1, time, time] of
    the same type, 0 or -inf. Returns [batch, time, heads, width].
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scaling):
        batch, heads, time, width = q.shape
        groups = batch * k.shape[1]
        q = q.reshape(groups, -1, width)
        k, v = k.reshape(groups, time, width), v.reshape(groups, time, width)
        scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, time, time).mul_(scaling).add_(mask)
        weights = torch.softmax(scores, -1).view(groups, -1, time)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scaling, ctx.shape = scaling, (batch, heads, time, width)
        return torch.bmm(weights, v).view(ctx.shape).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx, grad):
        q, k, v, weights = ctx.saved_tensors
        batch, _, time, width = ctx.shape
        grad = grad.transpose(1, 2).reshape(q.shape)
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
        grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q)
        keys = (batch, -1, time, width)
        return grad_q.view(ctx.shape), grad_k.view(keys), grad_v.view(keys), None, None


def short_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """An attention function for transformers: `Attention` for short sequences on a CPU, otherwise the library's own."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    time = query.shape[2]
    causal = attention_mask is None and getattr(module, "is_causal", True)
    if (
        dropout
        or time > SHORT
        or key.shape[2] != time
        or query.device.type != "cpu"
        or not (causal or attention_mask is not None)
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if causal:
        mask = torch.full((1, 1, time, time), -torch.inf, dtype=query.dtype).triu_(1)
    elif attention_mask.dtype == torch.bool:
        mask = torch.zeros(attention_mask.shape, dtype=query.dtype).masked_fill_(~attention_mask, -torch.inf)
    else:
        mask = attention_mask
    if kwargs.get("sliding_window"):  # padding behind it sees nothing, and a softmax of nothing is NaN
        mask = mask.masked_fill(mask.isneginf().all(-1, keepdim=True), 0.0)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return Attention.apply(query, key, value, mask, scaling), None


def fuse(model) -> dict[str, int]:
    """Replace attention, rotary embedding and RMSNorm of a transformers model on the CPU, in place.

    Returns:
        How many of each were replaced: {"attention": 0 or 1, "rotary": modules, "norm": modules}.
    """
    count = {"attention": 0, "rotary": 0, "norm": 0}
    if next(model.parameters()).device.type != "cpu":
        return count
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            count["norm"] += hasattr(module, "variance_epsilon") and replace_norm(module, _norm_forward)
    for source in {type(module).__module__ for module in model.modules() if hasattr(module, "q_proj")}:
        count["rotary"] += replace_rotary(sys.modules[source], torch.device("cpu"), _rotary)
    count["attention"] = _fuse_attention(model)
    return count


def _fuse_attention(model) -> int:
    """Use `short_attention` if the whole model then gives the same logits, also for a padded row."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != "sdpa":
        return 0
    AttentionInterface.register("slmake_short", short_attention)
    AttentionMaskInterface.register("slmake_short", sdpa_mask)
    # A RuntimeError: shapes that `Attention` does not have, such as values of another width than the keys'.
    use = model.set_attn_implementation
    return int(keep_if_same(model, partial(use, "slmake_short"), partial(use, "sdpa"), (RuntimeError,)))


def keep_if_same(model, change: Callable, undo: Callable, cannot: tuple[type[Exception], ...]) -> bool:
    """Make a change to a model, and undo it unless the model then gives the same logits; returns whether it stays.

    Args:
        cannot: what the model ends with where the change does not fit it.
    """
    expected = _probe_logits(model)
    change()
    half = model.get_input_embeddings().weight.dtype.itemsize == 2
    try:
        same = close(_probe_logits(model), expected, 0.05 if half else 1e-3)
    except cannot:
        same = False
    if not same:
        undo()
    return same


@torch.no_grad()
def _probe_logits(model) -> torch.Tensor:
    """Logits at the real tokens of two rows, the second one padded."""
    ids = torch.arange(5, 21, device=model.device).view(2, 8) * 7 % model.get_input_embeddings().num_embeddings
    mask = (torch.arange(8) < torch.tensor([[8], [5]])).long().to(model.device)
    was_training = model.training
    model.eval()
    try:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    finally:
        model.train(was_training)


def _norm_forward(self, x):
    return RMSNorm.apply(x, self.weight, self.variance_epsilon)


@torch.no_grad()
def replace_norm(module, forward) -> int:
    """Make `forward(self, x)` the forward of a norm whose weight is frozen, if a probe agrees; returns 0 or 1."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.requires_grad:
        return 0
    probe = torch.linspace(-2, 3, 4 * len(weight), device=weight.device).view(4, -1).to(weight.dtype)
    if not torch.allclose(module(probe), forward(module, probe), rtol=0.01, atol=1e-5):
        return 0
    module.forward = types.MethodType(forward, module)
    return 1


def _rotary(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)


@torch.no_grad()
def replace_rotary(source, device, rotate, cannot=(TypeError, RuntimeError), rtol=1e-5, atol=1e-8) -> int:
    """Make `rotate(q, k, cos, sin)` the rotary embedding of a module for tensors on this type of device, if a probe agrees.

    Args:
        source: a transformers module with `apply_rotary_pos_emb`, or without.
        cannot: what `rotate`, or the library's own function, ends with where it cannot take the probe.
        rtol, atol: how close the probe's results must be, as `torch.allclose` has them.

    Returns:
        1 if it is replaced now or was before, else 0.
    """
    original = getattr(source, "apply_rotary_pos_emb", None)
    devices = getattr(original, "devices", ())
    if original is None or device.type in devices:
        return int(original is not None)

    def rotary(q, k, cos, sin, *args, **kwargs):
        if args or kwargs or cos.shape[-1] != q.shape[-1] or q.device.type != device.type:
            return original(q, k, cos, sin, *args, **kwargs)
        return rotate(q, k, cos, sin)

    angles = torch.linspace(0, 3, 24, device=device).view(1, 3, 8).repeat(1, 1, 2)
    # As a layer hands them over: tokens first in memory.
    q = torch.linspace(-1, 1, 96, device=device).view(1, 3, 2, 16).transpose(1, 2)
    k = torch.linspace(2, -1, 48, device=device).view(1, 3, 1, 16).transpose(1, 2)
    try:
        expected = original(q, k, angles.cos(), angles.sin())
        given = rotary(q.clone(), k.clone(), angles.cos(), angles.sin())  # some kernels write into their inputs
    except cannot:
        return 0
    if not all(map(partial(torch.allclose, rtol=rtol, atol=atol), expected, given)):
        return 0
    rotary.devices = (*devices, device.type)
    source.apply_rotary_pos_emb = rotary
    return 1
