"""What only the last rules read, files that params.yaml names and a variable: what makes them unusable is said before the first rule runs."""

from pathlib import Path

from slmake.packaging import signature
from slmake.packaging.provenance import build_time
from slmake.plan import Plan
from slmake.scoring.gates import check_published


def refuse_unusable_date(plan: Plan) -> None:
    """Raise UserError for a SOURCE_DATE_EPOCH that the package would refuse, hours later."""
    if "package" in plan.stages:
        build_time()


def refuse_unusable(plan: Plan) -> None:
    """Raise UserError for the first file that a rule of this build would refuse for its content, hours later."""
    stages = set(plan.stages)
    if "package" in stages and plan.signing_key:
        signature.refuse_unusable(Path(*plan.signing_key))
    if "gates" in stages:  # the report shows why a gate cannot be judged
        check_published(plan.params.gates)
    if "report" in stages and plan.seeds:
        from slmake.reporting.seeds import read_seeds

        read_seeds(Path(*plan.seeds))
