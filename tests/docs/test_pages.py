"""Every Markdown page: short lines and sentences, links and commands that exist, no idiom of our own, and true figures."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
from tiny import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md")]
)
GENERATED = {
    "docs/params.md": r".*",
    "docs/benchmarks.md": r"<!-- generated.*?begin -->.*<!-- generated.*?end -->",
    "docs/reliability.md": r"<!-- figures of .*?<!-- end.*?-->",
}
IDIOMS = (
    *("mend", "mended", "mends", "goes on from", "go on from", "is told", "tells", "brings", "left out of account"),
    *("slower hour", "noisier hour", "the process that speaks", "data set", "what all rows"),
    *("in peace", "behind our back", "phones home"),
)
WORDS = 30


def written(page: str) -> str:
    """A page's text without its generated part."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(GENERATED.get(page, r"(?!)"), "", text, flags=re.S)


def prose(page: str) -> str:
    """What a person reads as sentences: no code blocks, no tables, no headings; code and link targets as one word."""
    text = re.sub(r"^(```|~~~).*?^\1|^    .*?$|^ *\|.*?$|^#.*?$|<!--.*?-->", "\n", written(page), flags=re.M | re.S)
    return re.sub(r"\]\([^)]*\)|[*_]{2}", "", re.sub(r"`[^`]*`", "CODE", text))


def sentences(page: str) -> list[str]:
    paragraphs = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", prose(page))
    return [part for paragraph in paragraphs for part in re.split(r"(?<=[.!?:;])\s+", " ".join(paragraph.split()))]


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page):
    """Rows of tables and single long words cannot be broken; all other lines have fewer than 120 characters."""
    lines = [line for line in written(page).splitlines() if not line.lstrip().startswith("|")]
    assert [line for line in lines if len(line) >= 120 and max(map(len, line.split())) < 100] == []


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page):
    assert [sentence for sentence in sentences(page) if len(sentence.split()) >= WORDS] == []


@pytest.mark.parametrize("page", PAGES)
def test_words_are_plain(page):
    text = " ".join(prose(page).split())
    assert [idiom for idiom in IDIOMS if re.search(rf"\b{idiom}\b", text, re.I)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists() or (heading and heading not in anchors(path)):
            broken.append(target)
    assert broken == []


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    """Modules behind `python -m`, targets behind `make`, and scripts that a page names."""
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`|^    .*?$", text, re.M | re.S))
    modules = re.findall(r"python3? -m ([\w.]+)", code)
    missing = [name for name in modules if not name.isupper() and importlib.util.find_spec(name) is None]
    calls = re.findall(r"(?:^|`|&& |; )make((?: +[\w=./:-]+)*)", code, re.M)
    named = [word for call in calls for word in call.split() if re.fullmatch(r"[a-z][a-z-]*", word)]
    missing += [f"make {name}" for name in named if name not in targets]
    files = re.findall(r"\b(?:bench|rules|scripts|slmake|tests|tools)/[\w/]+\.(?:py|sh|smk)\b", text)
    missing += [name for name in files if not (ROOT / name).exists()]
    assert missing == []


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")} - {"README.md"}
    assert {page for page in pages if f"({page})" not in index} == set()


def test_the_readme_is_short_and_shows_the_committed_figures():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    # Not those of this folder: `make` on another processor gives others.
    done = subprocess.run(["git", "show", "HEAD:results/metrics.json"], cwd=ROOT, capture_output=True, check=True)
    metrics = json.loads(done.stdout)
    for name, title in (("merged", "fine-tuned and merged"), ("int4", "int4 ONNX")):
        figures = metrics[name]
        interval = f"{100 * figures['accuracy_low']:.1f} to {100 * figures['accuracy_high']:.1f}"
        accuracy = f"{100 * figures['accuracy']:.1f}% ({interval})"
        assert f"| {title} | {accuracy} | {figures['macro_f1']:.3f} | {figures['size_bytes'] / 1e6:.1f} MB |" in text


def test_the_checks_find_what_they_look_for(tmp_path, monkeypatch):
    """From the other end: a page with one mistake of each kind fails each check."""
    page = tmp_path / "docs" / "bad.md"
    page.parent.mkdir()
    (tmp_path / "Makefile").write_text("build: setup\n", encoding="utf-8")
    page.write_text(
        f"# Bad\n\n{'word ' * 30}.\n\nThe test tells it. {'x' * 120}\n\n[a](none.md) [b](#nowhere)\n\n"
        "    make nothing\n\n`python -m tools.nothing` and scripts/nothing.py\n",
        encoding="utf-8",
    )
    monkeypatch.setattr("test_pages.ROOT", tmp_path)
    for check in (
        *(test_lines_are_short, test_sentences_are_short, test_words_are_plain),
        *(test_links_lead_to_files_and_headings, test_commands_exist),
    ):
        with pytest.raises(AssertionError):
            check("docs/bad.md")
