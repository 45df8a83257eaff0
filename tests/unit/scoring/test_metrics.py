"""metrics: hand-computed scores."""

import numpy as np
import pytest
from evaluate_script import TONES, make_dataset

from slmake import prompts
from slmake.scoring import metrics as metrics_module
from slmake.scoring.questions import Questions


def test_macro_f1_of_a_small_example():
    """a: 1 hit, 1 missed: 2/3. b: 2 hits, 1 wrong: 4/5. c: 1 missed: 0. Mean: 22/45."""
    expected, answers = ["a", "a", "b", "b", "c"], ["a", "b", "b", "b", "x"]
    assert metrics_module.macro_f1(expected, answers, ["a", "b", "c"]) == pytest.approx(22 / 45)


def test_macro_f1_counts_every_label_the_same():
    """Ninety right of one label and ten wrong of another: accuracy 0.9, but F1 of 90/95 and 0."""
    expected, answers = ["a"] * 90 + ["b"] * 10, ["a"] * 100
    assert metrics_module.macro_f1(expected, answers, ["a", "b"]) == pytest.approx((180 / 190 + 0) / 2)


@pytest.mark.parametrize(
    ("answers", "value"),
    [(["a", "b"], 1.0), (["b", "a"], 0.0), (["", ""], 0.0), (["a", "x"], 0.5)],
    ids=["right", "swapped", "empty", "half"],
)
def test_macro_f1_at_its_ends(answers, value):
    assert metrics_module.macro_f1(["a", "b"], answers, ["a", "b"]) == value


def score(questions: Questions, answers: list[str]) -> dict:
    weights = metrics_module.resamples(questions.scored, 200, 1)
    return metrics_module.score(questions.expected, answers, questions.form["labels"], weights)


def test_score_of_a_classification(dataset):
    questions = Questions(dataset)
    count = len(questions.expected)
    found = score(questions, questions.expected)
    assert [found[name] for name in ("accuracy", "accuracy_low", "macro_f1", "macro_f1_low")] == [1.0] * 4
    assert found["outside_labels"] == 0.0
    assert [sum(row) for row in found["confusion"]] == [questions.expected.count(label) for label in sorted(TONES)]
    share = questions.expected.count("joy") / count
    found = score(questions, ["joy"] * count)
    assert found["accuracy"] == round(share, 6)
    assert found["macro_f1"] == pytest.approx(2 * share / (1 + share) / 4, abs=1e-6)
    assert found["outside_labels"] == 0.0
    answers = ["delight", "Joy", *questions.expected[2:]]
    found = score(questions, answers)
    assert found["accuracy"] == round((count - 2) / count, 6)
    assert found["outside_labels"] == round(2 / count, 6)
    assert sum(row[-1] for row in found["confusion"]) == 2


def test_per_class_scores_and_confusion_of_a_small_example():
    expected, answers, labels = ["a", "a", "a", "b", "b"], ["a", "a", "b", "b", "?"], ["a", "b", "c"]
    found = metrics_module.per_class(expected, answers, labels)
    assert found["a"] == {"precision": 1.0, "recall": 0.666667, "f1": 0.8, "rows": 3}
    assert found["b"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2}
    assert found["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 0}
    assert metrics_module.confusion(expected, answers, labels) == [[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]


def test_interval_of_accuracy_is_that_of_the_binomial():
    """80 of 100 right: the normal approximation gives 0.8 ± 1.96 √(0.8 · 0.2 / 100) = 0.7216 to 0.8784."""
    expected, answers = ["a"] * 100, ["a"] * 80 + ["b"] * 20
    found = metrics_module.score(expected, answers, ["a", "b"], metrics_module.resamples(100, 4000, 7))
    assert found["accuracy_low"] == pytest.approx(0.7216, abs=0.015)
    assert found["accuracy_high"] == pytest.approx(0.8784, abs=0.015)
    assert found == metrics_module.score(expected, answers, ["a", "b"], metrics_module.resamples(100, 4000, 7))
    assert not np.array_equal(metrics_module.resamples(100, 50, 7), metrics_module.resamples(100, 50, 8))


def test_drop_is_resampled_in_pairs():
    """Both models err on the same rows but for 4 of 100: the drop's interval is that of the 4, far narrower than of accuracy."""
    expected = ["a"] * 100
    before, after = ["a"] * 80 + ["b"] * 20, ["a"] * 76 + ["b"] * 24
    found = metrics_module.drop(expected, before, after, None, metrics_module.resamples(100, 4000, 7))
    assert found["accuracy"] == 0.04
    assert 0.0 <= found["accuracy_low"] <= 0.01
    assert 0.07 <= found["accuracy_high"] <= 0.09


def test_parity_of_a_small_example():
    """KL((1/2, 1/2) || (1/4, 3/4)) = ln 2 - ln(3) / 2; the second prompt is the same in both."""
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]).astype(np.float32), np.log([[0.25, 0.75], [0.9, 0.1]]).astype(np.float32)
    found = metrics_module.parity(p, q)
    kl = np.log(2) - np.log(3) / 2
    assert found["kl_max"] == pytest.approx(kl, abs=1e-6)
    assert found["kl_mean"] == pytest.approx(kl / 2, abs=1e-6)
    assert found["prompts"] == 2
    assert found["logit_diff_max"] == pytest.approx(np.log(2), abs=1e-4)
    assert metrics_module.parity(p, p + 3) == {
        "prompts": 2,
        "kl_mean": 0.0,
        "kl_max": 0.0,
        "top1_agreement": 1.0,
        "logit_diff_max": 3.0,
    }


def test_score_of_open_text(tmp_path, base):
    """Every row has an answer of its own, so there are no labels: exact match and ROUGE-L."""
    rows = [{"text": f"Say {i}", "reply": f"number {i * 37} it is"} for i in range(40)]
    folder = make_dataset(tmp_path / "data", base, rows, text_template="{text}\n{reply}", answer="reply")
    questions = Questions(folder)
    assert questions.label_tokens is None
    answers = [questions.expected[0] + " so", *questions.expected[1:]]
    found = score(questions, answers)
    count = len(answers)
    assert found["accuracy"] == round(1 - 1 / count, 6)
    assert found["rouge_l"] == pytest.approx((count - 1 + 2 * 0.8 / 1.8) / count, abs=1e-5)  # 4 of 5 words, 4 of 4
    assert set(found) == {"accuracy", "accuracy_low", "accuracy_high", "rouge_l"}
    empty = score(questions, [""] * count)  # an empty answer is wrong, and no error
    assert (empty["accuracy"], empty["rouge_l"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("expected", "answer", "value"),
    [
        ("Кошка сидит на окне", "кошка лежит на окне!", 0.75),
        ("Das schöne Mädchen", "das schäne Mudchen", 1 / 3),
        ("Das scho\u0308ne Mädchen", "das schöne Mädchen", 1.0),  # the accent as a character of its own
        ("किताब यहाँ है", "किताब वहाँ है", 2 / 3),  # vowel signs are no letters
        ("猫は窓辺にいる。", "犬は窓辺にいる", 6 / 7),
        ("แมวนั่ง", "แมวนอน", 2 * 3 / 11),  # 5 letters, one with a sign, and 6
        ("القطة على النافذة", "القطة على النافذة", 1.0),
        ("7", "٧", 0.0),
        ("?!", "?!", 0.0),
    ],
)
def test_rouge_l_of_every_script(expected, answer, value):
    assert metrics_module.rouge_l([expected], [answer]) == pytest.approx(value, abs=1e-6)


def test_rouge_l_of_english_is_that_of_torchmetrics():
    from torchmetrics.functional.text.rouge import rouge_score

    expected = ["The cat’s on Room_5's mat — 1,000.50 of them!", "It's “fine” ❤️, e.g. x_1 <b>", "", "a  b\nc"]
    answers = ["the cat's in room 5: 1,000.5", "Its fine e g x 1 ❤️ b", "no", "A-B\tC."]
    own = [metrics_module.rouge_l([e], [a]) for e, a in zip(expected, answers, strict=True)]
    theirs = [
        float(rouge_score(a, e, rouge_keys="rougeL")["rougeL_fmeasure"]) for e, a in zip(expected, answers, strict=True)
    ]
    assert own == theirs
    assert 0.0 in own
    assert 1.0 in own


@pytest.mark.parametrize(
    ("text", "labels", "answer"),
    [
        ("joy", ["joy"], "joy"),
        (" joy \n", ["joy"], "joy"),
        ("\n\njoy\nfear", ["joy", "fear"], "joy"),
        ("\n\njoy\nfear", None, "joy\nfear"),
        (" joy\nfear\n", ["joy", "joy\nfear"], "joy\nfear"),  # and not right where joy alone is expected
        ("one\ntwo\nthree", ["one\ntwo"], "one\ntwo\nthree"),
        ("", ["joy"], ""),
        ("  \n ", None, ""),
    ],
)
def test_what_counts_as_the_answer(text, labels, answer):
    assert prompts.read_answer(text, labels) == answer
