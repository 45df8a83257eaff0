"""The section `merge` of params.yaml."""

from typing import Literal

from pydantic import Field

from slmake.params.base import Section


class Merge(Section):
    """The adapter folded into the base, tensor by tensor."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Data type of build/merged; `auto` keeps each tensor's own. Sums are taken in float32."
    )
    onto: Literal["full_precision", "dequantized"] = Field(
        "full_precision",
        description="qlora only: merge onto the full-precision base, or onto the dequantized 4-bit weights the adapter was trained on.",
    )
