"""What every section of params.yaml is made of."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A strict section: no unknown field, no silent conversion between types, no number that is not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)
