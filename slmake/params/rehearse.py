"""The section `rehearse` of params.yaml."""

from pydantic import Field

from slmake.params.base import Section


class Rehearse(Section):
    """The whole chain on a shrunken twin of the base model, before anything long runs."""

    logits_tolerance: float = Field(
        1e-3,
        gt=0,
        le=0.1,
        description="Largest difference between the logits of the twin's fp32 export and transformers', as a share of their spread.",
    )
    memory_gb: float | None = Field(
        None, gt=0, description="Memory that the build may use, in GB; what this machine has if absent."
    )
    disk_gb: float | None = Field(
        None, gt=0, description="Disk space that the build may use, in GB; what is free here if absent."
    )
    refuse: bool = Field(
        True, description="Stop where the estimate says that the build does not fit. `false` only prints the table."
    )
