"""The model to train: its device, data type, base and adapters, and the loss on answer tokens."""

from pathlib import Path

import numpy as np

from slmake import params
from slmake.errors import UserError
from slmake.training.data import Data, by_length, to_device


def pick_device(number: int = 0):
    """The GPU with that number if there is a GPU, else the CPU."""
    import torch

    return torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, device):
    """The data type of the frozen base: `auto` is bfloat16 where its matrix products are faster, else float32.

    The processor's features decide, not a timing, so that a machine always chooses the same. Measured (docs/log.md): AMD's
    AVX-512 computes bfloat16 products at four times the float32 rate, Intel's without AMX at two thirds of it.
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        processor = ""
    amd = "AuthenticAMD" in processor and "avx512_bf16" in processor
    return torch.bfloat16 if amd or torch.cpu._is_amx_tile_supported() else torch.float32


def load_model(section: params.Finetune, base: Path, device, load_on=None):
    """The base model with new adapters, ready to train on `device`.

    Args:
        load_on: the device where its weights are loaded, if that is another one.

    Raises:
        UserError: the folder is missing or damaged, or target modules match nothing.
    """
    model = _load_base(section, base, device, load_on)
    model.requires_grad_(False)
    for module in model.modules():
        # bitsandbytes' inference kernel repacks 4-bit weights in eval() for good and has no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    peft = _add_adapters(section, model)
    if section.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return peft


def _load_base(section: params.Finetune, base: Path, device, load_on):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not (base / "config.json").exists():
        raise UserError(f"{base}: no model here. Build it with `snakemake --cores all {base}`.")
    dtype = pick_dtype(section.compute_dtype, device)
    quantization = None
    if section.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=section.quant_type,
            bnb_4bit_use_double_quant=section.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        return AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": load_on or device},
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    except Exception as error:
        if "SafetensorError" in type(error).__name__ or "safetensors" in str(error).lower():
            raise UserError(
                f"{base}: truncated or corrupt weights: {error}. Fetch the model again: remove {base} and run snakemake."
            ) from None
        raise


def _add_adapters(section: params.Finetune, model):
    """The model with LoRA adapters; they stay in float32 even over a bfloat16 base (PEFT's default)."""
    import torch
    from peft import LoraConfig, get_peft_model

    if isinstance(section.target_modules, list):
        # PEFT only complains if none of the names matches.
        names = [f".{name}" for name, _ in model.named_modules()]
        unmatched = [
            target for target in section.target_modules if not any(name.endswith(f".{target}") for name in names)
        ]
        if unmatched and len(unmatched) < len(section.target_modules):
            raise UserError(f"finetune.target_modules: {unmatched} matches no module of this model.")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    torch.manual_seed(section.seed)
    config = LoraConfig(
        r=section.lora_r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=section.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        peft = get_peft_model(model, config)
    except ValueError as error:
        linear = sorted(
            {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        )
        raise UserError(
            f"finetune.target_modules: {section.target_modules} matches no module of this model. Its linear modules: {', '.join(linear)}."
        ) from error
    adapted = [module.get_base_layer() for module in peft.modules() if hasattr(module, "get_base_layer")]
    if any(layer is embedding or (tied and layer is head) for layer in adapted):
        raise UserError(
            "finetune.target_modules: adapters on the input embedding, or on an output head that shares its weights, are not "
            "supported. Remove it from the list."
        )
    return peft


class Head:
    """Makes the output head compute logits at label positions only.

    The head is the largest matrix of a small model, and the loss is on a few tokens of each row. A hook selects these
    positions, so that the head is one 2-D product over them; what the model does to its logits afterwards is unchanged.
    """

    def __init__(self, model):
        self.positions = None
        head = model.get_output_embeddings()
        if head is None:
            raise UserError("finetune: this model has no output head: it is not a causal language model.")
        head.register_forward_pre_hook(self._select)

    def _select(self, _module, arguments):
        if self.positions is None:  # not set: all positions
            return None
        hidden = arguments[0]
        return (hidden.reshape(-1, hidden.shape[-1])[self.positions], *arguments[1:])


def loss_sum(
    peft, head: Head, data: Data, chosen: np.ndarray, device, max_shared_len: float = 0, one_pass: bool = False
):
    """Sum of the answer tokens' cross entropy over some sequences, float32 scalar tensor, and their number.

    Args:
        max_shared_len: rows up to this length are computed with a shared prefix (0: as a plain padded batch).
        one_pass: compute all rows in one forward pass, since processes that share a model's weights must make equally many.
    """
    rows = data.rows_of(chosen)
    # Packed sequences hold rows of all lengths: only those of similar length are padded to one.
    groups = [rows[group] for group in by_length(data.lengths[rows])] if data.packed else [rows]
    if data.needed[rows].max() <= max_shared_len:
        loss = _shared_loss(peft, head, data, groups, device)
    else:
        groups = [rows] if one_pass else groups
        loss = sum(_padded_loss(peft, head, data, group, device) for group in groups)
    return loss, int(data.answers[rows].sum())


def _shared_loss(peft, head: Head, data: Data, groups: list[np.ndarray], device):
    """The loss of groups of rows in one pass, each group with its shared prefix."""
    from slmake.training import shared_prefix

    layouts = [shared_prefix.Layout([data.row(index) for index in group], device) for group in groups]
    layout = layouts[0] if len(layouts) == 1 else shared_prefix.Packed(layouts)
    targets, indices, start = [], [], 0
    for part, group in zip(layouts, groups, strict=True):
        rows, positions, next_tokens = data.targets(group)
        targets.append(next_tokens)
        indices.append(part.index[rows, positions] + start)
        start += part.tokens
    targets = to_device(np.concatenate(targets), device)
    head.positions = to_device(np.concatenate(indices), device)
    return _cross_entropy(shared_prefix.forward(peft, layout), targets)


def _padded_loss(peft, head: Head, data: Data, group: np.ndarray, device):
    """The loss of some rows as a padded batch."""
    rows, positions, next_tokens = data.targets(group)
    targets = to_device(next_tokens, device)
    batch = data.batch(group, device)
    time = batch["input_ids"].shape[1]
    head.positions = to_device(rows * time + positions, device)
    logits = peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return _cross_entropy(logits, targets)


def _cross_entropy(logits, targets):
    import torch

    logits = logits.reshape(len(targets), -1)
    return torch.nn.functional.cross_entropy(
        logits.float() if logits.dtype.itemsize < 4 else logits, targets, reduction="sum"
    )
