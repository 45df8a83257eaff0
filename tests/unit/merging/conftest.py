"""Fixtures of the tests of merging."""

import shutil
from pathlib import Path

import pytest
from merge_script import load, make_adapter


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter for the tiny tied Llama; do not write into it."""
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="session")
def half(tmp_path_factory, base) -> Path:
    """The tiny Llama in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "base"
    load(base).bfloat16().save_pretrained(folder)
    for path in base.glob("token*"):
        shutil.copyfile(path, folder / path.name)
    return folder
