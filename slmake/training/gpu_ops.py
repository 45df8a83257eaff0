"""A decoder layer's small operations on a GPU, by Liger Kernel's Triton kernels: RMSNorm, rotary embedding, gated SiLU.

transformers computes each of them as a row of operations that read and write a whole activation, and a step then waits for
their launches. A kernel of Liger (Hsu et al. 2024, arXiv:2410.10989) is one launch. A module or function is replaced only
where the replacement gives the same result on a probe; without Liger or a compiler for Triton, nothing is.
"""

import subprocess
import sys
import types
from importlib.util import find_spec

import torch

from slmake.training.probe import close

# What is added to a norm's weight, and in which type the norm is taken: Llama's way and Gemma's.
NORMS = ((0.0, "llama"), (1.0, "gemma"))
# What a kernel ends with where Triton has no compiler, or where it does not take the arguments.
CANNOT = (TypeError, RuntimeError, OSError, subprocess.SubprocessError)


def fuse(model) -> dict[str, int]:
    """Replace RMSNorm, rotary embedding and gated SiLU of a transformers model whose weights are on a GPU, in place.

    Returns:
        How many of each were replaced: {"norm": modules, "rotary": functions, "mlp": modules}; {} where Liger cannot run.
    """
    if next(model.parameters()).device.type != "cuda" or not (find_spec("liger_kernel") and find_spec("triton")):
        return {}
    device, count = model.device, {"norm": 0, "rotary": 0, "mlp": 0}
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            count["norm"] += _fuse_norm(module)
        elif hasattr(module, "down_proj"):
            count["mlp"] += _fuse_mlp(module, device, model.dtype)
    attentions = [module for module in model.modules() if hasattr(module, "q_proj") or hasattr(module, "qkv_proj")]
    for source in {type(module).__module__ for module in attentions}:
        count["rotary"] += _fuse_rotary(sys.modules[source], device)
    return count


@torch.no_grad()
def _fuse_norm(module) -> int:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not hasattr(module, "weight") or epsilon is None or module.weight.requires_grad:
        return 0
    weight = module.weight
    probe = torch.linspace(-2, 3, 4 * len(weight), device=weight.device).view(4, -1).to(weight.dtype)
    expected = module(probe)
    for offset, casting in NORMS:

        def norm(self, x, offset=offset, casting=casting):
            return LigerRMSNormFunction.apply(x, self.weight, epsilon, offset, casting, False)

        try:
            if torch.allclose(norm(module, probe), expected, rtol=0.01, atol=1e-5):
                module.forward = types.MethodType(norm, module)
                return 1
        except CANNOT:
            return 0
    return 0


def _gated(self, x):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    if hasattr(self, "gate_up_proj"):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj(LigerSiLUMulFunction.apply(gate, up))


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


@torch.no_grad()
def _fuse_rotary(source, device) -> int:
    from liger_kernel.ops.rope import LigerRopeFunction

    original = getattr(source, "apply_rotary_pos_emb", None)
    if original is None or hasattr(original, "on_gpu"):
        return int(original is not None)

    def rotary(q, k, cos, sin, *args, **kwargs):
        if args or kwargs or cos.shape[-1] != q.shape[-1] or q.device.type != "cuda":
            return original(q, k, cos, sin, *args, **kwargs)
        return LigerRopeFunction.apply(q, k, cos, sin)

    angles = torch.linspace(0, 3, 24, device=device).view(1, 3, 8).repeat(1, 1, 2)
    q = torch.linspace(-1, 1, 96, device=device).view(1, 3, 2, 16).transpose(1, 2)
    k = torch.linspace(2, -1, 48, device=device).view(1, 3, 1, 16).transpose(1, 2)
    try:
        expected = original(q, k, angles.cos(), angles.sin())
        # Liger writes its result into contiguous inputs.
        given = rotary(q.clone(), k.clone(), angles.cos(), angles.sin())
    except CANNOT:
        return 0
    if not all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(expected, given, strict=True)):
        return 0
    rotary.on_gpu = True
    source.apply_rotary_pos_emb = rotary
    return 1
