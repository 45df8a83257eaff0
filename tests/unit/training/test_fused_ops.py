"""fused_ops: attention, rotary embedding and RMSNorm are the library's own arithmetic, gradients included."""

import pytest
import torch
from tiny import make_model

from slmake.training import fused_ops


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


def outcome(model, ids, mask):
    """Logits at real tokens, and the gradient of a fixed loss with respect to the embeddings."""
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
    real = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool()
    torch.manual_seed(1)
    (logits * torch.randn(logits.shape))[real].sum().backward()
    return logits.detach()[real], embeddings.grad[real]


def assert_equal(found, wanted):
    """Equal up to the order of float32 sums, measured against the largest element."""
    for values, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(values, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.fixture(scope="module", params=["llama", "phi3", "qwen2"])
def folder(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.mark.parametrize("padded", [False, True])
def test_a_fused_model_gives_the_same_logits_and_gradients(folder, padded):
    model = load(folder)
    torch.manual_seed(2)
    ids = torch.randint(5, 500, (3, 19))
    mask = None
    if padded:
        mask = (torch.arange(19) < torch.tensor([[19], [7], [12]])).long()
    expected = outcome(model, ids, mask)
    count = fused_ops.fuse(model)
    assert count["attention"] == 1
    assert count["norm"] == 5  # two in each of two layers, one at the end
    assert_equal(outcome(model, ids, mask), expected)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_padding_that_is_longer_than_a_window_is_no_nan(tmp_path, kind):
    """Its queries see no key at all."""
    model = load(make_model(tmp_path / kind, kind, sliding_window=4))
    ids, mask = torch.randint(5, 500, (2, 19)), (torch.arange(19) < torch.tensor([[19], [7]])).long()
    expected = outcome(model, ids, mask)
    fused_ops.fuse(model)
    found = outcome(model, ids, mask)
    assert torch.isfinite(found[1]).all()
    assert_equal(found, expected)


def test_rotary_embedding_is_fused_where_it_is_llamas_own(tmp_path):
    assert fused_ops.fuse(load(make_model(tmp_path / "llama", "llama")))["rotary"] == 1
    # Phi-3 has one projection for q, k and v; its rotary embedding may be partial and is unchanged.
    assert fused_ops.fuse(load(make_model(tmp_path / "phi3", "phi3")))["rotary"] == 0


def test_long_sequences_go_to_the_librarys_attention(tmp_path, monkeypatch):
    model = load(make_model(tmp_path / "llama"))
    ids = torch.randint(5, 500, (1, 40))
    expected = outcome(model, ids, None)
    fused_ops.fuse(model)
    monkeypatch.setattr(fused_ops, "SHORT", 39)
    monkeypatch.setattr(fused_ops.Attention, "apply", lambda *_: pytest.fail("40 tokens are too long"))
    assert_equal(outcome(model, ids, None), expected)


def test_a_norm_with_another_meaning_is_unchanged():
    class OnePlusRMSNorm(torch.nn.Module):
        """Gemma's: the weight is an offset from one."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((8,), 0.5), requires_grad=False)
            self.variance_epsilon = 1e-6

        def forward(self, x):
            wide = x.float()
            return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)) * (1 + self.weight)

    assert fused_ops.replace_norm(OnePlusRMSNorm(), fused_ops._norm_forward) == 0


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
@pytest.mark.parametrize("shape", [(2, 5, 8), (3, 8)])
def test_gradient_of_the_norm_by_finite_differences(shape):
    torch.manual_seed(3)
    x = torch.randn(shape, dtype=torch.float32, requires_grad=True)
    weight = torch.rand(8) + 0.5
    assert torch.autograd.gradcheck(
        lambda x: fused_ops.RMSNorm.apply(x, weight, 1e-5), x, eps=1e-2, atol=5e-3, rtol=5e-3
    )


def test_gradients_of_attention_and_rotary_embedding_by_finite_differences():
    torch.manual_seed(4)
    q = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.full((1, 1, 5, 5), -torch.inf, dtype=torch.float64).triu(1)
    angles = torch.rand(1, 1, 5, 3, dtype=torch.float64).repeat(1, 1, 1, 2)
    assert torch.autograd.gradcheck(lambda q, k, v: fused_ops.Attention.apply(q, k, v, mask, 0.4), (q, k, v))
    assert torch.autograd.gradcheck(lambda q: fused_ops.Rotary.apply(q, angles.cos(), angles.sin()), q)


def test_attention_with_another_width_of_values_is_the_librarys(tmp_path):
    """DeepSeek's values are narrower than its keys, which `Attention` does not compute."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        first_k_dense_replace=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False)
    ids = torch.randint(5, 500, (2, 9))
    expected = outcome(model, ids, None)
    assert fused_ops.fuse(model)["attention"] == 0
    assert_equal(outcome(model, ids, None), expected)


def test_attention_that_computes_something_else_is_unchanged(tmp_path, monkeypatch):
    """A soft cap on the scores, as in Gemma 2, under the name of the library's attention: a difference of 24% in the logits."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def capped(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = 0.1 * torch.tanh(100 * query @ key.transpose(2, 3))
        causal = torch.full(scores.shape[-2:], -torch.inf).triu(1)
        return (torch.softmax(scores + causal, -1) @ value).transpose(1, 2).contiguous(), None

    model = load(make_model(tmp_path / "llama"))
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 20  # scores as large as those of a trained model
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", capped)
    ids = torch.randint(5, 500, (2, 9))
    expected = outcome(model, ids, None)
    assert fused_ops.fuse(model)["attention"] == 0
    for values, wanted in zip(outcome(model, ids, None), expected, strict=True):
        torch.testing.assert_close(values, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
