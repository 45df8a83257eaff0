"""Text of a dataset in figures, pages, Markdown and CSV: what it must not be taken for, and that it stays what it is."""

import csv
import io

import pytest

from slmake.text import code_span, csv_cell, csv_text, listing, markdown, one_line, printable

FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "＝1", "'=1", "''=1", "-", "=")
HARMLESS = ("joy", "a=b", "'tis", "''", "'", "", " =1", "### Text: x", "1-2", "(=)", "joy\n=1")


@pytest.mark.parametrize("text", FORMULAS + HARMLESS)
def test_csv_cells_run_nothing_and_come_back_as_they_were(text):
    handle = io.StringIO(newline="")
    csv.writer(handle, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).writerow([csv_cell(text), "end"])
    (row,) = csv.reader(io.StringIO(handle.getvalue(), newline=""))
    assert csv_text(row[0]) == text
    assert row[0][:1] not in tuple("=+-@\t\r＝")
    assert (row[0] == text) is (text in HARMLESS)


def test_numbers_stay_numbers():
    assert [csv_cell(value) for value in (-1, 0.5, None)] == [-1, 0.5, None]


def test_control_characters_are_shown_as_symbols():
    assert printable("a\x00b\x1b[31m\x7f\r") == "a␀b␛[31m␡␍"
    assert printable("a\x85\u202eb\ud800\ufffe") == "a\ufffd\ufffdb\ufffd\ufffd"
    assert printable("two\nlines\tand a tab, é 漢 👩‍🔬") == "two\nlines\tand a tab, é 漢 👩‍🔬"
    assert one_line(" a \n b\r\nc ", 4) == "a b…"
    assert one_line("joy", 3) == "joy"


def test_lists_of_names_are_cut():
    """A file may have any number of columns, and a name any length."""
    names = [str(number) for number in range(11)]
    assert listing(names[:10]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert listing(names, " and ").endswith("8 and 9 and 1 more")
    assert len(listing(["x" * 10**6] * 10**4)) < 700
    assert listing([]) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("joy", "joy"),
        ("a|b", r"a\|b"),
        ("<script>", r"\<script\>"),
        ("*a* _b_ `c` [d](e)", r"\*a\* \_b\_ \`c\` \[d\](e)"),
        ("$5-$10", r"\$5-\$10"),
        ("&lt;", r"\&lt;"),
        ("a\n---\n# b", r"a --- \# b"),
    ],
)
def test_markdown_shows_the_text(text, shown):
    assert markdown(text) == shown


def test_code_spans_hold_backticks_and_bars():
    assert code_span("a") == "`a`"
    assert code_span("a`b``c") == "```a`b``c```"
    assert code_span("`a|b") == r"`` `a\|b ``"
