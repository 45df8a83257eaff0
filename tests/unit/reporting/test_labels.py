"""Figures, pages and the model card of labels that could be mathematics, markup, formulas or nothing that XML can hold."""

import csv
import re
from xml.etree import ElementTree

import pytest
import yaml

from slmake import params
from slmake.csv_files import read_csv
from slmake.packaging import card
from slmake.reporting import figures, pages
from slmake.text import csv_cell

LABELS = (
    "joy",
    r"a_b$\frac{$",
    "$5-$10",
    "bell\x07null\x00",
    "a|b",
    "<script>alert(1)</script>",
    "=1+1",
    "_hidden",
    "two\nlines",
)
SHOWN = (
    "joy",
    r"a_b$\frac{$",
    "$5-$10",
    "bell␇null␀",
    "a|b",
    "<script>alert(1)</script>",
    "=1+1",
    "_hidden",
    "two lines",
)
SCORES = {
    **dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "macro_f1_low", "macro_f1_high"), 0.5),
    **dict.fromkeys(("outside_labels", "restricted_accuracy", "restricted_macro_f1", "answer_perplexity"), 0.5),
    "size_bytes": 1000,
    "per_class": {label: {"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2} for label in LABELS},
    "confusion": [[1] * (len(LABELS) + 1) for _ in LABELS],
}
METRICS = {"test_rows": 18, "base": SCORES, "merged": SCORES}


@pytest.fixture(scope="module")
def plt():
    return figures.plain_plots()


def texts_of(file) -> list[str]:
    """The texts of an SVG that any XML parser reads."""
    return ["".join(node.itertext()) for node in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")]


def test_labels_are_drawn_as_they_are(plt, tmp_path):
    counts = {label: 20 - number for number, label in enumerate(LABELS)}
    dataset = {"length": {"histogram": {"3": 5}, "p95": 3}, "labels": dict.fromkeys(("train", "eval", "test"), counts)}
    figures.draw_data(plt, dataset, tmp_path / "data.svg")
    figures.draw_confusion(plt, METRICS, tmp_path / "confusion.svg")
    for name, times in (("data.svg", 1), ("confusion.svg", 4)):  # two models, two axes each
        texts = texts_of(tmp_path / name)
        assert [texts.count(label) for label in SHOWN] == [times] * len(SHOWN), name


def test_of_many_labels_the_most_confused_are_drawn(plt, tmp_path):
    """300 labels took all memory."""
    names, wrong = [f"label {i}" for i in range(300)], range(100, 130)
    counts = [[5 * (i == k) + (i in wrong and k == 300) for k in range(301)] for i in range(300)]
    scores = SCORES | {"per_class": dict.fromkeys(names), "confusion": counts}
    figures.draw_confusion(plt, METRICS | {"merged": scores, "base": scores}, tmp_path / "confusion.svg")
    texts = texts_of(tmp_path / "confusion.svg")
    assert [name for name in names if name in texts] == [names[i] for i in wrong]
    assert "merged: the 30 of 300 labels with the most errors" in texts
    assert (tmp_path / "confusion.svg").stat().st_size < 1e6


def test_labels_that_are_cut_alike_stay_apart(plt, tmp_path):
    counts = {f"{'long ' * 20}{number}": 10 for number in range(3)} | {"": 1}
    dataset = {"length": {"histogram": {"3": 5}, "p95": 3}, "labels": dict.fromkeys(("train", "eval", "test"), counts)}
    figures.draw_data(plt, dataset, tmp_path / "data.svg")
    texts = texts_of(tmp_path / "data.svg")
    assert sum(text.startswith("long long") and len(text) == figures.LONGEST for text in texts) == 3
    assert "(empty)" in texts


def test_pages_show_the_texts(tmp_path):
    rows = [
        {"row": "1", "expected": "joy", "merged": csv_cell(label), "prompt": csv_cell(f"{label} \x1b")}
        for label in LABELS[1:]
    ]
    file = tmp_path / "predictions.csv"
    with open(file, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    read = read_csv(file, ("row",))
    assert [row["merged"] for row in read] == list(LABELS[1:])
    page = pages.wrong_page(read, ["merged"], 20)
    assert "<td>=1+1</td>" in page
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "bell␇null␀" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page)


def test_the_card_says_what_a_package_that_holds_its_answers_was_scored_with():
    scores = {"accuracy": 0.5, "constrained_accuracy": 0.75}
    assert card.held_answers("none", "none", scores) == ""
    assert "held so, accuracy is 75.0%" in card.held_answers("labels", "labels", scores)
    assert "held so, they were not scored" in card.held_answers("labels", "tools", scores)
    assert "held so, they were not scored" in card.held_answers("labels", "labels", {"accuracy": 0.5})


def test_the_card_shows_labels_and_has_one_head():
    section = params.Package(
        license="mit\n---\nlicense: other",
        tags=["fine", "x\n---\nbase_model: evil/model\n---\n", "a: b"],
        intended_use="See <https://example.org>.\n\n<img src=x onerror=alert(1)> A *tone*.",
        limitations="None <script>alert(1)</script>.",
    )
    facts = {
        "base": {"source": "data/`base`|x"},
        "dataset": {"rows": {"train": 1, "eval": 1, "test": 1}, "source": {"train": {"source": "data/rows.json"}}},
        "metrics": METRICS,
        "models": ["base", "merged"],
        "last": "merged",
        "quantize": {"int8_nodes": ["*/attn/*", "a|b"]},
        "search": None,
        "licences": ["LICENSE"],
        "constrained": card.held_answers({"regex": "a|<b>"}, "none", METRICS["merged"]),
        "adapter": None,
        "limit": None,
    }
    form = {"labels": list(LABELS), "fields": ["phrase"], "prompt": "### Text: {phrase}\r# Not a heading\n<b>{tone}"}
    text = card.write(section, facts, form, None, [])
    assert "The answers above are free. run.py and serve.py hold theirs to" in text
    assert "held so, they were not scored" in text
    _, head, body = re.split(r"^---$", text, maxsplit=2, flags=re.M)
    loaded = yaml.safe_load(head)
    assert loaded["license"] == "mit --- license: other"
    assert loaded["tags"][-3:] == ["fine", "x --- base_model: evil/model ---", "a: b"]
    assert "base_model" not in loaded
    rows = [line for line in body.splitlines() if line.endswith("| 0.500 | 0.500 | 0.500 | 2 |")]
    assert len(rows) == len(LABELS)
    assert r"| a\|b | 0.500 | 0.500 | 0.500 | 2 |" in rows
    assert r"| \$5-\$10 | 0.500 | 0.500 | 0.500 | 2 |" in rows
    assert r'| `int8_nodes` | `["*/attn/*", "a\|b"]` |' in body
    assert "    # Not a heading" in body
    assert "<https://example.org>" in body
    assert not re.search(r"(?<!\\)<(script|img)", body)
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)
