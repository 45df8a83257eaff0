"""A PEFT LoRA adapter on disk: how each tensor of its base changes, from the names, shapes and configuration of its files."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from slmake.errors import UserError
from slmake.merging import scope
from slmake.merging.adapter_config import by_pattern, read_config
from slmake.merging.update import Update
from slmake.model_folder import check_safetensors, refuse_odd_files, tensor_shapes
from slmake.text import listing

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?P<part>"
    r"lora_(?:A|B)(?:\.default)?\.(?:weight|bias)|lora_embedding_(?:A|B)(?:\.default)?|"
    r"lora_magnitude_vector(?:\.default)?(?:\.weight)?|token_adapter\.trainable_tokens_delta(?:\.default)?|[a-z_]+)"
)
WRAPPERS = re.compile(r"(\.(base_layer|token_adapter|modules_to_save(\.default)?))+$")


@dataclass
class Change:
    """The adapter's tensors that change one tensor of the base, by name; None where there is no such tensor.

    Attributes:
        module: the base's module.
        a, b: LoRA's matrices [r, in] and [out, r]; of an embedding [r, rows] and [width, r].
        transposed: the weight is stored as [in, out], like an embedding; whether a layer's is, `plan` finds out.
        magnitude: DoRA's vector.
        bias: the bias of B, which is added to the base's.
        rows: trained rows of the weight, which replace the base's at `indices`.
        replacement: the whole tensor's new values.
    """

    module: str
    a: str | None = None
    b: str | None = None
    transposed: bool = False
    magnitude: str | None = None
    bias: str | None = None
    rows: str | None = None
    indices: list[int] = field(default_factory=list)
    replacement: str | None = None


class Adapter:
    """A PEFT LoRA adapter, as `save_pretrained`, TRL, Axolotl, Unsloth and LLaMA-Factory write it.

    Attributes:
        changes: by name of the base's tensor.
        shapes: of the adapter's own tensors, by name.
        ranks, alphas: of the modules that have others than the configuration's r and lora_alpha.
    """

    def __init__(self, folder: Path, source: str | None = None):
        """Read the configuration and the names of the tensors.

        Args:
            source: `adapter.source`, where the folder is a user's; else a rule builds it.

        Raises:
            UserError: no adapter there, damaged, or of a kind that cannot be merged exactly.
        """
        self.folder, self.source, self.config_path = folder, source, folder / "adapter_config.json"
        self.weights = folder / "adapter_model.safetensors"
        self._check_files()
        self.config = read_config(self.config_path)
        from safetensors import safe_open

        self.file, self.shapes = safe_open(self.weights, "pt"), tensor_shapes(self.weights)
        self.changes: dict[str, Change] = {}
        for name in self.shapes:
            self._add(name)
        self._check_complete()
        scope.refuse_uncovered(self)
        modules = sorted({change.module for change in self.changes.values() if change.a or change.bias})
        self.ranks = by_pattern(self.config_path, self.config, "rank_pattern", modules)
        self.alphas = by_pattern(self.config_path, self.config, "alpha_pattern", modules)

    def _check_complete(self) -> None:
        modules = {change.module for change in self.changes.values() if change.replacement}
        for name in self.config.get("modules_to_save") or []:
            if not any(scope.saves([name], module) for module in modules):
                raise UserError(
                    f"{self.folder}: modules_to_save has {name}, but no tensor of it. Build the adapter again."
                )
        if self.config.get("trainable_token_indices") and not any(change.rows for change in self.changes.values()):
            raise UserError(
                f"{self.folder}: trainable_token_indices is set, but no token is saved. Build the adapter again."
            )
        for change in self.changes.values():
            if (change.a is None) != (change.b is None):
                raise UserError(
                    f"the adapter has only one of the two matrices for {change.module}.weight. Build the adapter again."
                )
            if (change.magnitude is None) != (change.a is None or not self.config.get("use_dora")):
                raise UserError(
                    f"{self.folder}: use_dora is {self.config.get('use_dora', False)}, which does not fit the tensors for "
                    f"{change.module}.weight. Build the adapter again."
                )

    def _check_files(self) -> None:
        refuse_odd_files(self.folder)
        if not self.weights.exists() and (self.folder / "adapter_model.bin").exists():
            raise UserError(
                f"{self.folder}: the weights are in adapter_model.bin, a pickle format, which can run code when it is read. Convert it "
                "where you trust it: `PeftModel.from_pretrained(BASE, ADAPTER).save_pretrained(NEW)` writes safetensors."
            )
        for path in (self.config_path, self.weights):
            if not path.exists() and self.source:
                there = listing(sorted(path.name for path in self.folder.iterdir())) or "nothing"
                raise UserError(
                    f"adapter.source: {self.source}: no {path.name} there. The folder has {there}; an adapter in PEFT's layout has "
                    "adapter_config.json and adapter_model.safetensors. Convert it to PEFT's layout, or name the folder with these files."
                )
            if not path.exists():
                raise UserError(f"{path}: no such file. Build the adapter with `snakemake --cores all {self.folder}`.")
        again = f"Remove {self.folder} and run snakemake: it is built again."
        kinds = check_safetensors(self.weights, "Download or save it again." if self.source else again)
        for name, kind in kinds.items():
            if kind not in DTYPES:
                raise UserError(f"{self.weights}: tensor {name} is of type {kind}; {', '.join(DTYPES)} can be merged.")

    def _add(self, name: str) -> None:
        """Add a tensor of the adapter to the change of the base's tensor that it belongs to."""
        match = TENSOR.fullmatch(name)
        if not match:
            raise UserError(
                f"{self.weights}: tensor {name} is of no kind that PEFT's LoRA writes; it cannot be merged."
            )
        module, part = match["module"], match["part"].replace(".default", "")
        if module.endswith(".original_module"):  # a copy of the base's own
            return
        dimensions = 1 if part.endswith("bias") or part.startswith("lora_magnitude") else 2
        if part.startswith(("lora_", "token_adapter.")) and len(self.shapes[name]) != dimensions:
            raise UserError(
                f"{self.weights}: tensor {name} has the shape {self.shapes[name]}: only adapters of linear layers and embeddings can be "
                "merged."
            )
        if part == "lora_B.bias":
            self._change(module, "bias").bias = name
        elif part.startswith("token_adapter."):
            change = self._change(module, "weight")
            change.rows, change.indices = name, self._token_indices(module)
        elif part.startswith("lora_magnitude"):
            self._change(module, "weight").magnitude = name
        elif part.startswith("lora_"):
            change = self._change(module, "weight")
            change.transposed = "embedding" in part  # a linear layer's is the base's to say
            setattr(change, "a" if "_A" in part else "b", name)
        else:  # a whole tensor: modules_to_save, a trained bias, a resized embedding
            plain = WRAPPERS.sub("", module)
            change = self._change(plain, part)
            if not change.replacement or plain == module:
                change.replacement = name

    def _change(self, module: str, tensor: str) -> Change:
        return self.changes.setdefault(f"{module}.{tensor}", Change(module))

    def _token_indices(self, module: str) -> list[int]:
        indices = self.config.get("trainable_token_indices")
        if isinstance(indices, dict):
            matching = [key for key in indices if module == key or module.endswith(f".{key}")]
            # Tied heads have trained rows, too, without a key of their own.
            indices = indices[matching[0]] if matching else next(iter(indices.values()), None)
        if not isinstance(indices, list):
            raise UserError(f"{self.config_path}: it has no trainable_token_indices for the trained rows of {module}.")
        return indices

    def rank(self, module: str) -> int:
        """LoRA's rank of a module, by PEFT's patterns."""
        return self.ranks.get(module, self.config["r"])

    def scaling(self, module: str) -> float:
        """PEFT's factor before B A: alpha / r, or alpha / sqrt(r) with rank stabilization (arXiv:2312.03732)."""
        rank, alpha = self.rank(module), self.alphas.get(module, self.config["lora_alpha"])
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def tensor(self, name: str):
        """One of the adapter's tensors, in float32.

        Raises:
            UserError: a value is not finite.
        """
        import torch

        value = self.file.get_tensor(name).float()
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise UserError(
                f"{self.weights}: tensor {name} has {bad:,} values that are not finite (NaN or infinite): the training diverged. "
                "Train again with a lower learning rate."
            )
        return value

    def update(self, change: Change) -> Update | None:
        """What is added to a tensor, read; None if it is only replaced."""
        values = {
            part: self.tensor(getattr(change, part))
            for part in ("a", "b", "magnitude", "bias", "rows")
            if getattr(change, part)
        }
        if not values:
            return None
        scaling = self.scaling(change.module) if change.a or change.bias else 1.0
        return Update(scaling=scaling, transposed=change.transposed, indices=change.indices, **values)
