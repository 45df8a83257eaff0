"""Exported models that may be another's: what in such a folder would run code, or write files, when ONNX Runtime GenAI loads it."""

import json
import re
from pathlib import Path

from slmake.errors import UserError, first_line

LIBRARY = re.compile(r"\.(so|dll|dylib|pyd)\b", re.IGNORECASE)  # libx.so.1 is one, too
LIBRARY_OPTION = "custom_ops_library"  # of ONNX Runtime GenAI's session options
SESSION_OPTIONS = (  # that its builder writes
    *("log_id", "provider_options", "ep.cuda.fpa_intb_gemm", "optimization.disable_specified_optimizers"),
    *("session.use_device_allocator_for_initializers", "intra_op_num_threads"),
)
# What the builder writes into genai_config.json, by object; in those that are not named here, values and lists of values alone.
SETTINGS = {
    (): ("model", "search"),
    ("model",): (
        *("type", "decoder", "context_length", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("bot_token_id", "eot_token_id", "bor_token_id", "eor_token_id"),
    ),
    ("model", "decoder"): (
        *("session_options", "filename", "head_size", "hidden_size", "inputs", "outputs", "sliding_window"),
        *("num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    ),
    ("model", "decoder", "session_options"): SESSION_OPTIONS,
}


def refuse_code(folder: Path) -> None:
    """Refuse what would run code of the folder, or write files, when its model is loaded, as options of ONNX Runtime do.

    Raises:
        UserError: the folder has a library or names one, or it has settings that the builder does not write.
    """
    for path in sorted(folder.rglob("*")):
        if LIBRARY.search(path.name):
            raise UserError(
                f"{folder}: {path.name} is a library. No export or package of slmake has one; do not load this one."
            )
    try:
        text = (folder / "genai_config.json").read_text(encoding="utf-8")
        settings = json.loads(text, object_pairs_hook=_Pairs)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}: genai_config.json cannot be read: {first_line(error)}.") from None
    try:
        _refuse_settings(settings, ())
    except ValueError as error:
        raise UserError(f"{folder}: genai_config.json {error}. Do not load this model.") from None


class _Pairs(list):
    """A JSON object as its names and values, a name that stands twice in it included."""


def _refuse_settings(value: object, at: tuple[str, ...]) -> None:
    """Raise ValueError if a value in genai_config.json is none that the builder writes there.

    Args:
        at: the names that lead to the value.
    """
    where = "among the provider options" if "provider_options" in at else f"in {'.'.join(at)}"
    if isinstance(value, _Pairs):
        for name, inner in value:
            if name == LIBRARY_OPTION:
                raise ValueError(f"names a library ({LIBRARY_OPTION}), whose code would run")
            if name not in SETTINGS.get(at, [name]):
                kind = "session option" if at[-1:] == ("session_options",) else "setting"
                raise ValueError(
                    f"has the {kind} {name}, which slmake's exports do not have: some run code, or write files wherever they say"
                )
            _refuse_settings(inner, (*at, name))
    elif not at:
        raise ValueError("is no JSON object")
    elif isinstance(value, list):
        for inner in value:
            _refuse_settings(inner, at)
    elif isinstance(value, str) and re.search(r"[/\\]", value):
        raise ValueError(f"names a path {where}")
    elif isinstance(value, str) and LIBRARY.search(value):
        raise ValueError(f"names a library {where}, whose code would run")
