"""What a model's config.json may not say: sizes beyond its weights, quantized weights, code on the hub."""

import re
from pathlib import Path

from slmake.errors import UserError

# Keys of config.json that are a size or a count; none exceeds the number of elements in the weights.
SIZE = re.compile(r"^(n|num|d)_|_(size|dim|heads|layers|rank)$")
# Keys that are a number of tokens; the export makes tables of that length. The longest of real models is 10,485,760.
POSITIONS = re.compile(r"position_embeddings$|^(max_seq(uence)?_len(gth)?|seq_length)$")
MOST_POSITIONS = 2**24
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "num_encoder_layers")


def refuse_oversized(source: Path, config: dict, tensors: int, elements: int) -> None:
    """Refuse sizes that the weights cannot have, before a library allocates memory for them.

    Args:
        config: the configuration; nested dictionaries are checked, too.
        tensors: number of tensors in the weights; every layer has at least one.
        elements: number of values in them.

    Raises:
        UserError: naming the key and the number.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            refuse_oversized(source, value, tensors, elements)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            limit, unit = (tensors, "tensors") if key in LAYERS else (elements, "values")
            if SIZE.search(key) and not value <= limit:
                raise UserError(
                    f"{source}: {key} is {value:,}, but the weights have only {limit:,} {unit}: it is the configuration of another "
                    "model, or damaged. Download the model again."
                )
            if POSITIONS.search(key):
                refuse_long_context(source, key, value)


def refuse_long_context(source: Path, key: str, value: float) -> None:
    """UserError if a context is longer than any model's."""
    if not value <= MOST_POSITIONS:
        raise UserError(
            f"{source}: {key} is {value:,} tokens, more than any model reads; at most {MOST_POSITIONS:,} are accepted. Put the length that "
            "the model was trained for there, or get the model from where you trust it."
        )


def refuse_quantized(source: Path, config: dict) -> None:
    """Refuse a model whose weights are quantized: cast or merged without their scales, they would be another model's.

    Raises:
        UserError: naming the method.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = next(
            (part[key] for key in ("quantization_config", "compression_config") if part.get(key) is not None), None
        )
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise UserError(
                f"{source}: quantization_config says that the weights are quantized ({method or 'by an unnamed method'}); a base model is "
                "needed in full precision. On the hub that is mostly the repository of the same name without -FP8, -AWQ, -GPTQ or "
                "-bnb-4bit. If these weights are not quantized, take quantization_config out of config.json."
            )


def refuse_foreign_kernels(source: Path, config: dict, kind: str = "") -> None:
    """Refuse attention or experts whose code is a repository on the hub: `attn_implementation` and the like, as owner/name.

    Args:
        config: the configuration; nested dictionaries are checked, too.
        kind: the key that `config` is the value of, with an implementation for each part of the model.

    Raises:
        UserError: naming the key and the repository.
    """
    for name, value in config.items():
        key = name if name.endswith("_implementation") else kind
        if isinstance(value, dict):
            refuse_foreign_kernels(source, value, key)
        elif key and "/" in str(value):
            raise UserError(f"{source}: {key} names code on the hub ({value}), which is never run. Take {key} out.")
