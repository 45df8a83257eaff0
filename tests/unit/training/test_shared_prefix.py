"""shared_prefix: a shared prefix that is computed once gives the logits and gradients of rows computed one by one."""

import itertools

import numpy as np
import pytest
import torch
from tiny import make_model

from slmake.training import fused_ops, ragged_attention, shared_prefix

CASES = {
    "a common prefix": [[1, 5, 9, 20, 21], [1, 5, 9, 30], [1, 5, 9, 20, 41, 42, 43]],
    "nothing in common": [[7, 5], [8, 5, 6], [7]],
    "one row begins another": [[7, 8, 9], [7, 8], [7, 8, 9, 10]],
    "the same row twice": [[7, 8, 9], [7, 8, 9]],
    "a single row": [[4, 5, 6, 7]],
}


def load(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    return model


def one_by_one(model, rows):
    return [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows]


def together(model, rows):
    layout = shared_prefix.Layout([np.array(row) for row in rows], torch.device("cpu"))
    logits = shared_prefix.forward(model, layout)[0]
    return [logits[layout.token[k, : len(row)]] for k, row in enumerate(rows)], layout


def gradient(model, logits):
    """Of a fixed loss on all logits, with respect to the embeddings."""
    torch.manual_seed(1)
    model.zero_grad()
    sum((row * torch.randn(row.shape)).sum() for row in logits).backward()
    return model.get_input_embeddings().weight.grad.clone()


@pytest.fixture(scope="module", params=["llama", "phi3", "qwen2"])
def folder(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.mark.parametrize("fuse", [False, True], ids=["library", "fused"])
@pytest.mark.parametrize("rows", CASES.values(), ids=CASES.keys())
def test_logits_and_gradients_are_those_of_rows_computed_one_by_one(folder, rows, fuse):
    model = load(folder)
    wanted = one_by_one(model, rows)
    wanted_gradient = gradient(model, wanted)
    if fuse:
        fused_ops.fuse(model)
    assert shared_prefix.share(model) == float("inf")
    found, _ = together(model, rows)
    for logits, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
    found_gradient = gradient(model, found)
    torch.testing.assert_close(found_gradient, wanted_gradient, rtol=0, atol=3e-6 * float(wanted_gradient.abs().max()))


@pytest.mark.parametrize(
    ("name", "common", "tokens"),
    [
        ("a common prefix", 3, 3 + 2 + 1 + 4),
        ("nothing in common", 0, 6),
        ("one row begins another", 2, 2 + 1 + 2),
        ("the same row twice", 3, 3),
        ("a single row", 4, 4),
    ],
)
def test_common_tokens_are_there_once_and_nothing_is_padded(name, common, tokens):
    rows = CASES[name]
    layout = shared_prefix.Layout([np.array(row) for row in rows], torch.device("cpu"))
    assert (layout.common, layout.tokens, len(layout.ids)) == (common, tokens, tokens)
    for k, row in enumerate(rows):
        there = layout.token[k, : len(row)]
        assert layout.ids[there].tolist() == row
        assert layout.positions[there].tolist() == list(range(len(row)))


def test_a_plain_batch_still_goes_through_a_model_that_shares(folder):
    model = load(folder)
    ids = torch.randint(5, 400, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    wanted = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    shared_prefix.share(model)
    found = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, wanted)


def test_a_sliding_window_bounds_the_rows(tmp_path):
    model = load(make_model(tmp_path / "mistral", "mistral", sliding_window=6))
    assert shared_prefix.share(model) == 6
    rows = [[1, 5, 9, 20, 21, 22], [1, 5, 9, 30]]
    wanted = one_by_one(load(tmp_path / "mistral"), rows)
    for logits, expected in zip(together(model, rows)[0], wanted, strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


def test_a_model_whose_attention_cannot_be_replaced_is_unchanged(folder):
    from transformers import AutoModelForCausalLM

    assert shared_prefix.share(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")) == 0


def test_a_model_that_gives_another_result_is_detected(folder):
    model = load(folder)
    shared_prefix.share(model)
    assert shared_prefix.agrees(model, 512, torch.device("cpu"))
    # What a convolution over neighbouring tokens would do: the second row's first token lies behind the first row's last.
    layer = model.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x) + torch.roll(x, 1, dims=1)
    assert not shared_prefix.agrees(model, 512, torch.device("cpu"))


def test_a_model_whose_layers_pass_nothing_on_to_attention_is_detected(folder):
    model = load(folder)
    shared_prefix.share(model)
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda *args, layout=None, forward=forward, **kwargs: forward(*args, **kwargs)
    assert not shared_prefix.agrees(model, 512, torch.device("cpu"))


def reference(query, key, value, sequences, scale):
    """What torch's flash attention computes, on a CPU: sequence by sequence, the last query sees all keys."""
    places = list(zip(sequences.queries.tolist(), sequences.keys.tolist(), strict=True))
    outputs = []
    for (start, first), (end, last) in itertools.pairwise(places):
        q, k, v = (x.transpose(0, 1) for x in (query[start:end], key[first:last], value[first:last]))
        assert q.shape[1] <= sequences.longest[0]
        assert k.shape[1] <= sequences.longest[1]
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        sees = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = torch.where(sees, q @ k.transpose(1, 2) * scale, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    assert (end, last) == (len(query), len(key))
    return torch.cat(outputs)


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES.keys())
def test_rows_of_different_lengths_as_they_are(folder, rows, monkeypatch):
    """As on a GPU, with a reference in the place of its kernel (bench.cuda has the kernel itself)."""
    model = load(folder)
    wanted = one_by_one(model, rows)
    wanted_gradient = gradient(model, wanted)
    called = []
    monkeypatch.setattr(ragged_attention, "usable", lambda *_: called.append(1) or True)
    monkeypatch.setattr(ragged_attention, "flash", reference)
    shared_prefix.share(model)
    found, layout = together(model, rows)
    assert len(called) == (model.config.num_hidden_layers if len(rows) > 1 else 0)
    assert (layout.sequences.token is None) == (layout.common == 0 or max(map(len, rows)) == layout.common)
    for logits, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
    found_gradient = gradient(model, found)
    torch.testing.assert_close(found_gradient, wanted_gradient, rtol=0, atol=3e-6 * float(wanted_gradient.abs().max()))
