"""What a message of ours quotes of another library's."""

import pytest

from slmake.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad\nat line 3"), "bad"),
        (ValueError("\n\n  bad value\nmore"), "bad value"),
        (KeyError(), "KeyError"),
        (ValueError(" \n"), "ValueError"),
    ],
    ids=["lines", "blank lines first", "no message", "white space"],
)
def test_the_first_line_of_a_message(error, line):
    assert first_line(error) == line
