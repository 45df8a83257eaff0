"""Fixtures of the tests of the export."""

from pathlib import Path

import pytest
from tiny import make_model


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Path:
    """A tiny Llama whose output head is a matrix of its own."""
    return make_model(tmp_path_factory.mktemp("untied") / "llama", tie_word_embeddings=False)
