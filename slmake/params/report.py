"""The section `report` of params.yaml."""

from pydantic import Field

from slmake.params.base import Section


class Report(Section):
    """Figures and tables of build/report.html."""

    seeds: str | None = Field(
        None,
        description="The result of `make seeds`, such as results/seeds.json, to show on the page: mean and spread of every score.",
    )
    wrong_answers: int = Field(
        10, ge=0, le=1000, description="Wrong answers to show, with every model's answer beside."
    )
