"""A PEFT LoRA adapter on disk."""

import math
import re
from pathlib import Path

from slmake import outputs
from slmake.errors import UserError
from slmake.model_folder import check_safetensors


class Adapter:
    """A PEFT LoRA adapter on disk: its pairs of matrices by the name of the base weight they change."""

    def __init__(self, folder: Path):
        """Read the configuration and the names.

        Raises:
            UserError: no adapter there, damaged, or of a kind that cannot be merged exactly.
        """
        from safetensors import safe_open

        config_path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        for path in (config_path, weights):
            if not path.exists():
                raise UserError(f"{path}: no such file. Build the adapter with `snakemake --cores all {folder}`.")
        check_safetensors(weights, f"Remove {folder} and run snakemake: it is built again.")
        self.config = outputs.read_json(config_path, output=folder)
        if self.config.get("peft_type") != "LORA":
            raise UserError(
                f"{config_path}: peft_type {self.config.get('peft_type')} cannot be merged here; only LORA can."
            )
        for key in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens"):
            if self.config.get(key):
                raise UserError(f"{config_path}: {key} is set; such an adapter cannot be merged tensor by tensor.")
        if self.config.get("bias", "none") != "none":
            raise UserError(f"{config_path}: bias: {self.config['bias']} cannot be merged here; train with bias: none.")
        self.file = safe_open(weights, "pt")
        self.pairs: dict[str, tuple[str, str]] = {}
        for name in self.file.keys():  # noqa: SIM118 (safe_open cannot be iterated)
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", name)
            if not match:
                raise UserError(
                    f"{weights}: tensor {name} is not the A or B matrix of a linear layer; it cannot be merged here."
                )
            target = match[1] + ".weight"
            pair = self.pairs.get(target, ("", ""))
            self.pairs[target] = (name, pair[1]) if match[2] == "A" else (pair[0], name)

    def scaling(self, module: str) -> float:
        """PEFT's factor before B A: alpha / r, or alpha / sqrt(r) with rank stabilization (arXiv:2312.03732)."""
        rank, alpha = self.config["r"], self.config["lora_alpha"]
        for pattern, value in (self.config.get("rank_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                rank = value
                break
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def pair(self, target: str) -> tuple:
        """B [out, r], A [r, in], both float32, and the factor before B A, for one base weight."""
        name_a, name_b = self.pairs[target]
        if not name_a or not name_b:
            raise UserError(f"the adapter has only one of the two matrices for {target}. Build the adapter again.")
        a, b = self.file.get_tensor(name_a).float(), self.file.get_tensor(name_b).float()
        return b, a, self.scaling(target.removesuffix(".weight"))
