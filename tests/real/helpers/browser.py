"""A real browser on a report: opened, clicked and photographed. `make screenshots` runs this file.

    python tests/real/helpers/browser.py build/report.html docs

writes docs/report-overview.png, which the README shows, and docs/report-confusion.png, which docs/quality.md shows.
"""

import base64
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
INSTALL = "no browser: apt-get install chromium chromium-driver"
PICTURES = {
    "report-overview": ("1. Overview", "What was built from what"),
    "report-confusion": ("2. Quality", "Confusion matrices"),
}


@contextlib.contextmanager
def opened() -> Iterator:
    """A headless Chromium with a profile of its own, without a network but for this machine's loopback."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = PROGRAM
        for argument in (
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1500,950"),
            *(
                "--disable-background-networking",
                "--no-first-run",
                "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            ),
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
        driver.set_page_load_timeout(300)
        yield driver
        driver.quit()


def open_report(browser, page: Path) -> None:
    """Load the page and wait for its menu."""
    browser.get(page.resolve().as_uri())
    wait_for(browser, "document.querySelectorAll('#app li').length > 4")


def visible(browser, text: str) -> list:
    """What is displayed and says exactly this."""
    elements = browser.find_elements("xpath", f'//*[normalize-space(text())="{text}"]')
    return [element for element in elements if element.is_displayed()]


def click(browser, text: str) -> None:
    """Click what says this text, once it is there."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if elements := visible(browser, text):
            browser.execute_script("arguments[0].click()", elements[-1])
            return
        time.sleep(0.2)
    raise AssertionError(f"nothing says {text!r}: {browser.find_element('tag name', 'body').text[:2000]}")


def wait_for(browser, script: str) -> None:
    """Until a script returns something true."""
    end = time.monotonic() + 60
    while not browser.execute_script(f"return {script}"):
        assert time.monotonic() < end, script
        time.sleep(0.2)


def open_section(browser, section: str, figures: int | None = None) -> dict:
    """Open a section from wherever the menu is; its rows by title, once all of them are there."""
    if not visible(browser, section):
        click(browser, "Results")
    click(browser, section)
    wait_for(browser, f"document.querySelectorAll('tbody tr').length {f'== {figures}' if figures else '> 0'}")
    return {row.text.strip(): row for row in browser.find_elements("css selector", "tbody tr")}


def open_figure(browser, row) -> None:
    """Open the figure of a section's row, and wait until it is drawn."""
    browser.execute_script("arguments[0].querySelector('a, button').click()", row)
    wait_for(
        browser,
        "[...document.querySelectorAll('iframe, img')].some(x => x.src.startsWith('data:') && (x.naturalWidth ?? 1) > 0)",
    )


def shoot(browser, folder: Path, name: str) -> Path:
    """Photograph the window, once its colours have stopped changing."""
    time.sleep(0.5)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.png"
    target.write_bytes(base64.b64decode(browser.get_screenshot_as_base64()))
    return target


def main(page: Path, folder: Path) -> None:
    if not (PROGRAM and DRIVER):
        sys.exit(f"screenshots: error: {INSTALL}")
    if not page.is_file():
        sys.exit(f"screenshots: error: {page}: no report here. Make it with `make report`.")
    with opened() as browser:
        for name, (section, title) in PICTURES.items():
            open_report(browser, page)
            open_figure(browser, open_section(browser, section)[title])
            target = shoot(browser, folder, name)
            print(f"screenshots: {target}, {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
