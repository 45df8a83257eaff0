"""GGUF files: dequantize one through transformers and save it as safetensors."""

import contextlib
import functools
import math
import re
import tempfile
from pathlib import Path

from slmake.errors import UserError, first_line, is_failure
from slmake.model_folder import refuse_incomplete
from slmake.sources import gguf_header

# Fields that are a size or a count; a context's length is no part of the weights.
SIZE = re.compile(r"(count|length|size|dim|rank)(_\w+)?$")


@contextlib.contextmanager
def parsed_once():
    """Make transformers parse a GGUF file once.

    It creates a reader for configuration, weights and tokenizer each, and every reader goes through the whole vocabulary
    in Python (4 s for 49,152 tokens). It also builds the same map of tensor names once per module (5 s for 30 layers).
    """
    import gguf

    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (functools.lru_cache(maxsize=1)(original) for original in originals)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals


def convert_gguf(file: Path, target: Path, dtype: str) -> None:
    """Dequantize a GGUF file through transformers and save weights, configuration and tokenizer.

    transformers reads it in a folder that has nothing but a link to it: a tokenizer_config.json beside it could name code.

    Raises:
        UserError: not a GGUF file, sizes that its tensors do not have, or an architecture that transformers does not
            read from GGUF.
    """
    with open(file, "rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"{file}: not a GGUF file (it does not begin with `GGUF`).")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch_dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    try:
        with parsed_once(), tempfile.TemporaryDirectory(prefix="slmake-gguf-") as folder:
            link = Path(folder) / "model.gguf"
            link.symlink_to(file.resolve())
            gguf_header.check(link)
            _refuse_oversized(file, link)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=link.name, dtype=torch_dtype, output_loading_info=True, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=link.name, trust_remote_code=False)
    except BaseException as error:  # tokenizers raises plain Exceptions, and panics
        if not is_failure(error) or isinstance(error, UserError | MemoryError) or getattr(error, "errno", None):
            raise
        raise UserError(
            f"{file}: transformers cannot read this GGUF file: {first_line(error)} It may be damaged: download it again."
        ) from None
    refuse_incomplete(file, report)
    # The weights are dequantized now; these marks of the source format would make save_pretrained refuse.
    for mark in ("quantization_config", "_name_or_path"):
        if hasattr(model.config, mark):
            delattr(model.config, mark)
    model.config._name_or_path = ""
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _refuse_oversized(file: Path, link: Path) -> None:
    """Refuse sizes that the file's tensors cannot have, before transformers allocates memory for them."""
    import gguf

    reader = gguf.GGUFReader(str(link))
    elements = sum(math.prod(map(int, tensor.shape)) for tensor in reader.tensors)
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "general.", "tokenizer.")) or "context" in name or "rope" in name:
            continue
        value = field.parts[field.data[0]][0] if len(field.data) == 1 else 0
        limit = len(reader.tensors) if name.endswith(".block_count") else elements
        if SIZE.search(name) and value > limit:
            unit = "tensors" if name.endswith(".block_count") else "values"
            raise UserError(
                f"{file}: {name} is {value:,}, but the file has only {limit:,} {unit}: it is damaged. Download it again."
            )
