"""GGUF files: dequantize one through transformers and save it as safetensors."""

import contextlib
import functools
import math
import re
import tempfile
from pathlib import Path

from slmake.errors import UserError, first_line, is_failure
from slmake.model_config import refuse_long_context
from slmake.model_folder import refuse_incomplete
from slmake.sources import gguf_header, gguf_tokenizer
from slmake.sources.gguf_header import ELSEWHERE
from slmake.sources.gguf_tokenizer import CONTROL, TURN_ENDS, USER_DEFINED

# Fields that are a size or a count; a context's length is no part of the weights.
SIZE = re.compile(r"(count|length|size|dim|rank)(_\w+)?$")
# Fields that multiply or limit values within the model. transformers reads none of them.
SCALE = re.compile(r"(^|[._])(scale|softcapping|clamp_kqv)$")
# Families that scale attention by another number than the size of a head in their largest model (27B), and the layers that this one has.
SCALED = {"gemma2": 46, "gemma3_text": 62}
NO_PART_OF_IT = ("vocab_size", "tensor_data_layout")  # fields that change nothing of a model


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
        UserError: not a GGUF file, sizes that its tensors do not have, an architecture that transformers does not read from GGUF, or
            tensors, scales, a scaling of rotary embeddings or a tokenizer that it does not read.
    """
    with open(file, "rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"{file}: not a GGUF file (it does not begin with `GGUF`).")
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    torch_dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    try:
        with parsed_once(), tempfile.TemporaryDirectory(prefix="slmake-gguf-") as folder:
            link = Path(folder) / "model.gguf"
            link.symlink_to(file.resolve())
            gguf_header.check(link)
            reader = gguf.GGUFReader(str(link))
            if (count := reader.fields.get("split.count")) and count.contents() > 1:
                raise UserError(
                    f"{file}: one of the files of a model that was split. Join them with llama.cpp's `llama-gguf-split --merge FIRST.gguf "
                    "WHOLE.gguf`, and name the whole."
                )
            _refuse_oversized(file, reader)
            _refuse_rope_scaling(file, reader)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=link.name, dtype=torch_dtype, output_loading_info=True, trust_remote_code=False
            )
            _set_attention(model.config, _fields(reader))
            _set_ends(reader, model.generation_config)
            _refuse_unread(file, reader, model)
            tokenizer = gguf_tokenizer.load(file, link)
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
    if field := reader.fields.get("tokenizer.chat_template.tool_use"):  # transformers reads the default one only
        default = {"default": tokenizer.chat_template} if tokenizer.chat_template else {}
        tokenizer.chat_template = default | {"tool_use": field.contents()}
    tokenizer.save_pretrained(target)


def _set_attention(config, fields: dict[str, object]) -> None:
    """Give a configuration what transformers does not read of how far, and by which scale, its layers look back."""
    if config.model_type == "phi3":
        # Without a scaling of its rotary embeddings, there is no other length.
        config.original_max_position_embeddings = config.max_position_embeddings
        config.sliding_window = fields.get("attention.sliding_window") or None
    if config.model_type in SCALED:  # files do not say it: as llama.cpp computes it (llama-model.cpp)
        largest = config.num_hidden_layers == SCALED[config.model_type]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else config.head_dim


def _set_ends(reader, generation_config) -> None:
    """Let generation end at the tokens that close a turn, too, as llama.cpp does: a file names the end of a text alone (Phi-3, Gemma)."""
    tokens, kinds = (reader.fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    kinds = [kinds.parts[index][0] for index in kinds.data] if kinds else []
    special = [number for number, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    ends = [number for number in special if bytes(tokens.parts[tokens.data[number]]).decode() in TURN_ENDS]
    if field := reader.fields.get("tokenizer.ggml.eot_token_id"):
        ends.append(field.contents())
    own = generation_config.eos_token_id
    if ends := sorted({*ends} - {own}):
        generation_config.eos_token_id = [own, *ends] if own is not None else ends


def _refuse_oversized(file: Path, reader) -> None:
    """Refuse sizes that the file's tensors cannot have, before transformers allocates memory for them."""
    elements = sum(math.prod(map(int, tensor.shape)) for tensor in reader.tensors)
    for name, field in reader.fields.items():
        value = field.parts[field.data[0]][0] if len(field.data) == 1 else 0
        if name.endswith(".context_length"):
            refuse_long_context(file, name, value)
        if name.startswith(("GGUF.", "general.", "tokenizer.")) or "context" in name or "rope" in name:
            continue
        limit = len(reader.tensors) if name.endswith(".block_count") else elements
        if SIZE.search(name) and value > limit:
            unit = "tensors" if name.endswith(".block_count") else "values"
            raise UserError(
                f"{file}: {name} is {value:,}, but the file has only {limit:,} {unit}: it is damaged. Download it again."
            )


def _fields(reader) -> dict[str, object]:
    """The architecture's fields, without its name before them: of others, programs write how they made the file (`quantize.`, `split.`)."""
    before = f"{reader.fields['general.architecture'].contents()}."
    return {
        name.removeprefix(before): field.contents() for name, field in reader.fields.items() if name.startswith(before)
    }


def _refuse_rope_scaling(file: Path, reader) -> None:
    """Refuse a scaling of the rotary embeddings, as a table in a tensor (Llama 3.1, Phi-3 with a long context) or in the fields."""
    fields = _fields(reader)
    # llama.cpp takes a factor without a type as linear, and 0 as none.
    kind = fields.get("rope.scaling.type", "linear")
    factor = fields.get("rope.scaling.factor", fields.get("rope.scale_linear", 0))
    marks = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    if kind != "none" and not (kind == "linear" and factor in (0, 1)):
        marks.append(f"rope.scaling.type {kind!r}, factor {factor}")
    if marks:
        raise UserError(
            f"{file}: {marks[0]}: the model scales its rotary embeddings, and transformers does not read that from GGUF: it would be "
            f"another model. {ELSEWHERE}"
        )


def _as_computed(config) -> dict[str, object]:
    """Fields that transformers does not read, with what they must say of the model that it makes of the others."""
    try:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except Exception:  # Gemma 4 has several, Mamba none
        head = 0
    rope = getattr(config, "rope_parameters", None) or {}
    sliding = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or []]
    near = rope.get("sliding_attention", {}).get("rope_theta")
    return {
        "rope.freq_base_swa": near,
        "rope.local.freq_base": near,
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1)),
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_epsilon": getattr(config, "norm_eps", None),
        "attention.sliding_window": getattr(config, "sliding_window", None) or 0,
        "attention.sliding_window_pattern": sliding,
        "attention.causal": True,
        "expert_count": 0,
        "expert_used_count": 0,
    }


def _refuse_unread(file: Path, reader, model) -> None:
    """Refuse tensors without a place in transformers' model, scales other than it computes with, and fields that it does not read."""
    from transformers import modeling_gguf_pytorch_utils as loading

    architecture = reader.fields["general.architecture"].contents()
    processor = loading.TENSOR_PROCESSORS.get(architecture, loading.TensorProcessor)
    known = loading.get_gguf_hf_weights_map(model, processor())
    # transformers' names of a layer's experts together have no `.weight`.
    unread = [
        name
        for name in (tensor.name for tensor in reader.tensors)
        if not {name, name.removesuffix(".weight")} & known.keys()
    ]
    scalings = (getattr(module, "scaling", None) for module in model.modules())
    scalar = getattr(model.config, "query_pre_attn_scalar", None)  # `_set_attention` may have set it since
    scaling = scalar**-0.5 if scalar else next((value for value in scalings if isinstance(value, float)), 1)
    read, computed = loading.GGUF_CONFIG_MAPPING.get(architecture, {}), _as_computed(model.config)
    for name, value in _fields(reader).items():
        if name == "attention.sliding_window_pattern" and isinstance(value, int) and value:
            # Of so many layers the last one sees all.
            value = [bool((layer + 1) % value) for layer in range(model.config.num_hidden_layers)]
        checked = read.get(name) or name in NO_PART_OF_IT or name.startswith("rope.scal") or SCALE.search(name)
        right = computed.get(name)
        if not (checked or (math.isclose(value, right, rel_tol=1e-4) if isinstance(right, float) else value == right)):
            unread.append(f"{name} {value}")
        own = scaling if name == "attention.scale" else getattr(model.config, name.rpartition(".")[2], None)
        neutral = (own,) if own else (0, 1) if name.endswith("scale") else (0,)
        if SCALE.search(name) and not any(math.isclose(value, number, rel_tol=1e-4) for number in neutral):
            unread.append(f"{name} {value:g}")
    if unread:
        more = f" ({len(unread) - 1} more like it)" if len(unread) > 1 else ""
        raise UserError(
            f"{file}: {unread[0]}{more}: transformers does not read that from GGUF, and without it this is another model. {ELSEWHERE}"
        )
