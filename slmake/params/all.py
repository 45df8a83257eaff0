"""The section `all` of params.yaml: which stages to build, and in which container."""

from typing import Literal, get_args

from pydantic import Field, model_validator

from slmake.params.base import Section

Stage = Literal["rehearse", "finetune", "merge", "quantize", "evaluate", "gates", "package", "report", "publish"]
# In order of execution: the stages, and the rules that other parameters ask for (adapter.source, quantize.search).
RULES = (
    *("fetch_model", "prepare", "rehearse", "finetune", "adapter", "merge", "candidate", "search"),
    *get_args(Stage)[3:],
)


class All(Section):
    """What `snakemake --cores all` builds."""

    stages: list[Stage] = Field(
        ["rehearse", "finetune", "merge", "quantize", "evaluate", "gates", "package", "report"],
        description="Stages to run after fetch_model and prepare. Leave out finetune and merge to quantize the base model, which "
        "needs no section prepare (evaluate then runs behind quantize, listed or not); "
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
