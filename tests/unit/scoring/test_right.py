"""Right and wrong are decided in one place: metrics.is_right."""

import pytest

from slmake.reporting import pages
from slmake.scoring import metrics

LABELS = ["fear", "joy"]
EXPECTED, ANSWERS = ["joy", "fear", "joy", "fear"], ["Joy", "fear", "fear", "dread"]


def scores() -> dict:
    return metrics.score(EXPECTED, ANSWERS, LABELS, metrics.resamples(4, 20, 1))


def wrong_answers() -> str:
    rows = zip(EXPECTED, ANSWERS, strict=True)
    predictions = [{"row": i, "prompt": "p", "expected": e, "fp32": a} for i, (e, a) in enumerate(rows)]
    return pages.wrong_page(predictions, ["fp32"], 10)


@pytest.mark.parametrize("answer", ["Joy", "joy.", "", "joyjoy"])
def test_a_right_answer_is_the_expected_text(answer):
    assert metrics.is_right("joy", "joy")
    assert not metrics.is_right("joy", answer)


def test_scores_of_exact_answers():
    exact = scores()
    assert (exact["accuracy"], exact["outside_labels"]) == (0.25, 0.5)
    assert exact["confusion"] == [[1, 0, 1], [1, 0, 1]]
    assert exact["macro_f1"] == pytest.approx(0.5 / 2)
    assert "3 of 4 answers of fp32 are wrong" in wrong_answers()


def test_another_rule_changes_every_metric_and_the_report(monkeypatch):
    """Another case is accepted: accuracy, intervals, F1, confusion, drops and the report's page agree."""
    before = metrics.drop(EXPECTED, EXPECTED, ANSWERS, LABELS, metrics.resamples(4, 20, 1))
    for module in (metrics, pages):
        monkeypatch.setattr(module, "is_right", lambda expected, answer: expected.lower() == answer.lower())
    lenient = scores()
    assert (lenient["accuracy"], lenient["outside_labels"]) == (0.5, 0.25)
    assert lenient["confusion"] == [[1, 0, 1], [1, 1, 0]]
    assert lenient["per_class"]["joy"] == {"precision": 1.0, "recall": 0.5, "f1": 0.666667, "rows": 2}
    assert lenient["macro_f1"] == round((0.5 + 2 / 3) / 2, 6)
    after = metrics.drop(EXPECTED, EXPECTED, ANSWERS, LABELS, metrics.resamples(4, 20, 1))
    assert (before["accuracy"], after["accuracy"]) == (0.75, 0.5)
    assert after["macro_f1"] < before["macro_f1"]
    assert "2 of 4 answers of fp32 are wrong" in wrong_answers()


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        metrics.accuracy(["joy", "fear"], ["joy"])
