"""Attention over rows of different lengths that stand one behind the other, on a GPU: neither padding nor gathers of queries.

torch's flash attention (Dao 2023, arXiv:2307.08691) takes the places where sequences begin among the queries and among the keys. A
row's own tokens attend to the shared prefix and to themselves, so that only keys and values are copied, and without a shared prefix
nothing is. The operator is the one below torch.nn.attention.varlen, which costs the host more for each call.
"""

from dataclasses import dataclass

import numpy as np
import torch

from slmake.training.data import to_device


@dataclass
class Sequences:
    """The tokens of a shared-prefix layout as sequences: the shared tokens are the first, then come the rows' own tokens.

    Attributes:
        queries: int32 [sequences + 1], where each sequence's queries begin among the tokens.
        keys: int32 [sequences + 1], where its keys begin among the keys.
        longest: the most queries, and the most keys, of a sequence.
        token: int64 [keys], the token of each key; None if the keys are the tokens.
        own: int64 [tokens], the key that is the token itself.
        copies: int64 [sequences * common], the keys that are shared tokens, sequence by sequence.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest: tuple[int, int]
    common: int
    token: torch.Tensor | None = None
    own: torch.Tensor | None = None
    copies: torch.Tensor | None = None

    @classmethod
    def of(cls, lengths: np.ndarray, common: int, device) -> "Sequences":
        """The sequences of rows of these lengths that begin with `common` shared tokens."""
        own = lengths[lengths > common] - common
        queries = np.concatenate([[common] if common else [], own]).astype(np.int32)
        keys = np.concatenate([[common] if common else [], own + common]).astype(np.int32)
        starts, ends = (np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32) for sizes in (queries, keys))
        places = [to_device(array, device) for array in (starts, ends)]
        sequences = cls(*places, (int(queries.max()), int(keys.max())), common)
        if common and len(own):
            # A key of a sequence is a shared token, or as far behind the sequence's first own token as behind the prefix.
            step = np.concatenate([np.arange(size) for size in keys])
            first = np.repeat(starts[:-1], keys)
            token = np.where(step < common, step, first + step - common)
            shared = step < common
            sequences.token = to_device(token.astype(np.int64), device)
            sequences.own = to_device(np.flatnonzero(~shared | (np.arange(len(step)) < common)), device)
            sequences.copies = to_device(np.flatnonzero(shared), device)
        return sequences


class Keys(torch.autograd.Function):
    """Keys or values by token, [tokens, heads, width], to by key, [keys, heads, width]."""

    @staticmethod
    def forward(ctx, x, sequences):
        ctx.sequences = sequences
        return x.index_select(0, sequences.token)

    @staticmethod
    def backward(ctx, grad):
        sequences = ctx.sequences
        by_token = grad.index_select(0, sequences.own)
        shared = grad.index_select(0, sequences.copies).view(-1, sequences.common, *grad.shape[1:])
        by_token[: sequences.common] = shared.sum(0)
        return by_token, None


def usable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict) -> bool:
    """Whether torch's flash attention computes this: on a GPU, in 16 bits, without dropout, capped logits or attention sinks."""
    if not query.is_cuda or query.shape[-1] != value.shape[-1]:
        return False
    if any(options.get(name) for name in ("dropout", "softcap")) or options.get("s_aux") is not None:
        return False
    grouped = query.shape[1] != key.shape[1]
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, grouped)
    return torch.backends.cuda.can_use_flash_attention(parameters)


def flash(query, key, value, sequences: Sequences, scale: float | None) -> torch.Tensor:
    """Causal attention of [queries, heads, width] to [keys, heads, width], the last query of a sequence to all of its keys."""
    longest = sequences.longest
    operator = torch.ops.aten._flash_attention_forward
    return operator(query, key, value, sequences.queries, sequences.keys, *longest, 0.0, True, False, scale=scale)[0]


def attention(query, key, value, sequences: Sequences, scale: float | None) -> torch.Tensor:
    """Attention by token: [1, heads, tokens, width] to [1, tokens, heads, width]."""
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    if sequences.token is not None:
        key, value = Keys.apply(key, sequences), Keys.apply(value, sequences)
    return flash(query, key, value, sequences, scale)[None]
