"""docs/sources.md: an example of every scheme that params.yaml takes, each read as params.yaml reads it."""

import re

import pytest
from tiny import ROOT

from slmake.sources import schemes

TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "sources.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| [^|]+ \| `", line)
]
EXAMPLES = {row[0]: row[1].strip("`").replace("HEX", "a" * 64).replace("VALUE", "0x8D") for row in TABLE}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_a_source_with_a_pin(name):
    assert schemes.parse(EXAMPLES[name]).full


def test_every_scheme_has_an_example():
    kinds = {schemes.parse(example).kind for example in EXAMPLES.values()}
    assert kinds == {scheme.kind for scheme in schemes.SCHEMES}


@pytest.mark.parametrize("name", [name for name in EXAMPLES if "#" in EXAMPLES[name]])
def test_an_example_that_shows_a_pin_needs_it(name):
    with pytest.raises(ValueError, match="not pinned"):
        schemes.parse(EXAMPLES[name].partition("#")[0])


def test_the_column_of_pins_is_right():
    """A scheme without a pin in its text is pinned by something else, and the page names it."""
    for name, example, pin, _ in TABLE:
        source = schemes.parse(EXAMPLES[name])
        assert ("#sha256=` or `#etag=" in pin or "#etag=` or `#sha256=" in pin) == (
            source.pin_needed and not source.member
        ), example
