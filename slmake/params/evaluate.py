"""The section `evaluate` of params.yaml."""

from pydantic import Field

from slmake.params.base import Model, Section


class Evaluate(Section):
    """Scores on the held-out test split."""

    models: list[Model] = Field(
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
