"""The report in a real browser: one page, no request to anywhere, no console error, every section opens and shows its figure."""

import base64
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from project import run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no browser: apt-get install chromium chromium-driver"),
]
FIGURES = {
    "1. Overview": ["What was built from what"],
    "2. Quality": ["Accuracy", "All scores, parity and drops", "Confusion matrices", "Gates", "Wrong answers"],
    "3. Training": ["Loss", "Lengths and labels"],
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
def browser(tmp_path_factory):
    """A headless Chromium with a profile of its own, without a network."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1500,950"),
        *("--disable-background-networking", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND"),
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_page_load_timeout(300)
    yield driver
    driver.quit()


def visible(browser, text: str) -> list:
    """What is displayed and says exactly this."""
    found = browser.find_elements("xpath", f'//*[normalize-space(text())="{text}"]')
    return [one for one in found if one.is_displayed()]


def click(browser, text: str) -> None:
    """Click what says this text, once it is there."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := visible(browser, text):
            browser.execute_script("arguments[0].click()", found[-1])
            return
        time.sleep(0.2)
    raise AssertionError(f"nothing says {text!r}: {browser.find_element('tag name', 'body').text[:2000]}")


def wait_for(browser, script: str) -> None:
    """Until a script returns something true."""
    end = time.monotonic() + 60
    while not browser.execute_script(f"return {script}"):
        assert time.monotonic() < end, script
        time.sleep(0.2)


def shoot(browser, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(base64.b64decode(browser.get_screenshot_as_base64()))


def test_every_section_opens_without_an_error(page, browser, tmp_path):
    """Workflow, statistics, and every figure of every category, clicked as a person does."""
    shots = Path(os.environ.get("SLMAKE_SCREENSHOTS", tmp_path / "screenshots"))
    browser.get(page.as_uri())
    wait_for(browser, "document.querySelectorAll('#app li').length > 4")
    shoot(browser, shots, "workflow")
    click(browser, "Statistics")
    wait_for(browser, "document.querySelector('#app canvas, #app svg')")
    shown = 0
    for section, figures in FIGURES.items():
        if not visible(browser, section):
            click(browser, "Results")
        click(browser, section)
        wait_for(browser, f"document.querySelectorAll('tbody tr').length == {len(figures)}")
        rows = {row.text.strip(): row for row in browser.find_elements("css selector", "tbody tr")}
        assert set(rows) == set(figures)
        for title, row in rows.items():
            browser.execute_script("arguments[0].querySelector('a, button').click()", row)
            wait_for(
                browser,
                "[...document.querySelectorAll('iframe, img')].some(x => x.src.startsWith('data:') && (x.naturalWidth ?? 1) > 0)",
            )
            time.sleep(0.3)
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
    ("name", "told"),
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
def test_figures_show_what_they_promise(built, browser, tmp_path, name, told):
    """Each figure as the browser draws it, by its text; and no drawn text runs out of the picture."""
    shots = Path(os.environ.get("SLMAKE_SCREENSHOTS", tmp_path / "screenshots"))
    browser.get((built / "build" / "report" / name).as_uri())
    text = browser.execute_script("return document.documentElement.textContent")
    for one in told:
        assert one in text, name
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
