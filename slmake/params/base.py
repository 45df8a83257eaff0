"""What every section of params.yaml is made of."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=0.5)]
Dtype = Literal["float32", "bfloat16", "float16"]
Split = Literal["train", "eval", "test"]


class Section(BaseModel):
    """A strict section: no unknown field, no silent conversion between types, no number that is not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)
