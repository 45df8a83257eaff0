"""The campaign of `make attack`, for a minute: every kind of attack at least once."""

import shutil

import campaign


def test_a_minute_of_every_attack(repository_of_built, tmp_path):
    attack = campaign.Campaign(tmp_path, repository_of_built, seed=16)
    for kind in campaign.KINDS:
        attack.attack(kind, 0)
    attack.run(60 - sum(attack.spent.values()))
    assert not attack.failures
    assert all(attack.cases[kind] for kind in campaign.KINDS)
    assert attack.kills.total() > 0
    assert f"{attack.kills.total()} kills; 0 failures" in attack.table()


def test_an_attack_that_succeeds_is_a_failure_with_its_seed(repository_of_built, tmp_path):
    """The campaign itself: a project whose built bytes are not the reference's."""
    whole = shutil.copytree(repository_of_built, tmp_path / "whole", symlinks=True)
    attack = campaign.Campaign(tmp_path, whole, seed=5)
    attack.reference["build/merged/model.safetensors"] = "0" * 64
    attack.attack("kill a rule", 1)
    assert len(attack.failures) == 1
    assert "kill a rule (--seed 5 --only 'kill a rule' --case 1): wrong bytes:" in attack.failures[0]
