"""The section `merge` of params.yaml."""

from typing import Literal

from pydantic import Field

from slmake.params.base import Dtype, Section


class Merge(Section):
    """The adapter merged into the base, tensor by tensor."""

    dtype: Dtype = Field(
        "auto", description="Data type of build/merged; `auto` keeps each tensor's own. Sums are taken in float32."
    )
    onto: Literal["full_precision", "dequantized"] = Field(
        "full_precision",
        description="qlora only: merge onto the full-precision base, or onto the dequantized 4-bit weights the adapter was trained on.",
    )
