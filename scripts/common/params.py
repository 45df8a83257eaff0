"""params.yaml: every knob that can change a result, one section per rule.

    PYTHONPATH=scripts python -m common.params params.yaml    # check the file

`load` reads and validates the whole file and reports every error in it at once; `section` gives one rule its own
part. The models below are the single source of names, bounds, defaults and descriptions: the JSON Schema
(docs/params.schema.json) and the reference page (docs/params.md) are generated from them (common/params_docs.py).
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AliasChoices, Field, ValidationError, model_validator

from common.errors import UserError
from common.params_errors import Loader, lines
from common.params_gates import PARITY, PER_CLASS, TIMINGS, Gate, Gates
from common.params_section import Section
from common.prompts import fields_of, split_at_answer
from sources.syntax import KINDS, parse

__all__ = ["PARITY", "PER_CLASS", "TIMINGS", "Gate", "Gates", "Section"]

Fraction = Annotated[float, Field(ge=0, le=0.5)]
Dtype = Literal["float32", "bfloat16", "float16"]
Split = Literal["train", "eval", "test"]
Stage = Literal["finetune", "merge", "quantize", "evaluate", "gates", "package", "report", "publish"]


class All(Section):
    """What `snakemake --cores all` builds."""

    stages: list[Stage] = Field(
        ["finetune", "merge", "quantize", "evaluate", "gates", "package", "report"],
        description="Stages to run after fetch_model and prepare. Leave out finetune and merge to quantize the base model; "
        "leave out all but finetune to stop after the adapter.",
    )
    container: str | None = Field(
        None,
        pattern=r"^(docker://[^@\s]+|oras://[^@\s]+|[^@:\s]+\.sif)@sha256:[0-9a-f]{64}$",
        description="Image in which `snakemake --profile profiles/container` (or `profiles/slurm`) runs every rule, with its digest: "
        "`containers/slmake-cpu.sif@sha256:…` (`make sif` prints it) or `docker://HOST/NAME@sha256:…`. Another image is another "
        "environment: everything is built again. See docs/containers.md.",
    )

    @model_validator(mode="after")
    def _stages_fit_together(self):
        chosen = set(self.stages)
        if len(chosen) != len(self.stages):
            raise ValueError("a stage is listed twice")
        if "merge" in chosen and "finetune" not in chosen:
            raise ValueError("merge needs finetune: list finetune too, or leave merge out")
        if "quantize" in chosen and "finetune" in chosen and "merge" not in chosen:
            raise ValueError("quantize after finetune needs merge: list merge too")
        if "publish" in chosen and "quantize" not in chosen:
            raise ValueError("publish needs quantize: it uploads the exported model")
        if "gates" in chosen and "evaluate" not in chosen:
            raise ValueError("gates needs evaluate: list evaluate too, or leave gates out")
        if "report" in chosen and "evaluate" not in chosen:
            raise ValueError("report needs evaluate: list evaluate too, or leave report out")
        if "package" in chosen and not {"quantize", "gates"} <= chosen:
            raise ValueError("package needs quantize and gates: list both, or leave package out")
        return self


class FetchModel(Section):
    """The base model, copied to build/base as safetensors."""

    source: str = Field(
        min_length=1,
        description="Where the base model comes from: a folder in Hugging Face layout, an MLflow model folder, a `.gguf` file, or a file "
        f"inside a wheel (`….whl/inner/file.gguf`). As {KINDS}; pinned by `#sha256=…` or `#etag=…` behind it (docs/azure.md).",
    )
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the wheel or file; of a folder, the `sha256` that results/base.json shows for it. The same as `#sha256=…` "
        "behind the source. Required for `pypi:` sources.",
    )
    trust_remote_code: Literal[False] = Field(
        False,
        description="Always false: no code from a model repository is run. Models must be native to transformers.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32",
        description="Data type of the weights in build/base. `auto` keeps what the source has (float32 for GGUF).",
    )

    @model_validator(mode="after")
    def _pinned(self):
        source = parse(self.source)
        if source.kind == "pypi" and not (self.sha256 or source.sha256):
            raise ValueError(
                "sha256 is required for a `pypi:` source, so that the same bytes are used everywhere "
                "(`pip download --no-deps NAME==VERSION` and `sha256sum` give it)"
            )
        if self.sha256 and source.sha256 and self.sha256 != source.sha256:
            raise ValueError("sha256 and the #sha256= behind the source differ: give one of them")
        return self


class Message(Section):
    """One turn of a chat; `content` is a template over the row's fields."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class Files(Section):
    """One file per split."""

    train: str = Field(min_length=1, description="Training rows.")
    eval: str | None = Field(
        None, description="Rows for the loss during training; cut from train by `eval_fraction` if absent."
    )
    test: str | None = Field(
        None, description="Held-out rows for evaluate; cut from train by `test_fraction` if absent."
    )


class Prepare(Section):
    """Rows in, tokenized train, eval and test splits out."""

    source: Annotated[str, Field(min_length=1)] | Files = Field(
        description="The dataset: one file (JSON array, JSON Lines, CSV or Parquet), split by the fractions below, "
        f"or a mapping of train, eval and test to files. Each file as {KINDS}; a hub's is a data set's."
    )
    text_template: str | None = Field(
        None,
        description="Text of one example over the row's fields, such as `### Text: {phrase}\\n### The tone is:\\n{tone}`. "
        "Give this or `messages`. `{{` and `}}` are literal braces.",
    )
    messages: str | list[Message] | None = Field(
        None,
        description="Chat instead of text: a list of role and content templates, or the name of a column that holds such a list. "
        "The tokenizer's chat template is applied, and the last assistant turn is the answer.",
    )
    answer: str | None = Field(
        None,
        description="The field whose placeholder starts the answer in `text_template`; the last placeholder if absent.",
    )
    strategy: Literal["line-by-line", "join"] = Field(
        "line-by-line",
        description="`line-by-line`: one sequence per row. `join`: whole rows packed into sequences of up to `max_seq_len` "
        "(train and eval; test is always line by line).",
    )
    max_seq_len: int = Field(
        1024,
        ge=8,
        le=1_048_576,
        validation_alias=AliasChoices("max_seq_len", "source_max_len"),
        description="Longest sequence in tokens (`source_max_len` is accepted too). A longer prompt loses tokens at its start "
        "and is counted as truncated; a row whose answer alone does not fit is an error.",
    )
    pad_to_max_len: bool = Field(
        False, description="Pad every sequence to `max_seq_len` instead of to the longest of its batch."
    )
    use_attention_mask: bool = Field(
        True,
        description="Pass a padding mask to the model. Padding is on the right and attention is causal, so no real token sees "
        "padding either way.",
    )
    eval_fraction: Fraction = Field(0.05, description="Share of the rows for the eval split (0 to 0.5).")
    test_fraction: Fraction = Field(
        0.2,
        description="Share of the rows for the test split (0 to 0.5), stratified by answer when there are few different ones.",
    )
    duplicates: Literal["remove", "refuse"] = Field(
        "remove",
        description="What to do with training rows that are exact or near copies of an eval or test row: leave them out of "
        "train, or stop with an error that names them.",
    )
    near_duplicate_threshold: float = Field(
        0.8,
        gt=0.5,
        le=1.0,
        description="Jaccard similarity of word 3-shingles of the prompt's fields from which two rows count as near duplicates. "
        "1.0 finds exact copies (after folding case and white space) only.",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of the split.")
    max_samples: int | None = Field(None, ge=1, description="Use a random sample of this many rows (before splitting).")

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, data):
        if isinstance(data, dict) and {"max_seq_len", "source_max_len"} <= data.keys():
            raise ValueError("max_seq_len and source_max_len are two names of one field: give one of them")
        return data

    @property
    def files(self) -> dict[str, str]:
        """The source of each split that has one."""
        given = self.source.model_dump() if isinstance(self.source, Files) else {"train": self.source}
        return {name: file for name, file in given.items() if file}

    @model_validator(mode="after")
    def _sources(self):
        for file in self.files.values():
            source = parse(file)
            if source.kind == "hf" and not source.path:
                raise ValueError(f"`{source.text}` names no file: hf:ORG/NAME@REVISION/FILE")
            if source.kind in ("registry", "pypi") or source.member:
                raise ValueError(f"`{source.text}` is a source of models, not of rows")
        return self

    @model_validator(mode="after")
    def _one_form(self):
        if (self.text_template is None) == (self.messages is None):
            raise ValueError("give either text_template or messages")
        if self.answer is not None and self.messages is not None:
            raise ValueError("answer goes with text_template; with messages the last assistant turn is the answer")
        if isinstance(self.messages, list) and (not self.messages or self.messages[-1].role != "assistant"):
            raise ValueError("the last of messages must be the assistant's turn: it is the answer")
        if self.eval_fraction + self.test_fraction > 0.9:
            raise ValueError("eval_fraction and test_fraction leave less than a tenth of the rows for training")
        return self

    @model_validator(mode="after")
    def _templates(self):
        try:
            if self.text_template is not None:
                split_at_answer(self.text_template, self.answer)
            for turn in self.messages if isinstance(self.messages, list) else []:
                fields_of(turn.content, "prepare.messages")
        except UserError as error:
            raise ValueError(str(error).removesuffix(".")) from None
        return self


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
    target_modules: Literal["all-linear"] | list[str] = Field(
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
    qat: Literal["none", "int4"] = Field(
        "none",
        description="Quantization-aware training: `int4` trains through the weights as symmetric round-to-nearest will leave "
        "them (method lora, no dropout). Fits quantize's algo_config rtn and is_symmetric true.",
    )
    qat_block_size: Literal[16, 32, 64, 128, 256] = Field(
        32, description="qat: weights that share one scale, as in quantize.block_size."
    )
    qat_target_modules: Literal["all-linear"] | list[str] = Field(
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
    def _early_stopping_can_see(self):
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError("early stopping needs eval_steps of 1 or more")
        if self.qat != "none" and (self.method != "lora" or self.lora_dropout):
            raise ValueError("qat goes with method lora and lora_dropout 0")
        if self.sharding != "none" and (self.method != "lora" or self.qat != "none"):
            raise ValueError("sharding goes with method lora and qat none")
        if isinstance(self.target_modules, list) and not self.target_modules:
            raise ValueError("target_modules is empty: name at least one module, or use all-linear")
        return self


class Merge(Section):
    """The adapter folded into the base, tensor by tensor."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Data type of build/merged; `auto` keeps each tensor's own. Sums are taken in float32."
    )
    onto: Literal["full_precision", "dequantized"] = Field(
        "full_precision",
        description="qlora only: merge onto the full-precision base, or onto the dequantized 4-bit weights the adapter was trained on.",
    )


class Search(Section):
    """Values to try for options of `quantize`; an empty list keeps the section's own. All combinations are tried if they fit the
    budget, else Optuna's multi-objective TPE sampler (Ozaki et al. 2022) proposes them, a batch at a time."""

    algo_config: list[Literal["default", "rtn", "k_quant"]] = Field([], description="Algorithms.")
    calibration: list[Literal["none", "gptq"]] = Field([], description="Calibrations.")
    block_size: list[Literal[16, 32, 64, 128, 256]] = Field([], description="Block sizes.")
    is_symmetric: list[bool] = Field([], description="With and without zero points.")
    accuracy_level: list[Annotated[int, Field(ge=0, le=4)]] = Field([], description="Accuracy levels.")
    node_accuracy_levels: list[dict[str, Annotated[int, Field(ge=0, le=4)]]] = Field(
        [], description="Mappings of patterns to accuracy levels."
    )
    matmul_mixed_precision: list[str | None] = Field([], description="Mixed precisions; null for none.")
    int8_nodes: list[list[str]] = Field([], description="Lists of patterns.")
    nodes_to_exclude: list[list[str]] = Field([], description="Lists of node names.")
    budget: int = Field(12, ge=1, le=1000, description="Candidates to build at most.")
    batch: int = Field(4, ge=1, le=1000, description="Optuna: candidates that are proposed, and may run, together.")
    objective: Literal["size", "latency"] = Field(
        "size",
        description="Of the candidates that pass the gates on the tuning rows, take the smallest or the fastest.",
    )
    rows: int = Field(
        200,
        ge=8,
        le=1_000_000,
        description="Tuning rows: the eval split, and as many training rows as are missing. Never test rows.",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of Optuna's sampler.")


class Quantize(Section):
    """Options of the ONNX Runtime GenAI model builder, under the names that builder reads today."""

    precision: Literal["int4", "int8", "fp16", "fp32"] = Field("int4", description="Precision of the exported weights.")
    execution_provider: Literal["cpu", "cuda", "dml", "webgpu"] = Field("cpu", description="Where the model will run.")
    algo_config: Literal["default", "rtn", "k_quant"] = Field("k_quant", description="int4: quantization algorithm.")
    calibration: Literal["none", "gptq"] = Field(
        "none",
        description="int4: `gptq` places the 4-bit weights so that the outputs on training prompts change least (Frantar et al. 2022, "
        "arXiv:2210.17323), then lets the builder round to nearest. Needs algo_config rtn, is_symmetric true.",
    )
    calibration_rows: int = Field(256, ge=1, le=1_000_000, description="gptq: training rows to run.")
    block_size: Literal[16, 32, 64, 128, 256] = Field(32, description="int4 and int8: weights that share one scale.")
    is_symmetric: bool = Field(True, description="int4 and int8: no zero points.")
    accuracy_level: int = Field(
        4,
        ge=0,
        le=4,
        description="Minimum type the matrix product accumulates in: 0 unset, 1 fp32, 2 fp16, 3 bf16, 4 int8.",
    )
    node_accuracy_levels: dict[str, Annotated[int, Field(ge=0, le=4)]] = Field(
        {},
        description="int4 and int8: another accuracy level for products whose names match a pattern (the last that matches counts), such as "
        "`{'*/down_proj/*': 1}`. The builder has one level for all; these are written into its graph.",
    )
    matmul_mixed_precision: str | None = Field(
        "last_matmul:int8,mixed_layers:int8",
        description="int4: keep some products in 8 bits: `last_matmul:int8` (the output head), `mixed_layers:int8` (the layers that "
        "lose most), or both with a comma. Needs algo_config k_quant or rtn.",
    )
    int8_nodes: list[str] = Field(
        [],
        description="int4: products to keep in 8 bits, as patterns of node names: `*/attn/*` (all of attention), `*/down_proj/*`, "
        "`/model/layers.0/*`.",
    )
    op_types_to_quantize: list[Literal["MatMul", "Gather"]] | None = Field(
        None, description="ONNX operators to quantize; the builder's choice (MatMul) if absent."
    )
    nodes_to_exclude: list[str] = Field([], description="Names of graph nodes to leave unquantized.")
    shared_embeddings: bool | None = Field(
        None,
        description="Share the quantized embedding with the output head where the model ties them; the builder's choice if absent.",
    )
    prune_lm_head: bool = Field(
        True,
        description="Compute the logits of a prompt's last token only, which is all that generation needs: the same answers, sooner. "
        "`false` where a program reads every position's logits (perplexity of the prompt, speculative decoding).",
    )
    search: Search | None = Field(
        None,
        description="Build several candidates, measure them on tuning rows and take the best that passes the gates.",
    )

    @model_validator(mode="after")
    def _options_fit_together(self):
        if self.matmul_mixed_precision is not None:
            for part in self.matmul_mixed_precision.split(","):
                where, _, what = part.strip().partition(":")
                if where not in ("last_matmul", "mixed_layers") or what not in ("int8", "int4"):
                    raise ValueError(
                        f"matmul_mixed_precision: `{part}` is not one of last_matmul:int8, mixed_layers:int8 (comma between them)"
                    )
            if self.precision == "int4" and self.algo_config == "default":
                raise ValueError(
                    "matmul_mixed_precision with algo_config `default` writes a model that ONNX Runtime refuses to load: "
                    "use k_quant or rtn, or set matmul_mixed_precision to null"
                )
        allowed = {"cpu": ("int4", "int8", "fp32"), "cuda": ("int4", "int8", "fp16", "fp32"), "dml": ("int4", "fp16")}
        allowed["webgpu"] = ("int4", "int8")
        if self.precision not in allowed[self.execution_provider]:
            raise ValueError(
                f"the builder has no {self.precision} for {self.execution_provider}: choose {', '.join(allowed[self.execution_provider])}"
            )
        if self.int8_nodes and (self.precision != "int4" or self.algo_config == "default"):
            raise ValueError("int8_nodes goes with precision int4 and algo_config rtn or k_quant")
        if self.node_accuracy_levels and self.precision not in ("int4", "int8"):
            raise ValueError("node_accuracy_levels goes with precision int4 or int8")
        if self.calibration == "gptq":
            if (self.precision, self.algo_config, self.is_symmetric) != ("int4", "rtn", True):
                raise ValueError(
                    "calibration gptq goes with precision int4, algo_config rtn and is_symmetric true: set these, or calibration to none"
                )
            if "mixed_layers" in (self.matmul_mixed_precision or ""):
                raise ValueError("calibration gptq: say which layers keep 8 bits by int8_nodes, not by mixed_layers")
        return self


class Evaluate(Section):
    """Scores on the held-out test split."""

    models: list[Literal["base", "adapter", "merged", "onnx"]] = Field(
        ["base", "adapter", "merged", "onnx"],
        min_length=1,
        description="What to score. `onnx` appears in the results under the name of its precision (int4, int8, fp16, fp32).",
    )
    max_samples: int | None = Field(None, ge=1, description="Score only the first this many test rows.")
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Generation length in tokens; the longest answer of the dataset (with its end token) if absent.",
    )
    batch_size: int = Field(32, ge=1, le=4096, description="Rows per batch for base, adapter and merged.")
    parity_prompts: int = Field(
        64,
        ge=1,
        le=100_000,
        description="Compare logits over at least this many prompts: where the test split is smaller, prompts of eval and train are added.",
    )
    latency_rows: int = Field(
        16, ge=0, le=10_000, description="Test rows that merged (or base) answers one by one to measure its latency."
    )
    bootstrap_samples: int = Field(
        2000,
        ge=100,
        le=100_000,
        description="Bootstrap resamples behind the 95% intervals of accuracy, macro-F1 and drops.",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of the resamples.")


class Package(Section):
    """What a user ships: build/package."""

    name: str = Field("slmake-model", min_length=1, pattern=r"^[\w.-]+$", description="The model's name.")
    license: str = Field("Apache-2.0", min_length=1, description="SPDX identifier of the model's licence.")
    license_files: list[str] = Field(["LICENSE"], min_length=1, description="Licence texts to ship.")
    language: list[str] = Field(["en"], description="Languages, as ISO 639 codes.")
    tags: list[str] = Field([], description="More tags for a model hub.")
    intended_use: str = Field(
        "Not described yet: say in package.intended_use what the model is for.",
        min_length=1,
        description="What the model is for.",
    )
    limitations: str = Field(
        "Scores hold for texts like those it was tested on. It was not tested for bias or misuse.",
        min_length=1,
        description="What a user must know before relying on it.",
    )
    signing_key: str | None = Field(
        None,
        description="File with an elliptic-curve private key (PEM, no password) to sign the package with; keep it out of the repository.",
    )


class Report(Section):
    """Figures and tables of build/report.html."""

    wrong_answers: int = Field(
        10, ge=0, le=1000, description="Wrong answers to show, with every model's answer beside."
    )


class Publish(Section):
    """Upload of the finished model; runs only where `all.stages` lists it."""

    url: str | None = Field(
        None,
        description="Where to: az://container/prefix. The model goes to prefix/DIGEST/, then prefix/latest.json points to it. Credentials "
        "come from the environment (docs/azure.md).",
    )

    @model_validator(mode="after")
    def _place(self):
        if self.url is not None:
            source = parse(self.url, must_pin=False)
            if source.kind != "az" or source.pin:
                raise ValueError("url is not of the form az://container/prefix")
        return self


class Params(Section):
    """The whole file."""

    all: All = Field(default_factory=All)
    fetch_model: FetchModel
    prepare: Prepare
    finetune: Finetune = Field(default_factory=Finetune)
    merge: Merge = Field(default_factory=Merge)
    quantize: Quantize = Field(default_factory=Quantize)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    gates: Gates = Field(default_factory=Gates)
    package: Package = Field(default_factory=Package)
    report: Report = Field(default_factory=Report)
    publish: Publish = Field(default_factory=Publish)


def between_sections(data: dict) -> list[str]:
    """Mistakes between sections, one line each, in a file whose other fields may be wrong too."""

    def value(section: str, field: str) -> object:
        given = data.get(section)
        default = Params.model_fields[section].annotation.model_fields[field].default
        return given.get(field, default) if isinstance(given, dict) else default

    found = []
    if value("merge", "onto") == "dequantized" and value("finetune", "method") == "lora":
        found.append("merge.onto: dequantized goes with finetune.method: qlora.")
    source = value("prepare", "source")
    eval_rows = (isinstance(source, dict) and source.get("eval")) or value("prepare", "eval_fraction") != 0
    if value("finetune", "early_stopping_patience") and not eval_rows:
        found.append(
            "finetune.early_stopping_patience: without eval rows nothing says when to stop. Raise prepare.eval_fraction, "
            "name a file in prepare.source.eval, or set early_stopping_patience to 0."
        )
    stages = value("all", "stages")
    if isinstance(stages, list) and "publish" in stages and not value("publish", "url"):
        found.append("publish.url: missing, and all.stages lists publish. Say where to: az://container/prefix.")
    return found


def load(path: str | Path = "params.yaml") -> Params:
    """Read and validate params.yaml.

    Raises:
        UserError: the file is missing, is not YAML, or breaks the schema; every broken field is named at once.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file. Run from the project's folder, or restore it with `git checkout {path}`."
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a parameter file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        raise UserError(f"{path}: empty. Restore it with `git checkout {path}`.")
    if not isinstance(data, dict):
        found = "a list" if isinstance(data, list) else "a single value"
        raise UserError(f"{path}: expected sections such as `prepare:` and `finetune:`, found {found}.")
    checked, errors = None, []
    try:
        checked = Params.model_validate(data)
    except ValidationError as error:
        errors = lines(error.errors(), data, Params)
    unique = list(dict.fromkeys(errors + between_sections(data)))
    if unique or checked is None:
        count = f"{len(unique)} error{'s' if len(unique) > 1 else ''}"
        raise UserError(
            f"{path}: {count}; nothing was run. See docs/params.md.\n" + "\n".join("  " + line for line in unique)
        )
    return checked


def section(path: str | Path, name: str) -> Section:
    """The validated section `name` of the params file."""
    return getattr(load(path), name)


def as_json(value: Section) -> str:
    """One section with its defaults as canonical JSON: what Snakemake compares to decide whether a rule must run again."""
    return json.dumps(value.model_dump(mode="json"), sort_keys=True)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="params.yaml", help="the file to check (default: params.yaml)")
    arguments = parser.parse_args()
    try:
        print(f"{arguments.file}: {len(load(arguments.file).model_fields_set)} sections, valid")
    except UserError as problem:
        sys.exit(f"error: {problem}")
