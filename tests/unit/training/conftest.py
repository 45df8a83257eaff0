"""Fixtures of the tests of training."""

from pathlib import Path

import pytest
from finetune_script import tune


@pytest.fixture(scope="session")
def tuned(tmp_path_factory, base, dataset) -> Path:
    """One plain run; do not write into it."""
    return tune(tmp_path_factory.mktemp("tuned") / "run", base, dataset)
