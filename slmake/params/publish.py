"""The section `publish` of params.yaml."""

from pydantic import Field, model_validator

from slmake.params.base import Section
from slmake.sources.schemes import parse


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
