"""dvc.yaml is written from the Snakefile, and keeps what users have added to it."""

from types import SimpleNamespace

import pytest
import yaml

from slmake.errors import UserError
from slmake.platforms import dvc, dvc_yaml

GENERATED = {
    "stages": {
        "code": {"cmd": "python -m slmake.platforms.dvc_yaml --digests", "outs": ["build/code"]},
        "merge": {"cmd": "snakemake --allowed-rules merge -- build/merged", "outs": ["build/merged"]},
    },
    "metrics": ["results/metrics.json"],
    "plots": [{"Loss": {"x": "step"}}],
}
FORMER = {"finetune": {"cmd": "snakemake --allowed-rules finetune -- build/adapter", "outs": ["build/adapter"]}}
DEPLOY = {"deploy": {"cmd": ["./login.sh", "./deploy.sh"], "deps": ["build/package"]}}
FOR_EACH = {"copies": {"foreach": ["a", "b"], "do": {"cmd": "./copy.sh ${item}", "outs": ["out-${item}"]}}}


@pytest.fixture
def merged(tmp_path):
    """What becomes of the generated document where dvc.yaml has this content."""

    def merge(present: object, stages: dict = GENERATED["stages"]) -> dict:
        file = tmp_path / "dvc.yaml"
        file.write_text(present if isinstance(present, str) else yaml.safe_dump(present), encoding="utf-8")
        return dvc_yaml.with_added(GENERATED | {"stages": stages}, file)

    return merge


def test_what_users_add_stays(merged):
    added = {
        "metrics": ["mine.json", "results/metrics.json"],
        "plots": [{"Confusion of a former model": {}}, "mine.csv", {"Mine": {"x": "step"}}, {"Loss": {"x": "epoch"}}],
        "artifacts": {"model": {"path": "build/package"}},
        "stages": DEPLOY | FORMER | GENERATED["stages"] | FOR_EACH,
    }
    once = merged(added)
    assert once == {
        "stages": GENERATED["stages"] | DEPLOY | FOR_EACH,
        "metrics": ["results/metrics.json", "mine.json"],
        "plots": [{"Loss": {"x": "step"}}, "mine.csv", {"Mine": {"x": "step"}}],
        "artifacts": added["artifacts"],
    }
    assert merged(once) == once


@pytest.mark.parametrize(
    "present", ["", "stages:\n", "[]", {"stages": FORMER}, {"stages": {}, "metrics": None, "plots": []}]
)
def test_nothing_is_left_of_former_rules(merged, present):
    assert merged(present) == GENERATED


@pytest.mark.parametrize(
    "present",
    [
        "stages: [",
        "stages: 3\n",
        "stages:\n  a: {cmd: ls}\nstages: {}\n",
        "text",
        "<<<<<<< HEAD\nstages:\n",
        "stages:\n  mine:\n\tcmd: ls\n",
    ],
)
def test_a_file_that_cannot_be_read_is_the_users_to_correct(merged, tmp_path, present):
    with pytest.raises(UserError, match=r"dvc\.yaml cannot be read: .+\. Correct it; `git diff dvc\.yaml` shows"):
        merged(present)
    assert (tmp_path / "dvc.yaml").read_text(encoding="utf-8") == present


def test_options_of_outputs_stay(merged):
    """What slmake itself says of an output does, too; those of a former rule's are kept until its output is there again."""
    merge = {
        "cmd": "snakemake --allowed-rules merge -- x",
        "outs": [{"build/merged": {"push": False, "remote": "own", "cache": False}}],
    }
    outs = [{"build/adapter": {"push": False}}, {"build/base": {"desc": "of ${base}"}}]
    former = {"cmd": FORMER["finetune"]["cmd"], "outs": outs}
    once = merged({"stages": {"merge": merge, "finetune": former}})
    assert once["stages"] == GENERATED["stages"] | {
        "merge": GENERATED["stages"]["merge"] | {"outs": [{"build/merged": {"push": False, "remote": "own"}}]}
    }
    assert once["vars"] == [{"options_of_absent_outputs": {"build/adapter": {"push": False}}}]
    assert merged(once) == once
    later = merged(once | {"vars": ["other.yaml", {"rank": 8}, *once["vars"]]}, GENERATED["stages"] | FORMER)
    assert later["vars"] == ["other.yaml", {"rank": 8}]
    assert later["stages"]["finetune"]["outs"] == [{"build/adapter": {"push": False}}]
    given = {"results/metrics.json": {"desc": "figures"}}
    assert dvc_yaml.with_options([{"results/metrics.json": {"cache": False}}, "x"], given) == [
        {"results/metrics.json": {"cache": False, "desc": "figures"}},
        "x",
    ]


@pytest.mark.parametrize("variables", [None, [{"options_of_absent_outputs": None}]])
def test_variables_that_were_emptied_cost_no_stage(merged, variables):
    assert merged({"vars": variables, "stages": DEPLOY})["stages"] == GENERATED["stages"] | DEPLOY


def test_a_stage_of_the_name_of_a_rule_is_not_overwritten(merged):
    with pytest.raises(UserError, match=r"the stage merge is not as slmake writes it, and a rule has that name"):
        merged({"stages": {"merge": DEPLOY["deploy"]}})


def test_a_stage_without_outputs_has_none():
    assert dvc.outs(DEPLOY["deploy"]) == []
    assert dvc.outs(GENERATED["stages"]["merge"]) == ["build/merged"]


@pytest.mark.parametrize("needed", [True, False])
def test_a_rule_that_nothing_would_record_is_refused_if_it_runs(tmp_path, monkeypatch, needed):
    """A user's own rule that `all` does not need is asked for by name, and no concern of records."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Snakefile").write_text("rule merge:\nrule summary:\n", encoding="utf-8")
    jobs = "rule merge:\n    input: a\n    output: b\n\n" + "rule summary:\n    input: b\n    output: c\n\n" * needed
    done = SimpleNamespace(returncode=0, stdout=jobs, stderr="")
    monkeypatch.setattr(dvc_yaml.subprocess, "run", lambda *_, **__: done)
    if needed:
        with pytest.raises(dvc_yaml.UnknownRule, match=r"does not know the rule summary.*`\.venv/bin/dvc stage add`"):
            dvc_yaml.rules()
    else:
        assert dvc_yaml.rules() == {"merge": {"input": ["a"], "output": ["b"]}}
