"""gpu_ops: what is replaced and what is kept, with stand-ins for Liger's kernels on the CPU.

The kernels themselves run on GPUs only: `bench.cuda` holds a step with them against float64.
"""

import sys
import types

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from slmake.training import gpu_ops

CPU = torch.device("cpu")


def kernel(function) -> types.SimpleNamespace:
    return types.SimpleNamespace(apply=function)


def rms_norm(x, weight, eps, offset, casting, in_place):
    assert not in_place  # residuals still need the gradient that it would write over
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)


@pytest.fixture
def liger(monkeypatch):
    """Stand-ins that compute what Liger's kernels do; a test breaks one to see it refused."""
    modules = {
        "rms_norm": types.SimpleNamespace(LigerRMSNormFunction=kernel(rms_norm)),
        "swiglu": types.SimpleNamespace(
            LigerSiLUMulFunction=kernel(lambda gate, up: torch.nn.functional.silu(gate) * up)
        ),
        "rope": types.SimpleNamespace(LigerRopeFunction=kernel(no_compiler)),
    }
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", types.ModuleType("liger_kernel.ops"))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{name}", module)
    return modules


def mlp(activation: str = "silu"):
    config = modeling_llama.LlamaConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=24, hidden_act=activation
    )
    return modeling_llama.LlamaMLP(config)


def no_compiler(*_):
    raise RuntimeError("Failed to find C compiler")


def test_a_model_on_the_cpu_is_left_alone(liger):
    model = torch.nn.Sequential(mlp())
    assert gpu_ops.fuse(model) == {}
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("kind", [modeling_llama.LlamaRMSNorm, GemmaRMSNorm])
def test_both_ways_to_weight_a_norm_are_told_apart(liger, kind):
    norm = kind(8).requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.2, 1.4, 8))
    x = torch.randn(3, 8)
    expected = norm(x)
    assert gpu_ops._fuse_norm(norm) == 1
    torch.testing.assert_close(norm(x), expected)


def test_a_norm_that_is_trained_or_computes_something_else_is_kept(liger):
    assert gpu_ops._fuse_norm(modeling_llama.LlamaRMSNorm(8)) == 0
    frozen = modeling_llama.LlamaRMSNorm(8).requires_grad_(False)
    liger["rms_norm"].LigerRMSNormFunction = kernel(lambda x, *rest: 1.1 * rms_norm(x, *rest))
    assert gpu_ops._fuse_norm(frozen) == 0


@pytest.mark.parametrize(("activation", "replaced"), [("silu", 1), ("gelu", 0)])
def test_only_a_gated_silu_is_replaced(liger, activation, replaced):
    module, x = mlp(activation), torch.randn(2, 3, 16)
    expected = module(x)
    assert gpu_ops._fuse_mlp(module, CPU, torch.float32) == replaced
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("right", [True, False])
def test_a_rotary_embedding_is_replaced_where_the_kernel_rotates_alike(liger, monkeypatch, right):
    original = modeling_llama.apply_rotary_pos_emb
    source = types.SimpleNamespace(apply_rotary_pos_emb=original)
    sign = 1 if right else -1
    liger["rope"].LigerRopeFunction = kernel(lambda q, k, cos, sin: original(q, k, cos, sign * sin))
    taken = []

    class OnGpu(torch.Tensor):
        """A tensor of the CPU that says it is on a GPU."""

        @property
        def device(self):
            taken.append(1)
            return types.SimpleNamespace(type="cuda")

    plain = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *a, device=None: plain(*a).as_subclass(OnGpu))
    gpu, rotate = types.SimpleNamespace(type="cuda"), liger["rope"].LigerRopeFunction.apply
    assert gpu_ops.replace_rotary(source, gpu, rotate, gpu_ops.CANNOT, 1e-4, 1e-5) == right
    assert taken
    assert (source.apply_rotary_pos_emb is original) != right
    if right:  # tensors of the CPU still take the library's own function
        monkeypatch.undo()
        q, angles = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8)
        expected = original(q, q, angles.cos(), angles.sin())
        for given, wanted in zip(source.apply_rotary_pos_emb(q, q, angles.cos(), angles.sin()), expected, strict=True):
            torch.testing.assert_close(given, wanted)


def test_without_a_compiler_the_librarys_own_operations_stay(liger):
    for name, function in (("rms_norm", "LigerRMSNormFunction"), ("swiglu", "LigerSiLUMulFunction")):
        setattr(liger[name], function, kernel(no_compiler))
    assert gpu_ops._fuse_norm(modeling_llama.LlamaRMSNorm(8).requires_grad_(False)) == 0
    assert gpu_ops._fuse_mlp(mlp(), CPU, torch.float32) == 0


def phi3(**options):
    config = modeling_phi3.Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **{"num_key_value_heads": 2, "pad_token_id": 0, "attn_implementation": "sdpa"} | options,
    )
    torch.manual_seed(0)
    return modeling_phi3.Phi3ForCausalLM(config)


def attentions(model) -> list:
    return [module for module in model.modules() if hasattr(module, "qkv_proj")]


@pytest.mark.parametrize("window", [None, 4])
def test_joint_projections_are_split_with_the_same_gradient(window):
    model, ids = phi3(sliding_window=window), torch.arange(1, 25).view(2, 12)

    def gradient():
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [value.grad.clone() for value in model.parameters()]

    before, answer = gradient(), model.generate(ids, max_new_tokens=4, do_sample=False)
    assert gpu_ops._split_projections(model, attentions(model)) == 2
    for given, expected in zip(gradient(), before, strict=True):
        torch.testing.assert_close(given, expected)
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, do_sample=False), answer
    )  # with a cache: the library's own


def test_another_kind_of_joint_projections_is_kept():
    model = phi3()
    for module in attentions(model):
        module.scaling, module.forward = module.scaling * 2, types.MethodType(type(module).forward, module)
        own = module.forward
        module.forward = lambda *args, own=own, **kwargs: tuple(
            2 * part if part is not None else None for part in own(*args, **kwargs)
        )
    assert gpu_ops._split_projections(model, attentions(model)) == 0
    assert gpu_ops._split_projections(torch.nn.Linear(2, 2), []) == 0


@pytest.mark.parametrize(("activation", "replaced"), [("silu", 1), ("gelu", 0)])
def test_a_joint_gate_goes_through_our_own_kernel(liger, monkeypatch, activation, replaced):
    def gated(both):
        gate, up = both.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    monkeypatch.setitem(sys.modules, "slmake.training.gated_silu", types.SimpleNamespace(GatedSiLU=kernel(gated)))
    module = modeling_phi3.Phi3MLP(phi3(hidden_act=activation).config)
    assert gpu_ops._fuse_mlp(module, CPU, torch.float32) == replaced
