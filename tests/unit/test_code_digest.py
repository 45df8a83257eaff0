"""The digest of code is the same for every Python that the project runs on."""

import pytest

from slmake import code_inputs

SOURCE = '''\
"""A module."""
from __future__ import annotations

import json as j

TEXT = "\u0e01\\u2028 quoted"


@j.cached(size=1_000)
class Table:
    """A table."""

    rows: list[int] = []

    async def read(self, *names: str, limit=None, **options) -> str:
        """Documentation."""
        async with self.lock as lock, self.file:
            return f"{{{self.rows!r:>{limit}}}} of {names[-1]:,} {{{{}}}} {lock}" + TEXT


def walk(tree, /, *, depth=-0.5j):
    for node, *rest in tree:
        match node:
            case {"a": [1, *_], **more} | str(more):
                yield from (x for x in more if not x)
            case _:
                lambda: (yield)
    else:
        try:
            del tree[1:2, ...]
        except* ValueError as error:
            raise error from None
'''
DIGEST = "d1748eb70d58f818ae64fb1582724e4d3499598fb0b5aeed57f352d4fa55c187"


def digest_of(tmp_path, source: str) -> str:
    file = tmp_path / "module.py"
    file.write_text(source, encoding="utf-8")
    return code_inputs._read(file)["meaning"]


def test_the_digest_of_a_source_is_this_one(tmp_path):
    """Python 3.11, 3.12 and 3.13 compute the same: after an upgrade of Python nothing runs again."""
    assert digest_of(tmp_path, SOURCE) == DIGEST


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"""A table."""', '"""Rows."""'),
        ("1_000", "1000"),
        ("limit=None, **options", "limit=None, **options,"),
        ('!r:>{limit}}}} of', '!r:>{limit}}}} " f"of'),
    ],
    ids=["docstring", "digits", "comma", "text in two parts"],
)  # fmt: skip
def test_what_is_written_otherwise_is_the_same(tmp_path, before, after):
    assert before in SOURCE
    assert digest_of(tmp_path, SOURCE.replace(before, after)) == DIGEST


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("limit=None", "limit=0"),
        ("rows: list[int] = []", "rows: list[int]"),
        ("{{{{}}}}", "{{}}"),
        ("!r:>", "!s:>"),
        (" of ", " at "),
        ("-0.5j", "-0.5"),
        ("/, *,", "*,"),
        ("from None", ""),
        ("async with", "with"),
        ("u2028", "u2029"),
        ("case _", "case other"),
        ("1:2", "1::2"),
    ],
)
def test_what_means_something_else_is_another(tmp_path, before, after):
    assert before in SOURCE
    assert digest_of(tmp_path, SOURCE.replace(before, after)) != DIGEST
