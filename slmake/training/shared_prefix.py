"""Shared-prefix computation: the common prefix of a batch's rows (an instruction, a template, a system prompt) is computed once.

In a causal model a token's state depends only on the tokens before it. So rows with a common prefix have the same states
there, and the gradients that reach these states add up. The loss and gradient are those of the plain batch, with sums in
another order; with `lora_dropout`, the rows also share what is dropped in the prefix. The tokens of a batch form one
sequence, the shared ones first, without padding. Only attention needs rows: it gathers its queries, keys and values by
row, and its results by token; on a GPU a kernel takes rows of different lengths as they are (ragged_attention).
"""

import math
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import torch

from slmake.training import ragged_attention
from slmake.training.data import to_device
from slmake.training.probe import close

# Layers whose result for a token depends only on the tokens that it attends to; not convolutions or recurrent states.
ATTENTION = {"full_attention", "sliding_attention"}


def common_length(rows: Iterable[np.ndarray]) -> int:
    """Tokens that all rows begin with."""
    rows = iter(rows)
    prefix = next(rows)
    for row in rows:
        shortest = min(len(prefix), len(row))
        differ = np.flatnonzero(prefix[:shortest] != row[:shortest])
        prefix = prefix[: differ[0] if len(differ) else shortest]
    return len(prefix)


class Layout:
    """The tokens of a batch of rows as one sequence, and the index of each token in both.

    Attributes:
        lengths: int64 [rows], the tokens of each row.
        common: length of the shared prefix.
        positions: int64 [tokens], each token's position in its row.
        token: int64 [rows, time], index of the token at each position of the batch; 0 after a row's end, where causality
            hides it.
        index: `token` as an array in the host's memory.
        flat: int64 [tokens], each token's index in the flattened batch (a shared token's in the first row).
        back: int64 [rows * time], `token` where a flat index is some token's own, else the number of tokens.
    """

    def __init__(self, rows: list[np.ndarray], device):
        self.lengths = lengths = np.array([len(row) for row in rows])
        time = lengths.max()
        self.common = common = common_length(rows)
        steps = np.arange(time)
        own = (steps >= common) & (steps < lengths[:, None])
        computed = own.copy()
        computed[0, :common] = True
        # Boolean indexing goes row by row, so the shared tokens, in the first row, come first.
        tokens = int(computed.sum())
        back = np.full(own.shape, tokens)
        back[computed] = np.arange(tokens)
        self.index = np.where(steps < common, back[0], np.where(own, back, 0))
        flat = np.flatnonzero(computed)
        self.ids = to_device(np.concatenate([rows[0][:common], *(row[common:] for row in rows)]), device)
        self.positions = to_device(flat % time, device)
        self.rows, self.time, self.tokens = len(rows), int(time), tokens
        self.token, self.flat = to_device(self.index, device), to_device(flat, device)
        self.back = to_device(back.reshape(-1), device)
        self._indices: dict = {}

    @property
    def parts(self) -> "list[Layout]":
        return [self]

    @cached_property
    def sequences(self) -> ragged_attention.Sequences:
        """The tokens as sequences of different lengths."""
        return ragged_attention.Sequences.of(self.lengths, self.common, self.ids.device)

    def by_row(self, heads: int, token_first: bool) -> torch.Tensor:
        """Indices into x [heads * tokens, width] (or [tokens * heads, width]) that give [rows, heads, time, width]."""
        key = (heads, token_first)
        if key not in self._indices:
            head = torch.arange(heads, device=self.token.device)[:, None]
            token = self.token[:, None]
            index = token * heads + head if token_first else head * self.tokens + token
            self._indices[key] = index.reshape(-1)
        return self._indices[key]

    def by_token(self, heads: int) -> torch.Tensor:
        """Indices into x [rows * heads * time, width] that give [heads, tokens, width]."""
        key = (heads,)
        if key not in self._indices:
            head = torch.arange(heads, device=self.flat.device)[:, None]
            row, step = self.flat // self.time, self.flat % self.time
            self._indices[key] = ((row * heads + head) * self.time + step).reshape(-1)
        return self._indices[key]


class Packed:
    """The tokens of several layouts behind each other. Attention goes layout by layout, so that long rows pad no short ones."""

    def __init__(self, parts: list[Layout]):
        self.parts = parts
        self.ids = torch.cat([part.ids for part in parts])
        self.positions = torch.cat([part.positions for part in parts])


class ByRow(torch.autograd.Function):
    """Queries, keys or values by token, [1, heads, tokens, width], to by row, [rows, heads, time, width]."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        _, heads, _, width = x.shape
        swapped = x.transpose(1, 2)
        if x.is_cuda:  # whole tokens: long reads, and attention takes any strides there
            gathered = swapped.reshape(layout.tokens, -1).index_select(0, layout.token.reshape(-1))
            return gathered.view(layout.rows, layout.time, heads, width).transpose(1, 2)
        token_first = swapped.is_contiguous()
        flat = (swapped if token_first else x).reshape(-1, width)
        gathered = flat.index_select(0, layout.by_row(heads, token_first))
        return gathered.view(layout.rows, heads, layout.time, width)

    @staticmethod
    def backward(ctx, grad):
        layout, (_, heads, _, width) = ctx.layout, grad.shape
        if grad.is_cuda:
            flat = grad.transpose(1, 2).reshape(layout.rows * layout.time, -1).index_select(0, layout.flat)
            by_token = flat.view(1, layout.tokens, heads, width).transpose(1, 2)
        else:
            by_token = grad.reshape(-1, width).index_select(0, layout.by_token(heads))
            by_token = by_token.view(1, heads, layout.tokens, width)
        if layout.common and layout.rows > 1:
            by_token[0, :, : layout.common] = grad[:, :, : layout.common].sum(0)
        return by_token, None


class ByToken(torch.autograd.Function):
    """Attention's results by row, [rows, time, heads, width], to by token, [1, tokens, heads, width]."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout, ctx.shape = layout, x.shape
        return x.reshape(layout.rows * layout.time, -1).index_select(0, layout.flat).view(1, -1, *x.shape[2:])

    @staticmethod
    def backward(ctx, grad):
        flat = torch.nn.functional.pad(grad.reshape(ctx.layout.tokens, -1), (0, 0, 0, 1))
        return flat.index_select(0, ctx.layout.back).view(ctx.shape), None


def only_attends(model) -> bool:
    """Whether a transformers model's result for a token depends on the tokens that it attends to, and on nothing else."""
    layers = getattr(model.config.get_text_config(), "layer_types", None)
    return not model._is_stateful and set(layers or ATTENTION) <= ATTENTION


def share(model) -> float:
    """Make a transformers model accept a `Layout` (`forward` here), in place.

    Returns:
        The longest row that it can compute so: the width of its sliding window or infinity; 0 if it cannot.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    config, name = model.config.get_text_config(), model.config._attn_implementation
    if name not in ("sdpa", "slmake_short"):  # others use positions, or take no mask of four dimensions
        return 0
    if not only_attends(model):
        return 0
    inner = ALL_ATTENTION_FUNCTIONS[name]

    def attention(module, query, key, value, attention_mask, layout=None, **kwargs):
        if layout is None:
            return inner(module, query, key, value, attention_mask, **kwargs)
        sizes = [part.tokens for part in layout.parts]
        outputs = []
        for part, *states in zip(layout.parts, *(x.split(sizes, dim=2) for x in (query, key, value)), strict=True):
            if part.rows > 1 and ragged_attention.usable(*states, kwargs):
                outputs.append(ragged_attention.attention(*states, part.sequences, kwargs.get("scaling")))
                continue
            by_row = states if part.rows == 1 else [ByRow.apply(x, part) for x in states]
            output, _ = inner(module, *by_row, None, **kwargs)
            outputs.append(output if part.rows == 1 else ByToken.apply(output, part))
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], None

    AttentionInterface.register(f"{name}_by_layout", attention)
    AttentionMaskInterface.register(f"{name}_by_layout", ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.set_attn_implementation(f"{name}_by_layout")
    return getattr(config, "sliding_window", None) or math.inf


def forward(model, layout: Layout | Packed):
    """The model's logits for the tokens of a layout, [1, tokens, vocabulary], or for those that a hook on its head selects."""
    # A mask of four dimensions is passed on unchanged; attention by rows is causal and needs none.
    unused = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=layout.ids.device)
    return model(
        input_ids=layout.ids[None],
        position_ids=layout.positions[None],
        attention_mask=unused,
        layout=layout,
        use_cache=False,
    ).logits


@torch.no_grad()
def agrees(model, vocabulary: int, device) -> bool:
    """Whether the model gives the same logits for two short rows with a shared prefix as for each of them alone."""
    rows = [np.array(row) % vocabulary for row in ([5, 7, 11, 13, 17], [5, 7, 19, 23, 29, 31, 37])]
    layout = Layout(rows, device)
    was_training = model.training
    model.eval()
    try:
        logits = forward(model, layout)[0]
        for index, row in enumerate(rows):
            alone = model(input_ids=torch.from_numpy(row)[None].to(device), use_cache=False).logits[0]
            if not close(logits[layout.token[index, : len(row)]], alone, 0.05):
                return False
    except TypeError:  # a model whose layers do not pass arguments on to attention
        return False
    finally:
        model.train(was_training)
    return True
