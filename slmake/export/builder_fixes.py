"""Work around faults of the model builder in onnxruntime-genai 0.18.

Each fix replaces methods of the builder while it runs, names the fault, and calls `applied` where the model needs it.
tests/unit/export/test_families.py exports a model without each fix, and fails when the builder does not need it any more.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterator


def _output_head(original: Callable, applied: Callable) -> Callable:
    """Wrong logits where another linear layer has as many outputs as the vocabulary: the builder takes it for the head."""

    def has_lm_head(self, module):
        head = self.weights.get_output_embeddings() if hasattr(self.weights, "get_output_embeddings") else None
        if head is None:
            return original(self, module)
        if original(self, module) and module is not head:
            applied()
        return module is head

    return has_lm_head


def _nested_rope(original: Callable, applied: Callable) -> Callable:
    """Gemma 3: `KeyError: 'rope_type'`. transformers 5 nests rope_parameters by layer type; the builder reads the flat form."""

    def make_config_init(self, config):
        rope = getattr(config, "rope_parameters", None) or {}
        if {"full_attention", "sliding_attention"} <= rope.keys():
            applied()
            config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
            config.rope_parameters = rope["full_attention"]
        original(self, config)

    return make_config_init


def _scaled_config(original: Callable, applied: Callable) -> Callable:
    """Wrong logits, or `ZeroDivisionError`, with rope_type `linear` or `yarn`: the Llama builder ignores both; elsewhere YaRN's
    bounds are not rounded, its defaults are 0, and Gemma 3's local layers are scaled, too. So transformers computes them."""

    def make_config_init(self, config):
        rope = getattr(config, "rope_parameters", None) or {}
        self.scaled_config = None
        if rope.get("rope_type") in ("linear", "yarn"):
            applied()
            self.scaled_config = copy.deepcopy(config)
            config.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        original(self, config)

    return make_config_init


def _scaled_caches(original: Callable, applied: Callable) -> Callable:
    """See `_scaled_config`. Gemma 3's local layers have another theta, and no scale."""

    def make_rotary_embedding_caches_from_scratch(self):
        import torch
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = self.scaled_config
        if config is None or self.rope_attrs["theta"] != config.rope_parameters["rope_theta"]:
            return original(self)
        frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")
        angles = torch.outer(torch.arange(self.rope_attrs["cache_length"], dtype=torch.float32), frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * factor, angles.sin() * factor

    return make_rotary_embedding_caches_from_scratch


def _uniform_window(original: Callable, applied: Callable) -> Callable:
    """Mistral, Phi-3: prompts longer than the window fail. Without layer_types, the builder gives every layer a kernel with a
    bounded cache, but writes into genai_config.json that no layer has one."""

    def make_config_init(self, config):
        original(self, config)
        if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
            applied()
            config.layer_types = ["sliding_attention"] * config.num_hidden_layers

    return make_config_init


def _long_window(original: Callable, applied: Callable) -> Callable:
    """Phi-3.5-mini, Phi-4-mini: "max_length cannot be greater than model context_length". Their window is longer than their context, so it
    hides nothing, but the runtime asks for a cache of its length."""

    def make_config_init(self, config):
        if (getattr(config, "sliding_window", None) or 0) >= config.max_position_embeddings:
            applied()
            config.sliding_window = None
        original(self, config)

    return make_config_init


def _layers_without_rope(original: Callable, applied: Callable) -> Callable:
    """SmolLM3: `KeyError: 'position_ids'`. For a layer without rotary embeddings, the builder asks for them outside attention."""

    def make_attention(self, layer_id, attention, root_input, **kwargs):
        self.attention_attrs["rope"] = bool(self.no_rope_layers[layer_id])
        if not self.no_rope_layers[layer_id]:
            applied()
        original(self, layer_id, attention, root_input, **kwargs)
        self.attention_attrs["rope"] = True

    return make_attention


# The builder's class and method, and what replaces it. `nested_rope` comes last, so that it runs before the others.
FIXES: dict[str, list[tuple[str, str, Callable[[Callable, Callable], Callable]]]] = {
    "output_head": [("Model", "has_lm_head", _output_head)],
    "uniform_window": [("Model", "make_config_init", _uniform_window)],
    "long_window": [("Model", "make_config_init", _long_window)],
    "layers_without_rope": [("SmolLM3Model", "make_attention", _layers_without_rope)],
    "scaled_rope": [
        ("Model", "make_config_init", _scaled_config),
        ("Model", "make_rotary_embedding_caches_from_scratch", _scaled_caches),
    ],
    "nested_rope": [("Model", "make_config_init", _nested_rope)],
}


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute of a class or module while the block runs."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def fixed(builder, names: Collection[str] = tuple(FIXES)) -> Iterator[set[str]]:
    """Apply fixes to the builder's module while the block runs. Yields the set of those that a model needed."""
    needed: set[str] = set()
    with contextlib.ExitStack() as undo:
        for name in names:
            for owner, method, fix in FIXES[name]:
                kind = getattr(builder, owner)
                method_fixed = fix(getattr(kind, method), functools.partial(needed.add, name))
                undo.enter_context(replaced(kind, method, method_fixed))
        yield needed
