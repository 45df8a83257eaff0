"""The section `adapter` of params.yaml."""

from pydantic import Field, model_validator

from slmake.params.base import Section
from slmake.sources.schemes import FORMS, parse


class Adapter(Section):
    """A PEFT LoRA adapter that another trainer made: merged where all.stages lists merge without finetune."""

    source: str | None = Field(
        None,
        min_length=1,
        description="Where the adapter comes from: a folder with adapter_config.json and adapter_model.safetensors, as PEFT, TRL, Axolotl, "
        f"Unsloth and LLaMA-Factory write it. As {FORMS}.",
    )
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="SHA-256 of the folder, as results/adapter.json shows it."
    )

    @model_validator(mode="after")
    def _is_a_source(self):
        if self.source is not None and parse(self.source).member:
            raise ValueError("an adapter is a folder, not a file inside a wheel")
        return self
