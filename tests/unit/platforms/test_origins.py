"""A rule that shows all parameters stops if an output it is built from has other parameters, and for no other output."""

import hashlib
import shutil

import pytest
from tiny import ROOT

from slmake import params
from slmake.errors import UserError
from slmake.plan import Plan
from slmake.platforms import origins


@pytest.fixture
def plan(tmp_path, monkeypatch) -> Plan:
    """A plan of the project's own params.yaml, all of whose outputs Snakemake has a record of."""
    plan = Plan(params.load(ROOT / "params.yaml"))
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(origins, "metadata", lambda output: {"starttime": 1.0, "endtime": 1.0})
    return plan


def look(plan: Plan, monkeypatch, rule: str, old: str) -> None:
    """Check the outputs that a rule is built from, where the output `old` was built with other parameters."""
    monkeypatch.setattr(origins, "_is_of_now", lambda plan, made_of, record, output: output != old)
    made_of = {"publish": {"results/metrics.json", "build/onnx-int4"}}  # which is no stage of DVC
    origins.refuse_other_upstream(plan, made_of, [rule], [], None)


@pytest.mark.parametrize(
    ("rule", "old"),
    [
        *(("report", name) for name in ("results/metrics.json", "build/onnx-int4", "build/adapter", "build/dataset")),
        *(("package", name) for name in ("results/gates.json", "build/base")),
        *(("publish", name) for name in ("results/metrics.json", "build/merged")),
    ],
)
def test_what_a_rule_is_made_from_must_be_of_now(plan, monkeypatch, rule, old):
    with pytest.raises(UserError, match=f"{old} was built from other parameters, code or data"):
        look(plan, monkeypatch, rule, old)


@pytest.mark.parametrize(
    ("rule", "old"),
    [
        *(("report", name) for name in ("build/package", "results/gates.json", "results/rehearsal.json")),
        ("package", "build/report/overview.html"),
        ("merge", "build/adapter"),  # it shows its own parameters alone
    ],
)
def test_what_lies_beside_may_be_of_a_former_build(plan, monkeypatch, rule, old):
    """A gate that is missed leaves the former package, and `make report` says by how much."""
    look(plan, monkeypatch, rule, old)


@pytest.mark.parametrize(("built_in", "image"), [(None, "a.sif"), ("a.sif", None), ("a.sif", "b.sif")])
def test_a_package_is_of_one_environment(plan, monkeypatch, built_in, image):
    """It names the image that the package rule runs in; a report names none."""
    stack = hashlib.md5((built_in or "").encode()).hexdigest()
    monkeypatch.setattr(origins, "_is_of_now", lambda *_: True)
    record = {"starttime": 1.0, "endtime": 1.0, "software_stack_hash": stack}
    monkeypatch.setattr(origins, "metadata", lambda output: record)
    with pytest.raises(UserError, match=f"was not built in {image or 'the local environment'}, where"):
        origins.refuse_other_upstream(plan, {}, ["package"], [], image)
    origins.refuse_other_upstream(plan, {}, ["report"], [], image)
    origins.refuse_other_upstream(plan, {}, ["package"], [], built_in)
