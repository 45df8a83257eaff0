"""Regular expressions of the user's, matched within a time limit: in Python's `re` some need centuries for thirty letters."""

import functools
import re

SECONDS = 1.0  # of one match; a sound pattern needs microseconds
# Texts on which patterns with repeated groups fail in the slowest way.
HARD = (
    "a" * 40 + "!",
    "7" * 40 + "!",
    "A" * 40 + "\n",
    "ab " * 15 + "!",
    "a, b. " * 8 + "!",
    "a.b." * 12 + "\0",
    " " * 40 + "!",
)


class Pattern:
    """A regular expression as Python's `re` reads it, in which `.` stands for a line's end, too, if so asked.

    Raises:
        ValueError: it is none, or one of HARD takes longer than SECONDS.
    """

    def __init__(self, text: str, dotall: bool = False):
        import regex

        self.text = text
        try:
            re.compile(text)
            self.form = regex.compile(text, regex.DOTALL if dotall else 0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"`{text}` is no regular expression: {error}") from None
        for hard in HARD:
            self.fullmatch(hard)
            self.search(hard)

    def fullmatch(self, text: str) -> bool:
        """Whether all of a text has this form.

        Raises:
            ValueError: that took longer than SECONDS.
        """
        return self._within(self.form.fullmatch, text)

    def search(self, text: str) -> bool:
        """Whether some part of a text has this form; raises as `fullmatch` does."""
        return self._within(self.form.search, text)

    def _within(self, match, text: str) -> bool:
        try:
            return match(text, timeout=SECONDS) is not None
        except TimeoutError:
            raise ValueError(
                f"`{self.text}` takes longer than {SECONDS:.0f} s on a text of {len(text)} characters: write it without a repeated group whose "
                r"parts may match the same letters, such as (\w+\s?)+"
            ) from None


compiled = functools.cache(Pattern)  # so that a pattern is tried on HARD once
