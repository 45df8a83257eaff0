"""Checkpoints of a training run, and the fingerprint that says whether one may be resumed."""

import json
from collections.abc import Callable
from pathlib import Path

from slmake import outputs, params
from slmake.code_inputs import ROOT, code, digest
from slmake.errors import UserError

# Attributes of a Trainer that a checkpoint stores, beside its tensors and its step.
STATE = ("bad_evaluations", "best", "stopped", "window", "train_curve", "eval_curve")


def fingerprint(
    section: params.Finetune, base: Path, dataset: Path, dtype, world: int = 1, threads: int = 1, packed: bool = False
) -> str:
    """Digest of all that a checkpoint depends on.

    Beside parameters, base, dataset, code and library versions: processes and their threads, and whether weights are packed, which
    depends on the memory. They decide in which order a product's sums are taken.
    """
    import hashlib

    import peft
    import torch
    import transformers

    parts = {
        "params": params.as_json(section),
        "base": outputs.folder_digest(base),
        "dataset": outputs.folder_digest(dataset),
        "code": digest(code("finetune"), root=ROOT),
        "dtype": str(dtype),
        "world": world,
        "threads": threads,
        "packed": packed,
        "versions": [torch.__version__, transformers.__version__, peft.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Checkpoints:
    """The last state of a run, in `folder/<fingerprint>/`: replaced as a whole, removed at the end."""

    def __init__(self, folder: Path, key: str):
        self.all, self.folder = folder, folder / key

    def save(self, step: int, tensors: dict, state: dict) -> None:
        """Write adapter, optimizer moments and curves; the previous checkpoint is removed once this one is complete."""
        from safetensors.torch import save_file

        target = self.folder / f"step-{step:08d}"
        if target.exists():
            return
        with outputs.written(target, noted=False) as (temporary,):
            save_file(tensors, temporary / "tensors.safetensors")
            outputs.write_json(temporary / "state.json", {"step": step, **state})
        for old in self._steps()[:-1]:
            outputs.remove(old)

    def others(self) -> bool:
        """Whether there are checkpoints of other runs, which this one cannot resume."""
        return any(path.parent != self.folder for path in self.all.glob("*/step-*"))

    def _steps(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def load(self, say: Callable[[str], None]) -> tuple[dict, dict] | None:
        """Tensors and state of the last complete checkpoint, or None; damaged ones are reported to `say` and removed."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        for folder in reversed(self._steps()):
            try:
                state = outputs.read_json(folder / "state.json", "step", *STATE)
                return load_file(folder / "tensors.safetensors"), state
            except (SafetensorError, FileNotFoundError, UserError) as error:
                reason = str(error).removeprefix(f"{folder}/").partition(". ")[0]
                say(f"the checkpoint {folder} is damaged and is discarded: {reason}")
                outputs.remove(folder)
        return None

    def remove(self) -> None:
        """Remove this run's checkpoints; called once its outputs are complete."""
        outputs.remove(self.folder)
        if self.all.is_dir() and not any(self.all.iterdir()):
            self.all.rmdir()
