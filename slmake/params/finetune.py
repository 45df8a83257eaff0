"""The section `finetune` of params.yaml."""

from typing import Literal

from pydantic import Field, model_validator

from slmake.params.base import AllLinear, BlockSize, Section


class Finetune(Section):
    """LoRA (Hu et al. 2021, arXiv:2106.09685) or QLoRA (Dettmers et al. 2023, arXiv:2305.14314)."""

    method: Literal["lora", "qlora"] = Field("lora", description="qlora keeps the base in 4 bits while training.")
    lora_r: int = Field(16, ge=1, le=1024, description="Rank of the update.")
    lora_alpha: int = Field(32, ge=1, le=8192, description="The update is scaled by lora_alpha / lora_r.")
    lora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout on the adapter's input; the same for all rows of a batch where they begin alike.",
    )
    target_modules: AllLinear | list[str] = Field(
        "all-linear",
        description="Modules that get an adapter: `all-linear` (without the output head) or names such as `[q_proj, v_proj]`.",
    )
    double_quant: bool = Field(True, description="qlora: quantize the quantization constants too.")
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="qlora: 4-bit data type.")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Data type of the frozen base and of the matrix products; adapters and optimizer stay in float32. `auto`: "
        "bfloat16 on CUDA, on CPUs with AMX and on AMD's with AVX-512 bf16, else float32 (measured faster there).",
    )
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        Field("cosine", description="Learning-rate schedule, by transformers' names.")
    )
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="Share of the steps over which the learning rate rises.")
    num_train_epochs: float = Field(
        2.0, gt=0, le=1000, description="Passes over the training rows (fractions allowed)."
    )
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides num_train_epochs.")
    per_device_train_batch_size: int = Field(16, ge=1, le=65536, description="Sequences per device and forward pass.")
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        le=65536,
        description="Forward passes per optimizer step. Several devices share them out: a step trains on the same rows on any number of "
        "devices, which are used best where this is a multiple of it.",
    )
    sharding: Literal["none", "full"] = Field(
        "none",
        description="What each of several devices holds of the base model: all of it, or (`full`, method lora without qat) its share, "
        "for models that do not fit.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, slower."
    )
    group_by_length: bool = Field(True, description="Batch sequences of similar length: less padding.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm to this; 0 turns clipping off.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment decay.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment decay.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    eval_steps: int = Field(
        50, ge=0, description="Optimizer steps between losses on the eval split; 0: only at the end."
    )
    logging_steps: int = Field(5, ge=1, description="Optimizer steps between lines of the loss curve.")
    save_steps: int = Field(25, ge=1, description="Optimizer steps between checkpoints.")
    early_stopping_patience: int = Field(
        0,
        ge=0,
        description="Stop after this many evaluations without a better eval loss and keep the best adapter; 0 turns it off.",
    )
    early_stopping_threshold: float = Field(0.0, ge=0, description="What counts as better, in eval loss.")
    keep_best: bool = Field(
        False,
        description="Keep the adapter with the lowest eval loss instead of the last one, without an early stop.",
    )
    qat: Literal["none", "int4"] = Field(
        "none",
        description="Quantization-aware training: `int4` trains through the weights as symmetric round-to-nearest will leave "
        "them (method lora, no dropout). Fits quantize's algo_config rtn and is_symmetric true.",
    )
    qat_block_size: BlockSize = Field(32, description="qat: weights that share one scale, as in quantize.block_size.")
    qat_target_modules: AllLinear | list[str] = Field(
        "all-linear",
        description="qat: modules that will have 4 bits, by name; leave out what quantize.int8_nodes keeps in 8.",
    )
    qat_rate: float = Field(
        1.0,
        gt=0,
        le=1,
        description="qat: share of the layers that each step quantizes, drawn at random; below 1 the merged model stays good too.",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of the adapter's initial weights and of dropout.")
    data_seed: int = Field(42, ge=0, lt=2**32, description="Seed of the order of the rows.")

    @model_validator(mode="after")
    def _options_fit_together(self):
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError("early stopping needs eval_steps of 1 or more")
        if self.keep_best and not self.eval_steps:
            raise ValueError("keep_best needs eval_steps of 1 or more")
        if self.qat != "none" and (self.method != "lora" or self.lora_dropout):
            raise ValueError("qat goes with method lora and lora_dropout 0")
        if self.sharding != "none" and (self.method != "lora" or self.qat != "none"):
            raise ValueError("sharding goes with method lora and qat none")
        if isinstance(self.target_modules, list) and not self.target_modules:
            raise ValueError("target_modules is empty: name at least one module, or use all-linear")
        return self
