"""docs/tutorials: every command as it stands there, in a fresh copy of the project with the substitution that its README names."""

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from preloaded import link_environment
from project import new_project, type_block
from tiny import ROOT

TUTORIALS = ROOT / "docs" / "tutorials"
PAGES = sorted(path.stem for path in TUTORIALS.glob("*.md") if path.name != "README.md")


def blocks(name: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block of a page, in order."""
    text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)


def edit(project: Path, block: str) -> None:
    """Set the fields of a `yaml` block in the project's params.yaml, as a reader would."""
    path = project / "params.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, fields in yaml.safe_load(block).items():
        content[section] = content[section] | fields if fields else fields  # `prepare: null`
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


@pytest.fixture
def project(tmp_path, base) -> Path:
    """A fresh copy of the project: the shipped parameters and data, the tiny base model in data/base."""
    folder = new_project(tmp_path / "project", base)
    for name in ("params.yaml", "Makefile", "data/dataset.json", "data/workshop.jsonl", "data/chatml_tools.jinja"):
        shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    type_block(folder, "git init -q")
    link_environment(folder / ".venv")
    for lock in (folder / "envs").glob("*.lock"):
        os.utime(lock, (0, 0))  # `make setup` has been run
    ((_, substitution),) = blocks("README")
    edit(folder, substitution)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_tutorial_ends_in_an_answer(page, project):
    told = ""
    for language, block in blocks(page):
        if language == "yaml":
            edit(project, block)
        elif language == "sh":
            told = type_block(project, block)
            print(f"$ {block}{told}")
    assert told.splitlines()[-1].strip(), told
