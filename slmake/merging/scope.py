"""Which modules an adapter's configuration names: PEFT reads no other tensors from its file."""

from slmake.errors import UserError
from slmake.patterns import compiled


def parents(module: str) -> list[str]:
    """A module and those that it is part of: `a.b.c`, `a.b`, `a`."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def saves(names: list[str] | None, module: str) -> bool:
    """Whether `modules_to_save` has a module, or one that it is part of; by the ends of names, as PEFT finds them."""
    return any(parent.endswith(name) for name in names or [] for parent in parents(module))


def refuse_uncovered(adapter) -> None:
    """Refuse tensors of an `Adapter` that PEFT would leave out, so that the merge would be of another model than the one that PEFT runs.

    Raises:
        UserError: one is there, or a pattern of the configuration cannot be used.
    """
    config, adapted = adapter.config, [change for change in adapter.changes.values() if change.a]
    try:
        covered = {change.module for change in adapted if _adapts(config, change)}
    except ValueError as error:
        raise UserError(f"{adapter.config_path}: {error}. Write the modules' names.") from None
    if not covered and isinstance(config.get("target_modules"), str):
        return  # a pattern for another wrapping of the model, as of its text part in one of images: PEFT loads it over neither
    for change in adapted:
        if change.module not in covered:
            raise _left_out(adapter, change.a, "target_modules, exclude_modules or layers_to_transform")
    for name, change in adapter.changes.items():
        whole = change.replacement or ""
        # PEFT has the adapted module's own weight as base_layer.weight.
        if change.a and whole == f"base_model.model.{name}":
            raise _left_out(adapter, whole, "it is the weight of an adapted module, and modules_to_save")
        if ".modules_to_save" in whole and not saves(config.get("modules_to_save"), change.module):
            raise _left_out(adapter, whole, "modules_to_save")


def _left_out(adapter, tensor: str, reason: str) -> UserError:
    return UserError(
        f"{adapter.weights}: PEFT would leave out the tensor {tensor}: {reason} of adapter_config.json does not cover it. Correct the "
        "configuration, or save the adapter again."
    )


def _adapts(config: dict, change) -> bool:
    """PEFT's `check_target_module_exists`, with patterns that are matched within a time limit."""
    module, targets, excluded = change.module, config.get("target_modules"), config.get("exclude_modules") or []
    if compiled(excluded).fullmatch(module) if isinstance(excluded, str) else _named(excluded, module):
        return False
    if any(compiled(rf"(^|.*\.){name}($|\..*)").fullmatch(module) for name in config.get("modules_to_save") or []):
        return False
    if targets is None:  # PEFT's own list for the architecture
        return True
    if config.get("ensure_weight_tying") and not any(part.isdecimal() for part in module.split(".")):
        return True  # the embedding's adapter is the head's, too, whichever of them is named
    if isinstance(targets, str):
        linear = targets.lower() == "all-linear"
        return change.transposed is False if linear else compiled(targets).fullmatch(module)
    return module in targets or (_named(targets, module) and _in_layers(config, module))


def _named(names: list[str], module: str) -> bool:
    return module in names or any(module.endswith(f".{name}") for name in names)


def _in_layers(config: dict, module: str) -> bool:
    """Whether the module's layer is one of `layers_to_transform`; its number is the first behind what `layers_pattern` names."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    given = config.get("layers_pattern") or []
    prefixes = [rf"(?:^|.*?\.){pattern}" for pattern in ([given] if isinstance(given, str) else given)]
    parts = module.split(".")
    numbers = [i for i in range(len(parts) - 1) if parts[i].isdecimal()]
    for form in map(compiled, prefixes or [r".*?\.[^.]*"]):
        for i in numbers:
            if form.fullmatch(".".join(parts[:i])):
                return int(parts[i]) in ([layers] if isinstance(layers, int) else layers)
    return False
