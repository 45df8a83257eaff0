"""A decoder layer's small operations on a GPU, by Liger Kernel's Triton kernels: RMSNorm, rotary embedding, gated SiLU.

transformers computes each of them as a row of operations that read and write a whole activation, and a step then waits for
their launches. A kernel of Liger (Hsu et al. 2024, arXiv:2410.10989) is one launch. A module or function is replaced only
where the replacement gives the same result on a probe; without Liger or a compiler for Triton, nothing is.
"""

import subprocess
import sys
import types
from functools import partial
from importlib.util import find_spec

import torch

from slmake.training.fused_ops import replace_norm, replace_rotary
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
    from liger_kernel.ops.rope import LigerRopeFunction

    device, count = model.device, {"norm": 0, "rotary": 0, "mlp": 0}
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            count["norm"] += _fuse_norm(module)
        elif hasattr(module, "down_proj"):
            count["mlp"] += _fuse_mlp(module, device, model.dtype)
    attentions = [module for module in model.modules() if hasattr(module, "q_proj") or hasattr(module, "qkv_proj")]
    for source in {type(module).__module__ for module in attentions}:
        count["rotary"] += replace_rotary(sys.modules[source], device, LigerRopeFunction.apply, CANNOT, 1e-4, 1e-5)
    return count


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
