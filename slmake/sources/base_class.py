"""Weights that a model's base class saved: without the prefix that a causal language model has before them."""

import json
import os
from pathlib import Path

from slmake import outputs
from slmake.model_folder import meta_model, tensor_shapes, weight_files


def restore_prefix(folder: Path) -> None:
    """Rename tensors as the causal language model has them (`h.0.…` to `transformer.h.0.…`): an adapter is merged by these names.

    Args:
        folder: a complete model folder, which is changed in place; of the weights, one shard is in memory at a time.
    """
    files = weight_files(folder)
    names = {name for file in files for name in tensor_shapes(file)}
    model = meta_model(folder)
    prefix, own = f"{model.base_model_prefix}.", model.state_dict().keys()
    new = {name: prefix + name for name in names - own if prefix + name in own - names}
    if not new:
        return
    from safetensors.torch import load_file, save_file

    for file in files:
        whole = file.with_name(f".{file.name}")
        tensors = {new.get(name, name): value for name, value in load_file(file).items()}
        save_file(tensors, whole, metadata={"format": "pt"})
        os.replace(whole, file)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {new.get(name, name): shard for name, shard in content["weight_map"].items()}
        outputs.write_json(index, content)
