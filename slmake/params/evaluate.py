"""The section `evaluate` of params.yaml."""

from pydantic import Field, field_validator

from slmake.params import metrics as metrics_module
from slmake.params.base import Model, Section
from slmake.params.constraint import Constraint
from slmake.params.gates import METRICS


class AnswerSampling(Section):
    """Sampled answers: several of every row, with the runtime's sampling."""

    n: int = Field(4, ge=1, le=100, description="Answers of each model to each test row.")
    temperature: float = Field(0.7, gt=0, le=2, description="Below 1, likely tokens become likelier.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Share of the probability that is sampled from (nucleus sampling)."
    )
    seed: int = Field(
        42, ge=0, lt=2**31 - 2**24, description="The same seed gives the same answers on the same machine."
    )


class Evaluate(Section):
    """Scores on the held-out test split."""

    models: list[Model] = Field(
        ["base", "adapter", "merged", "onnx"],
        min_length=1,
        description="What to score. `onnx` appears in the results under the name of its precision (int4, int8, fp16, fp32).",
    )
    max_samples: int | None = Field(None, ge=1, description="Score only the first this many test rows.")
    metrics: list[str | dict[str, str | float]] = Field(
        [],
        description="More scores of every answer, from 0 to 1 each, with intervals, drops and gates: `contains` (the expected answer is in "
        "it), `json_valid`, `{json_schema: FILE}`, `{regex: PATTERN}` (of the whole answer), `{numeric: TOLERANCE}`, `tool_name`, "
        "`tool_arguments` (by value), or a function of your own, `path/to/file.py:function` of (prompt, expected, answer) to a number.",
    )
    lm_eval: list[str] = Field(
        [],
        description="Tasks of EleutherAI's lm-evaluation-harness, run on base, merged and the export: names (`hellaswag`), or YAML files that "
        "define one (what they include, name or call is an input, too). `make lm-eval` installs it. Figures are called `lm_eval.TASK.METRIC`.",
    )
    lm_eval_limit: int | None = Field(None, ge=1, description="Only the first this many rows of each of these tasks.")
    constrain: Constraint = Field(
        "none",
        description="Ask the exported model a second time, and hold its answers to `labels`, `tools` (text, or calls that fit the schemas of "
        "the row's tools), `{regex: PATTERN}` or `{json_schema: FILE}` with the runtime's guidance: `constrained_accuracy`, the metrics "
        "under such names, the shares of valid answers with and without, and the latency.",
    )
    sampling: AnswerSampling | None = Field(
        None,
        description="Also answer as users of open text do, with sampling: `sampled_accuracy` and so on are means over the answers to a row.",
    )
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
        description="Compare logits over at least this many prompts: where the test split is smaller, prompts of eval and train are added. "
        "The adapter is asked this many; it is the same function as the merged model, which is asked all.",
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

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value):
        figures = [metrics_module.parse(entry).figure for entry in value]
        for figure in figures:
            taken = figure in (*METRICS, "per_class", "confusion") or figure.endswith(("_low", "_high"))
            if taken or figures.count(figure) > 1:
                raise ValueError(f"two figures would be called `{figure}`: rename your function")
        return value

    @property
    def answer_metrics(self) -> list[metrics_module.AnswerMetric]:
        """What `metrics` names, parsed."""
        return [metrics_module.parse(entry) for entry in self.metrics]
