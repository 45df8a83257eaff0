"""What DVC says when it fails, as one sentence."""

import pytest

from slmake.platforms import dvc


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("ERROR: it failed\nmore about it\n", "it failed."),
        ("ERROR: Checkout failed for following targets:\nbuild/base\nIs your cache up to date?\n", "Checkout failed for following targets: build/base."),
        ("ERROR: first\nERROR: last:\n", "last."),
        ("no mark, and a colon:\n", "no mark, and a colon."),
        ("ERROR: unexpected error - [Errno 28] No space left on device\n", "the disk is full. Free some space and run the same command again; nothing is lost."),
        ("", "no reason given."),
        (None, "no reason given."),
    ],
)  # fmt: skip
def test_the_reason_is_one_sentence(said, reason):
    assert dvc.reason(said) == reason
