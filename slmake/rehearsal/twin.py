"""A twin of a model: the same architecture, tokenizer, vocabulary, head size, norms and rotary style, but few layers and heads.

Its weights are random from a seed. What it takes to train, merge and export it is what the real model takes, in seconds.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from slmake.errors import UserError
from slmake.model_folder import KEPT

SEED = 20240101
LEAST_LAYERS = 2
EXPERTS = 4
TWIN_POSITIONS = 2**17  # the export's tables have a row for each; a rehearsal's texts are much shorter
# Configuration fields that hold the number of experts, by the names of the architectures that have them.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
LAYER_LISTS = ("layer_types", "no_rope_layers")  # configuration fields with an entry for each layer
EXPERT_CHOICES = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")


def layer_kinds(config) -> list[tuple]:
    """What distinguishes each layer of a transformers configuration from others: its type, and whether it has rotary embeddings."""
    lists = [getattr(config, name, None) for name in LAYER_LISTS]
    return list(zip(*(kinds or [None] * config.num_hidden_layers for kinds in lists), strict=True))


def period(layer_types: list) -> int:
    """Length of the shortest pattern that a list of layer types repeats."""
    for length in range(1, len(layer_types)):
        if all(kind == layer_types[index % length] for index, kind in enumerate(layer_types)):
            return length
    return len(layer_types)


def shrink(config):
    """Shrink a transformers configuration in place: a whole period of layer types, one key-value head with its query heads, less context.

    Args:
        config: a `transformers.PretrainedConfig` of a causal language model.

    Returns:
        The configuration.
    """
    layers = min(config.num_hidden_layers, max(LEAST_LAYERS, period(layer_kinds(config))))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_values = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    groups = config.num_attention_heads // key_values
    heads = max(2, groups)
    changes = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads // groups,
        "hidden_size": heads * head_dim,
        "intermediate_size": 2 * heads * head_dim,
    }
    if (getattr(config, "max_position_embeddings", None) or 0) > TWIN_POSITIONS:
        changes["max_position_embeddings"] = TWIN_POSITIONS
    experts = next((name for name in EXPERT_COUNTS if getattr(config, name, None)), None)
    if experts:
        changes[experts] = min(EXPERTS, getattr(config, experts))
        chosen = next((name for name in EXPERT_CHOICES if getattr(config, name, None)), None)
        if chosen:
            changes[chosen] = min(2, getattr(config, chosen))
        if getattr(config, "moe_intermediate_size", None):
            changes["moe_intermediate_size"] = 2 * head_dim
    for name, value in changes.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return cut(config, layers)


def cut(config, layers: int):
    """Keep the first `layers` layers of a transformers configuration, in place and at full width. Returns it."""
    config.num_hidden_layers = layers
    for name in LAYER_LISTS:
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[:layers])
    return config


def make_model(base: Path, target: Path, change: Callable, dtype: str = "float32") -> None:
    """Write a model with random weights and the base's tokenizer into `target`.

    Args:
        base: a model folder in Hugging Face layout.
        change: changes the base's configuration, such as `shrink`.
        dtype: data type of its weights, by torch's name.

    Raises:
        UserError: transformers cannot make a model of the shrunken configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    target.mkdir(parents=True)
    try:
        config = change(AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True))
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except (ValueError, KeyError, AttributeError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{base}/config.json: no small model can be made of this configuration ({type(error).__name__}: {error}). "
            "Leave rehearse out of all.stages to build without a rehearsal."
        ) from None
    model.save_pretrained(target)
    for path in sorted(base.iterdir()):
        of_the_base = path.name in ("config.json", "model.safetensors.index.json")  # its shards are not here
        if path.suffix in KEPT and not of_the_base and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
