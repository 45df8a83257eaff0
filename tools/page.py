"""The report on one page, build/report.html: written where its figures are others than it shows, gone where it would show others' figures."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from slmake import outputs
from slmake.errors import UserError

OVERVIEW, PAGE = Path("build/report/overview.html"), Path("build/report.html")
SHOWN = Path(".snakemake/slmake.page")  # digest of the figures that the page shows


def figures() -> str:
    """Digest of the figures that are here, and of what the page says around them."""
    return outputs.folder_digest(OVERVIEW.parent) + outputs.folder_digest(Path("report"))


def is_of(shown: str) -> bool:
    """Whether the page has these figures, by what was noted as it was written."""
    return SHOWN.is_file() and SHOWN.read_text(encoding="ascii") == shown


def write() -> None:
    """Put the report's figures on one page, unless the page is of these figures, newer than all of them, and nobody changed it.

    Raises:
        UserError: Snakemake cannot.
    """
    newest = max(path.stat().st_mtime for path in OVERVIEW.parent.iterdir())
    # DVC restores older figures with their times.
    shown = figures()
    if PAGE.exists() and PAGE.stat().st_mtime >= newest and is_of(shown) and outputs.as_built(PAGE):
        return
    command = [sys.executable, "-m", "snakemake", "--nocolor", "--report", str(PAGE)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"{PAGE} could not be written. Snakemake's reason:\n{done.stdout.strip()}")
    outputs.note_built([PAGE])
    outputs.replace(SHOWN, shown.encode())


def remove_stale(say: Callable[[str], None]) -> None:
    """Remove a page of other figures than are here, and say so."""
    if PAGE.exists() and SHOWN.is_file() and not (OVERVIEW.exists() and is_of(figures())):
        PAGE.unlink()
        say(f"{PAGE} was of another build and is removed: `make report` writes it of the figures that are here")
