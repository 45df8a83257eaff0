"""Fixtures of the tests of sources."""

import shutil
from pathlib import Path

import pytest
from tiny import make_model


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> Path:
    """A tiny Llama in several shards."""
    folder = make_model(tmp_path_factory.mktemp("sharded") / "llama", shards="200KB", tie_word_embeddings=False)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def broken(tmp_path, base) -> Path:
    """A copy of the tiny base that a test may damage."""
    return Path(shutil.copytree(base, tmp_path / "broken"))
