"""The model that is trained: device, data type, base, adapters, and the loss on answer tokens."""

from pathlib import Path

import numpy as np

from slmake import params
from slmake.errors import UserError
from slmake.training.data import Data


def pick_device(number: int = 0):
    """The GPU of that number if there is one, else the CPU."""
    import torch

    return torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, device):
    """The data type of the frozen base: `auto` is bfloat16 where its products are the faster ones, else float32.

    By the kind of processor, not by a timing, so that one machine always chooses the same. Measured (docs/log.md): AMD's
    AVX-512 does bfloat16 products at four times the float32 rate, Intel's without AMX at two thirds of it.
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


def load_model(section: params.Finetune, base: Path, device, place=None):
    """The base model with fresh adapters, ready to train on `device`; it lies there, or in `place`.

    Raises:
        UserError: the folder is missing or damaged, or target modules match nothing.
    """
    import torch
    from peft import LoraConfig, get_peft_model
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
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": place or device},
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
    model.requires_grad_(False)
    for module in model.modules():
        # bitsandbytes' inference kernel repacks 4-bit weights in eval() for good and has no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if isinstance(section.target_modules, list):
        # PEFT only complains if none of the names matches.
        names = [f".{name}" for name, _ in model.named_modules()]
        lost = [target for target in section.target_modules if not any(name.endswith(f".{target}") for name in names)]
        if lost and len(lost) < len(section.target_modules):
            raise UserError(f"finetune.target_modules: {lost} matches no module of this model.")
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
            f"finetune.target_modules: {section.target_modules} matches no module of this model. Linear modules there: {', '.join(linear)}."
        ) from error
    adapted = [module.get_base_layer() for module in peft.modules() if hasattr(module, "get_base_layer")]
    if any(layer is embedding or (tied and layer is head) for layer in adapted):
        raise UserError(
            "finetune.target_modules: an adapter on the input embedding, or on an output head that shares its weights, cannot be "
            "merged. Leave it out."
        )
    if section.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # The adapters stay in float32 even over a bfloat16 base (peft's default); the loss head sees label positions only.
    return peft


class Head:
    """Lets the output head compute logits at label positions only.

    The head is the largest matrix of a small model, and the loss is on a few tokens of each row: computing it for the
    rest is most of the waste of a plain forward pass. A hook picks the positions as one 2-D product; everything a model
    does to its logits afterwards stays as it is.
    """

    def __init__(self, model):
        self.positions = None
        head = model.get_output_embeddings()
        if head is None:
            raise UserError("finetune: this model has no output head: it is not a causal language model.")
        head.register_forward_pre_hook(self._pick)

    def _pick(self, _module, arguments):
        if self.positions is None:  # not asked yet: all of them
            return None
        hidden = arguments[0]
        return (hidden.reshape(-1, hidden.shape[-1])[self.positions], *arguments[1:])


def loss_sum(peft, head: Head, data: Data, chosen: np.ndarray, device, longest: float = 0):
    """Sum of the answer tokens' cross entropy over some sequences, float32 scalar tensor, and their number.

    Args:
        longest: sequences up to this length go through the model by `prefix.Layout` (0: as a plain padded batch).
    """
    import torch

    from slmake.training import shared_prefix

    rows, places, targets = data.targets(chosen)
    wanted = torch.from_numpy(targets).to(device)
    if data.needed[chosen].max() <= longest:
        layout = shared_prefix.Layout([data.row(one) for one in chosen], device)
        head.positions = layout.token[rows, places]
        logits = shared_prefix.forward(peft, layout)
    else:
        batch = data.batch(chosen, device)
        time = batch["input_ids"].shape[1]
        head.positions = torch.from_numpy(rows * time + places).to(device)
        logits = peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(len(wanted), -1).float(), wanted, reduction="sum")
    return loss, len(wanted)
