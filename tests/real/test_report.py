"""The report in a real browser: one page, no request to anywhere, no console error, every section opens and shows its figure."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import (
    DRIVER,
    INSTALL,
    PICTURES,
    PROGRAM,
    click,
    open_figure,
    open_report,
    open_section,
    opened,
    shoot,
    wait_for,
)
from project import run
from tiny import ROOT

pytestmark = [pytest.mark.real, pytest.mark.skipif(not (PROGRAM and DRIVER), reason=INSTALL)]
FIGURES = {
    "1. Overview": ["What was built from what"],
    "2. Quality": ["Accuracy", "All scores, parity and drops", "Confusion matrices", "Gates", "Wrong answers"],
    "3. Training": ["Loss", "Lengths and labels", "Rows as the model sees them"],
    "4. Cost": ["Time and memory"],
}


@pytest.fixture(scope="module")
def page(built, tmp_path_factory) -> Path:
    """build/report.html of the tiny project."""
    target = tmp_path_factory.mktemp("page") / "report.html"
    done = run(built, "snakemake", "--report", str(target))
    assert done.returncode == 0, done.stdout
    return target


@pytest.fixture(scope="module")
def browser():
    with opened() as started:
        yield started


def test_every_section_opens_without_an_error(page, browser, tmp_path):
    """Workflow, statistics, and every figure of every category, clicked as a person does."""
    shots = Path(os.environ.get("SLMAKE_SCREENSHOTS", tmp_path / "screenshots"))
    open_report(browser, page)
    shoot(browser, shots, "workflow")
    click(browser, "Statistics")
    wait_for(browser, "document.querySelector('#app canvas, #app svg')")
    shown = 0
    for section, figures in FIGURES.items():
        rows = open_section(browser, section, len(figures))
        assert set(rows) == set(figures)
        for title, row in rows.items():
            open_figure(browser, row)
            shoot(browser, shots, re.sub(r"\W+", "-", f"{section} {title}").lower())
            shown += 1
    assert shown == sum(map(len, FIGURES.values())) == len(list(shots.glob("[1-4]-*.png")))
    wrong = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not wrong, wrong
    asked = [
        entry["message"] for entry in browser.get_log("performance") if "Network.requestWillBeSent" in entry["message"]
    ]
    assert not [message for message in asked if re.search(r'"url":"(https?|wss?)://', message)]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("overview.html", ["data/dataset.json", "data/base", "held out for the test", "learning rate"]),
        ("scores.html", ["restricted_accuracy", "merged against adapter", "int4 against merged", "mean KL"]),
        ("gates.html", ["passed", "accuracy", "int4 against merged"]),
        ("cost.html", ["finetune", "evaluate", "p95 ms"]),
        ("wrong_answers.html", ["expected", "merged", "### The tone is:"]),
        ("scores.svg", ["Accuracy on the test split", "int4"]),
        ("confusion.svg", ["expected", "surprise", "(other)"]),
        ("loss.svg", ["cross entropy per answer token (nats)", "eval"]),
        ("data.svg", ["95th percentile", "sadness"]),
    ],
)
def test_figures_show_what_they_promise(built, browser, tmp_path, name, parts):
    """Each figure as the browser draws it, by its text; and no drawn text runs out of the picture."""
    shots = Path(os.environ.get("SLMAKE_SCREENSHOTS", tmp_path / "screenshots"))
    browser.get((built / "build" / "report" / name).as_uri())
    text = browser.execute_script("return document.documentElement.textContent")
    for part in parts:
        assert part in text, name
    shoot(browser, shots, name.replace(".", "-"))
    if name.endswith(".svg"):
        outside = browser.execute_script(
            """const box = document.documentElement.getBoundingClientRect();
            return [...document.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();
              return r.left < box.left - 2 || r.right > box.right + 2 || r.top < box.top - 2 || r.bottom > box.bottom + 2 })
              .map(t => t.textContent)"""
        )
        assert not outside
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_pictures_of_the_readme(page, tmp_path):
    """`make screenshots` writes the picture of the README and one more, small enough for a repository."""
    assert "docs/report-overview.png" in (ROOT / "README.md").read_text(encoding="utf-8")
    command = [sys.executable, str(ROOT / "tests" / "real" / "helpers" / "browser.py"), str(page), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in PICTURES:
        data = (tmp_path / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 10_000 < len(data) < 300_000


def test_candidates_of_a_search(searched, browser, tmp_path):
    """The Pareto plot and its table, of real candidates."""
    shots = Path(os.environ.get("SLMAKE_SCREENSHOTS", tmp_path / "screenshots"))
    for name, parts in (
        ("candidates.svg", ["Pareto front", "chosen", "size (MB)", "merged, not quantized"]),
        ("candidates.html", ["block_size 16", "block_size 32", "chosen", "mean KL"]),
    ):
        browser.get((searched / "build" / "report" / name).as_uri())
        text = browser.execute_script("return document.documentElement.textContent")
        for part in parts:
            assert part in text, name
        shoot(browser, shots, name.replace(".", "-"))
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
