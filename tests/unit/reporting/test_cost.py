"""The page of time and memory."""

from slmake.reporting import pages


def test_rules_of_earlier_builds_are_not_on_the_page(tmp_path):
    for name in ("finetune", "merge", "candidate-3", "candidate-4"):
        (tmp_path / f"{name}.tsv").write_text("s\tmax_rss\n1.5\t2.0\n")
    shown = pages.cost_page({}, tmp_path, ["merge", "candidate-3"])
    assert "merge" in shown
    assert "candidate-3" in shown
    assert "finetune" not in shown
    assert "candidate-4" not in shown
