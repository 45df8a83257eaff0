"""The section `quantize` of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slmake.params.base import BlockSize, Section

Algorithm = Literal["default", "rtn", "k_quant"]
Calibration = Literal["none", "gptq"]
AccuracyLevel = Annotated[int, Field(ge=0, le=4)]


class Search(Section):
    """Values to try for options of `quantize`; an empty list keeps the section's own. All combinations are tried if they fit the
    budget, else Optuna's multi-objective TPE sampler (Ozaki et al. 2022) proposes them, a batch at a time."""

    algo_config: list[Algorithm] = Field([], description="Algorithms.")
    calibration: list[Calibration] = Field([], description="Calibrations.")
    block_size: list[BlockSize] = Field([], description="Block sizes.")
    is_symmetric: list[bool] = Field([], description="With and without zero points.")
    accuracy_level: list[AccuracyLevel] = Field([], description="Accuracy levels.")
    node_accuracy_levels: list[dict[str, AccuracyLevel]] = Field(
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
    execution_provider: Literal["cpu", "cuda", "dml", "webgpu"] = Field(
        "cpu",
        description="Where the model will run. It is exported and checked on any machine, on the CPU where the target is not available.",
    )
    algo_config: Algorithm = Field("k_quant", description="int4: quantization algorithm.")
    calibration: Calibration = Field(
        "none",
        description="int4: `gptq` chooses the 4-bit weights that change the outputs on training prompts least (Frantar et al. 2022, "
        "arXiv:2210.17323), then the builder rounds to nearest. Needs algo_config rtn, is_symmetric true.",
    )
    calibration_rows: int = Field(256, ge=1, le=1_000_000, description="gptq: training rows to run.")
    block_size: BlockSize = Field(32, description="int4 and int8: weights that share one scale.")
    is_symmetric: bool = Field(True, description="int4 and int8: no zero points.")
    accuracy_level: int = Field(
        4,
        ge=0,
        le=4,
        description="Minimum type the matrix product accumulates in: 0 unset, 1 fp32, 2 fp16, 3 bf16, 4 int8.",
    )
    node_accuracy_levels: dict[str, AccuracyLevel] = Field(
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
        # Not fp32 for cuda: the builder writes a graph that ONNX Runtime refuses (no output present.0.key).
        allowed = {"cpu": ("int4", "int8", "fp32"), "cuda": ("int4", "int8", "fp16"), "dml": ("int4", "fp16")}
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
