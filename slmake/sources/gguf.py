"""GGUF files: dequantize one through transformers and save it as safetensors."""

import contextlib
import functools
import struct
from pathlib import Path

from slmake.errors import UserError
from slmake.model_folder import _first_line, refuse_incomplete


@contextlib.contextmanager
def parsed_once():
    """Let transformers parse a GGUF file once: it asks for a new reader for configuration, weights and tokenizer each,
    and every reader goes through the whole vocabulary again in Python (4 s for 49,152 tokens); and for the same map of
    tensor names once for every module (5 s for 30 layers)."""
    import gguf

    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (functools.lru_cache(maxsize=1)(original) for original in originals)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals


def convert_gguf(file: Path, target: Path, dtype: str) -> None:
    """Dequantize a GGUF file through transformers and save weights, configuration and tokenizer.

    Raises:
        UserError: not a GGUF file, or an architecture that transformers does not read from GGUF.
    """
    with open(file, "rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"{file}: not a GGUF file (it does not begin with `GGUF`).")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    try:
        with parsed_once():
            model, found = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=wanted, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, EOFError, IndexError, struct.error, OSError) as error:
        if getattr(error, "errno", None):
            raise
        raise UserError(
            f"{file}: transformers cannot read this GGUF file: {_first_line(error)} It may be damaged: download it again."
        ) from None
    refuse_incomplete(file, found)
    # The weights are dequantized now; these marks of the source format would make save_pretrained refuse.
    for mark in ("quantization_config", "_name_or_path"):
        if hasattr(model.config, mark):
            delattr(model.config, mark)
    model.config._name_or_path = ""
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
