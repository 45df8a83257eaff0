"""The section `gates` of params.yaml: metrics that can be bounded, and bounds that make sense."""

import difflib
import math
from typing import Literal

from pydantic import Field, ValidationInfo, model_validator

from slmake.params.base import Model, Section

# Metrics that a gate can bound. Of SHARES of rows more is better, and the number of rows limits their resolution.
SHARES = (
    *("accuracy", "macro_f1", "restricted_accuracy", "restricted_macro_f1", "rouge_l", "top1_agreement"),
    *("valid", "constrained_valid", "constrained_accuracy", "constrained_macro_f1", "constrained_rouge_l"),
    *("sampled_accuracy", "sampled_rouge_l"),
)
WITH_INTERVAL = ("accuracy", "macro_f1", "sampled_accuracy")
PARITY = ("kl_mean", "kl_max", "top1_agreement", "logit_diff_max")
TIMINGS = (
    *("latency_ms_p50", "latency_ms_p95", "latency_ms_p99", "prefill_tokens_per_s", "decode_tokens_per_s"),
    *("constrained_latency_ms_p50", "constrained_latency_ms_p95", "constrained_latency_ms_p99"),
    *("generated_tokens_per_s", "load_s", "score_s", "peak_memory_bytes"),
)
OF_ROWS = (
    *(name for name in SHARES if name not in PARITY),
    "outside_labels",
    "answer_perplexity",
)  # of rows with expected answers; also per_class.…
OF_LABELS = (  # of a classification only; also per_class.…
    *("macro_f1", "outside_labels", "restricted_accuracy", "restricted_macro_f1", "constrained_macro_f1"),
)
OF_OPEN_TEXT = ("rouge_l", "constrained_rouge_l", "sampled_rouge_l")
OF_TEXTS = ("perplexity",)  # of the fixed texts, where there is no dataset
METRICS = (*OF_ROWS, *OF_TEXTS, "size_bytes", *PARITY, *TIMINGS)
PER_CLASS = ("precision", "recall", "f1")
Z = 1.959964  # of a 95% interval


class Gate(Section):
    """One bound on one figure of one model."""

    metric: str = Field(
        description="A figure of results/metrics.json or results/benchmark.json, such as `accuracy`, `per_class.joy.recall`, `kl_mean` or "
        "`latency_ms_p95` (docs/quality.md lists them), or one of evaluate.metrics."
    )
    model: Literal["last"] | Model = Field("last", description="Whose figure; `last` is the last model built.")
    minimum: float | None = Field(None, ge=0, description="The figure must be at least this.")
    maximum: float | None = Field(None, ge=0, description="The figure must be at most this.")
    maximum_drop: float | None = Field(
        None, ge=-1, le=1, description="The figure may be at most this much lower than that of `against`."
    )
    minimum_ratio: float | None = Field(
        None, gt=0, description="The figure must be at least this share of `against`'s."
    )
    maximum_ratio: float | None = Field(None, gt=0, description="The figure must be at most this share of `against`'s.")
    against: Literal["previous", "base", "merged", "published"] = Field(
        "previous",
        description="What drops and ratios are measured from; `previous` is merged (base without finetune), `published` the model of "
        "gates.published.",
    )
    interval: Literal["ignore", "worst", "best"] = Field(
        "ignore",
        description="The 95% interval (accuracy, macro_f1 and evaluate.metrics): `worst` asks its worst end to hold the bound, so that chance cannot pass; "
        "`best` fails only when its best end misses, so that chance cannot fail.",
    )

    @property
    def kind(self) -> str:
        """Which of the five bounds is set."""
        return next(name for name in _BOUNDS if getattr(self, name) is not None)

    @property
    def bound(self) -> float:
        return getattr(self, self.kind)

    def rows_needed(self) -> int:
        """Test rows below which this bound says nothing.

        Without the interval's worst end: one row must not weigh more than the distance to a perfect score (or the drop
        allowed). With it: a perfect score must pass, by Wilson's interval (1927): n ≥ z² p / (1 - p).
        """
        if (self.metric not in SHARES and self.metric.split(".")[0] != "per_class") or self.kind.endswith("ratio"):
            return 1
        room = {"minimum": 1 - self.bound, "maximum": self.bound, "maximum_drop": abs(self.bound)}[self.kind]
        if not 0 < room < 1:
            return 1
        return math.ceil(round(Z**2 * (1 - room) / room if self.interval == "worst" else 1 / room, 6))

    @model_validator(mode="after")
    def _one_bound_on_a_known_metric(self, info: ValidationInfo):
        given = [name for name in _BOUNDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{self.metric}: give exactly one of {', '.join(_BOUNDS)}")
        parts = self.metric.split(".")
        of_class = parts[0] == "per_class" and parts[-1] in PER_CLASS and any(parts[1:-1])
        asked_for = tuple((info.context or {}).get("metrics", ()))  # evaluate.metrics of the same file
        own = self.metric.removeprefix("constrained_").removeprefix("sampled_") in asked_for or (
            "lm_eval" in asked_for and self.metric.startswith("lm_eval.")
        )
        if self.metric not in METRICS and not of_class and not own:
            near = difflib.get_close_matches(self.metric, METRICS + asked_for, n=1)
            known = ", ".join(METRICS + asked_for)
            hint = (
                f"did you mean `{near[0]}`"
                if near
                else f"known: {known}, per_class.LABEL.f1, and what evaluate.metrics names"
            )
            raise ValueError(f"unknown metric `{self.metric}`; {hint}")
        if (
            (of_class or self.metric in (*SHARES, "outside_labels"))
            and self.kind in ("minimum", "maximum")
            and self.bound > 1
        ):
            raise ValueError(f"{self.metric}: {self.kind} {self.bound:g} is not allowed: it is a share, from 0 to 1")
        if self.interval != "ignore" and (not (own or self.metric in WITH_INTERVAL) or self.kind.endswith("ratio")):
            raise ValueError(
                f"{self.metric}: there are intervals for minimum, maximum and maximum_drop of {', '.join(WITH_INTERVAL)} and evaluate.metrics only"
            )
        less_is_better = "perplexity" in self.metric or "bits_per_byte" in self.metric
        if self.kind == "maximum_drop" and (less_is_better or (self.metric not in SHARES and not of_class and not own)):
            raise ValueError(f"{self.metric}: more is not better, so a drop is no loss: use maximum or maximum_ratio")
        if self.metric in PARITY and self.kind not in ("minimum", "maximum"):
            raise ValueError(f"{self.metric} compares two models already: use minimum or maximum")
        return self


_BOUNDS = ("minimum", "maximum", "maximum_drop", "minimum_ratio", "maximum_ratio")


class Gates(Section):
    """What the last model built must reach; a missed gate fails the build. docs/quality.md shows how to choose."""

    min_accuracy: float | None = Field(None, ge=0, le=1, description="Lowest accuracy on the test split.")
    max_accuracy_drop: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Largest loss of accuracy from merged (or base, without finetune) to the exported model.",
    )
    max_tokenizer_differences: int | None = Field(
        0,
        ge=0,
        description="Largest number of test prompts and answers that the exported model's tokenizer encodes or decodes differently from "
        "training's; null for no gate.",
    )
    checks: list[Gate] = Field(
        [],
        description="More gates: `{metric, model, one of minimum, maximum, maximum_drop, minimum_ratio, maximum_ratio, against, interval}`.",
    )
    published: str | None = Field(
        None,
        description="The last published model's metrics, for `against: published`: a metrics.json, or a file with it under `metrics`.",
    )

    @model_validator(mode="after")
    def _published_is_named(self):
        if self.published is None and any(gate.against == "published" for gate in self.checks):
            raise ValueError("a gate is against `published`: name the last published model's metrics.json in published")
        return self

    def every(self) -> dict[str, Gate]:
        """All gates with a metric by name, the two short forms first."""
        gates = {}
        if self.min_accuracy is not None:
            gates["min_accuracy"] = Gate(metric="accuracy", minimum=self.min_accuracy)
        if self.max_accuracy_drop is not None:
            gates["max_accuracy_drop"] = Gate(metric="accuracy", maximum_drop=self.max_accuracy_drop)
        return gates | {f"checks[{i}]": gate for i, gate in enumerate(self.checks)}
