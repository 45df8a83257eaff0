"""What every section of params.yaml is made of."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Fraction = Annotated[float, Field(ge=0, le=0.5)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Model = Literal["base", "adapter", "merged", "onnx"]  # in the order in which they are built
BlockSize = Literal[16, 32, 64, 128, 256]
AllLinear = Literal["all-linear"]
LARGEST = 10**15  # of any number: beyond, neither floats nor the formats of files keep it


class Section(BaseModel):
    """A strict section: no unknown field, no silent conversion between types, no number that is not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _within_reach(cls, value):
        if isinstance(value, int | float) and abs(value) > LARGEST:
            raise ValueError("a number beyond 10^15 is not allowed")
        return value
