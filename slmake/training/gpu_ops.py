"""A decoder layer's small operations on a GPU: RMSNorm, rotary embedding, gated SiLU, the split of Phi's joint projections.

transformers computes each of them as a row of operations that read and write a whole activation, and a step then waits for
their launches. A Triton kernel of Liger's (Hsu et al. 2024, arXiv:2410.10989), or our own, is one launch. A module or function is
replaced only where the replacement gives the same result on a probe; without Liger or a compiler for Triton, nothing is.
"""

import subprocess
import sys
import types
from functools import partial
from importlib.util import find_spec

import torch

from slmake.training.fused_ops import keep_if_same, replace_norm, replace_rotary
from slmake.training.probe import close

# What is added to a norm's weight, and in which type the norm is taken: Llama's way and Gemma's.
NORMS = ((0.0, "llama"), (1.0, "gemma"))
# What a kernel ends with where Triton has no compiler, or where it does not take the arguments.
CANNOT = (TypeError, RuntimeError, OSError, subprocess.SubprocessError)


def fuse(model) -> dict[str, int]:
    """Replace RMSNorm, rotary embedding and gated SiLU of a transformers model whose weights are on a GPU, in place.

    Returns:
        How many of each were replaced: {"norm": modules, "rotary": functions, "mlp": modules, "attention": modules}; {} where Liger
        cannot run.
    """
    if next(model.parameters()).device.type != "cuda" or not (find_spec("liger_kernel") and find_spec("triton")):
        return {}
    from liger_kernel.ops.rope import LigerRopeFunction

    device, count = model.device, {"norm": 0, "rotary": 0, "mlp": 0, "attention": 0}
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            count["norm"] += _fuse_norm(module)
        elif hasattr(module, "down_proj"):
            count["mlp"] += _fuse_mlp(module, device, model.dtype)
    attentions = [module for module in model.modules() if hasattr(module, "q_proj") or hasattr(module, "qkv_proj")]
    for source in {type(module).__module__ for module in attentions}:
        count["rotary"] += replace_rotary(sys.modules[source], device, LigerRopeFunction.apply, CANNOT, 1e-4, 1e-5)
    count["attention"] = _split_projections(model, [module for module in attentions if hasattr(module, "qkv_proj")])
    return count


def _split_projections(model, attentions: list) -> int:
    """Use `_attend` in all of some attention layers, if the whole model then gives the same logits; returns in how many."""

    def change() -> None:
        for module in attentions:
            module.forward = types.MethodType(_attend, module)

    def undo() -> None:
        for module in attentions:
            del module.forward

    # An AttributeError: another architecture's layer of that name.
    return len(attentions) if attentions and keep_if_same(model, change, undo, (*CANNOT, AttributeError)) else 0


def _attend(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
    """Phi-3's attention, with queries, keys and values split once.

    transformers takes a slice for each, and the gradient of each slice is a tensor of all three: filled, copied into, and added up.
    """
    if past_key_values is not None:
        return type(self).forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = self.config
    widths = [heads * self.head_dim for heads in (config.num_attention_heads, *[self.num_key_value_heads] * 2)]
    query, key, value = (
        states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        for states in self.qkv_proj(hidden_states).split(widths, dim=-1)
    )
    query, key = sys.modules[type(self).__module__].apply_rotary_pos_emb(query, key, *position_embeddings)
    kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
    kwargs |= {"sliding_window": getattr(config, "sliding_window", None)}
    states, weights = ALL_ATTENTION_FUNCTIONS[config._attn_implementation](
        self, query, key, value, attention_mask, **kwargs
    )
    return self.o_proj(states.flatten(-2)), weights


def _fuse_norm(module) -> int:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if epsilon is None:
        return 0

    def norm(offset, casting, self, x):
        return LigerRMSNormFunction.apply(x, self.weight, epsilon, offset, casting, False)

    try:
        return int(any(replace_norm(module, partial(norm, *way)) for way in NORMS))
    except CANNOT:
        return 0


def _gated(self, x):
    if hasattr(self, "gate_up_proj"):
        from slmake.training.gated_silu import GatedSiLU

        return self.down_proj(GatedSiLU.apply(self.gate_up_proj(x)))
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


@torch.no_grad()
def _fuse_mlp(module, device, dtype) -> int:
    first = getattr(module, "gate_proj", getattr(module, "gate_up_proj", None))
    if not hasattr(first, "in_features"):  # experts, whose weights are one tensor
        return 0
    probe = torch.linspace(-2, 3, 4 * first.in_features, device=device).view(1, 4, -1).to(dtype)
    try:
        if not close(_gated(module, probe), module(probe), 0.02):
            return 0
    except CANNOT:
        return 0
    module.forward = types.MethodType(_gated, module)
    return 1
