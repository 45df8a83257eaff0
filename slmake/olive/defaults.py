"""What a pass of Olive's does where a configuration leaves an option out, as Olive 0.13 and the trainer of transformers have it.

Options that change nothing in what is trained (logging, checkpoints, loading) keep the defaults of params.yaml.
"""

LORA = {
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.03,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "group_by_length": False,
    "max_grad_norm": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "weight_decay": 0.0,
    "seed": 42,
}
TRAINED = {"lora": LORA, "qlora": LORA | {"double_quant": False, "quant_type": "nf4"}}
WEIGHTS = {
    "gptq": {"block_size": 128, "is_symmetric": False},
    "rtn": {"block_size": 128, "is_symmetric": False},
    "kquant": {"block_size": 32, "is_symmetric": False},
}
OLIVE = {"block_size": "group_size", "is_symmetric": "sym"}  # names that differ there
MODULES = (
    "there the modules that PEFT has for the model's type ([q_proj, v_proj] for Llama, Mistral, Qwen and Gemma; [o_proj, qkv_proj] for "
    "Phi-3); finetune.target_modules: 'all-linear'"
)


def training(reader, where: str) -> None:
    """The section finetune, where the configuration says nothing of a field."""
    section = reader.params["finetune"]
    for name, value in TRAINED[section["method"]].items():
        take(reader, where, f"finetune.{name}", value)
    take(reader, where, "finetune.data_seed", section["seed"])
    if "target_modules" not in section:
        reader.row("default", where, "all linear layers" if section["method"] == "qlora" else MODULES)
    if "compute_dtype" not in section:
        reader.row("default", where, "bfloat16 there; finetune.compute_dtype: 'auto', which is bfloat16 on GPUs")


def weights(reader, given: dict[str, set[str]]) -> None:
    """The section quantize, where passes over PyTorch weights say nothing of a field.

    Args:
        given: names of the options that each kind of pass has.
    """
    for kind, names in given.items():
        for name, value in WEIGHTS.get(kind, {}).items():
            if OLIVE[name] in names:
                continue
            if kind == "gptq" and name == "is_symmetric":
                reader.row("default", "passes", "zero points there; gptq rounds symmetrically here")
            else:
                take(reader, "passes", f"quantize.{name}", value)


def rows(reader) -> None:
    """The section prepare, likewise."""
    take(reader, "data_configs", "prepare.strategy", "join")


def take(reader, where: str, target: str, value: object) -> None:
    """Set a field that is not set."""
    section, _, name = target.partition(".")
    if name not in reader.params[section]:
        reader.params[section][name] = value
        reader.row("default", where, f"{target}: {value!r}")
