"""Training waits for the rehearsal, also where threads do not hold it back; no rule runs again because of it."""

import re

import yaml
from project import change, planned, run
from tiny import ROOT

# As on a cluster, two jobs fit at once. Without a limit on `turns` the slow one would end last.
TWO_RULES = """
rule all:
    input: "training", "rehearsal"

rule finetune:
    output: "training"
    resources: turns=1
    shell: "echo training >> order; touch {output}"

rule rehearse:
    output: "rehearsal"
    priority: 100
    resources: turns=1
    shell: "sleep 1; echo rehearsal >> order; touch {output}"
"""


def test_the_profile_has_one_turn_which_both_rules_take():
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text(encoding="utf-8"))
    assert profile["resources"] == {"turns": 1}
    text = (ROOT / "Snakefile").read_text(encoding="utf-8")
    takers = [
        name for name, body in re.findall(r"^rule (\w+):(.*?)(?=^rule |\Z)", text, re.M | re.S) if "turns=1," in body
    ]
    assert takers == ["rehearse", "finetune"]


def test_a_turn_holds_training_back_and_a_failure_stops_it(tmp_path):
    (tmp_path / "Snakefile").write_text(TWO_RULES, encoding="utf-8")
    done = run(tmp_path, "snakemake", "--cores", "2", "--resources", "turns=1")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "order").read_text() == "rehearsal\ntraining\n"
    for name in ("order", "training", "rehearsal"):
        (tmp_path / name).unlink()
    (tmp_path / "Snakefile").write_text(TWO_RULES.replace("sleep 1;", "exit 1;"), encoding="utf-8")
    assert run(tmp_path, "snakemake", "--cores", "2", "--resources", "turns=1").returncode == 1
    assert not (tmp_path / "training").exists()


def test_the_slurm_profile_plans_the_same(copy_of_built):
    """What only changes the rehearsal trains nothing again; a changed learning rate does, with the rehearsal before it."""
    slurm = ("--profile", "profiles/slurm", "--set-resources", "finetune:gpu=0", "evaluate:gpu=0")
    change(copy_of_built, "rehearse", logits_tolerance=0.002)
    assert planned(copy_of_built, *slurm) == {"rehearse"}
    change(copy_of_built, "finetune", learning_rate=0.5)
    assert {"rehearse", "finetune", "merge"} <= planned(copy_of_built, *slurm)
