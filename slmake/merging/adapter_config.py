"""A PEFT adapter's configuration, adapter_config.json: whether it can be merged exactly, and which modules its patterns match."""

import re
import reprlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from slmake import outputs
from slmake.errors import UserError, first_line

# Options of PEFT's LoRA that compute something else than W + s B A, DoRA, or replaced values.
UNSUPPORTED = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config"),
    *("monteclora_config", "target_parameters", "use_bdlora", "use_qalora"),
)
# Initializations that change the base's own weights; the adapter fits those only.
CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
READ_OTHERWISE = re.compile(r"\{,|\[:|\[[^]]*\[")  # syntax that Python's regular expressions and RE2's read differently


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_index(value: object) -> bool:
    return type(value) is int and value >= 0


def _list_of(is_item: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(is_item, value))


def _dict_of(is_item: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_item, value.values()))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_text_or_list(value: object) -> bool:
    return _is_text(value) or _list_of(_is_text)(value)


REQUIRED = ("r", "lora_alpha")
# Key -> what it must be, and whether a value is that; a key that is null or absent has PEFT's default, unless it is required.
VALUES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "r": ("a positive whole number", _is_count),
    "lora_alpha": ("a finite number", _is_number),
    "rank_pattern": ("an object of patterns and positive whole numbers", _dict_of(_is_count)),
    "alpha_pattern": ("an object of patterns and finite numbers", _dict_of(_is_number)),
    "modules_to_save": ("a list of modules' names", _list_of(_is_text)),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"), ("a pattern, or a list of names", _is_text_or_list)
    ),
    "layers_to_transform": (
        "a layer's number, or a list of such",
        lambda value: _is_index(value) or _list_of(_is_index)(value),
    ),
    "trainable_token_indices": (
        "a list of tokens' numbers, or an object of modules' names and such lists",
        lambda value: _list_of(_is_index)(value) or _dict_of(_list_of(_is_index))(value),
    ),
    "init_lora_weights": ("true, false or a name", lambda value: isinstance(value, bool | str)),
    "base_model_name_or_path": ("a name", _is_text),
    **dict.fromkeys(
        ("ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_rslora"),
        ("true or false", lambda value: isinstance(value, bool)),
    ),
}


def read_config(path: Path) -> dict:
    """The checked content of adapter_config.json.

    Raises:
        UserError: it is damaged, a value is of another type or out of its range, or the adapter is of a kind that cannot be merged.
    """
    config = outputs.read_json(path, output=path.parent)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {config.get('peft_type')} cannot be merged here; only LORA can.")
    for key in UNSUPPORTED:
        if config.get(key):
            raise UserError(f"{path}: {key} is set; such an adapter cannot be merged tensor by tensor.")
    for key, (needed, fits) in VALUES.items():
        value = config.get(key)
        if not (fits(value) or (value is None and key not in REQUIRED)):
            given = reprlib.repr(value) if key in config else "missing"
            raise UserError(f"{path}: {key} is {given}; it must be {needed}. Correct it, or save the adapter again.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise UserError(
            f"{path}: init_lora_weights: {start} changed the base's weights, so the adapter does not fit the base itself. Save it "
            "with PEFT's `path_initial_model_for_weight_conversion`, which converts it to plain LoRA."
        )
    return config


def by_pattern(path: Path, config: dict, key: str, modules: list[str]) -> dict[str, float]:
    """The values of rank_pattern or alpha_pattern, by module; of several patterns that match a module, the first counts.

    Patterns are regular expressions, and an adapter may come from anywhere: RE2 matches each in time linear in the name's length,
    where Python's search may never end.

    Args:
        path: of the configuration, for the message.

    Raises:
        UserError: a pattern is no regular expression of both Python's kind, which PEFT uses, and RE2's.
    """
    found: dict[str, float] = {}
    for pattern, value in (config.get(key) or {}).items():
        for module in _matching(path, key, pattern, modules):
            found.setdefault(module, value)
    return found


def _matching(path: Path, key: str, pattern: str, modules: list[str]) -> list[str]:
    import pyarrow
    import pyarrow.compute

    whole = rf"^(.*\.)?({pattern})$"  # as PEFT's get_pattern_key asks
    try:
        if READ_OTHERWISE.search(pattern):
            raise ValueError("sets in sets and counts without a lower bound are not allowed")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(pattern), re.compile(whole)
        matches = pyarrow.compute.match_substring_regex(pyarrow.array(modules, pyarrow.string()), whole).to_pylist()
    except (ValueError, re.error, OverflowError, RecursionError, Warning) as error:
        raise UserError(
            f"{path}: {key} has the pattern {reprlib.repr(pattern)}, which cannot be used: {first_line(error)}. Write the modules' "
            "names, or a regular expression without look-around and back references."
        ) from None
    return [module for module, match in zip(modules, matches, strict=True) if match]
