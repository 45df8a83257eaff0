"""Names, checksums and canonical JSON of a package's files. The same inputs give the same bytes."""

import json
import os
import stat
from pathlib import Path

from slmake import outputs
from slmake.errors import UserError

SUMS, BOM, PROVENANCE, SIGNATURE = "SHA256SUMS", "bom.cdx.json", "provenance.intoto.json", "model.sig"
TIMESTAMP = ".snakemake_timestamp"  # Snakemake's marker in a folder that it built, and no part of the package


def scan(folder: Path) -> tuple[list[str], list[str]]:
    """Names of a package's files, sorted, and a line for each entry that a package may not hold.

    A package is regular files in folders. A link could lead out of it, a pipe blocks its reader, and what a listing hides is seen by
    nobody; so all of these are refused, but for the empty marker that Snakemake leaves in every folder that it built.
    """
    files, refused = [], []
    for root, folders, names in os.walk(folder, onerror=_raise):
        for path in (Path(root, name) for name in [*folders, *names]):
            name, status = path.relative_to(folder).as_posix(), path.lstat()
            if stat.S_ISLNK(status.st_mode):
                refused.append(f"{name}: a link (to {str(path.readlink())!r}), which no package holds")
            elif not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                refused.append(f"{name}: not a regular file")
            elif name == TIMESTAMP and stat.S_ISREG(status.st_mode) and not status.st_size:
                continue
            elif path.name.startswith(".") or not name.isprintable():
                refused.append(f"{name!r}: not part of the package: its name is hidden or has control characters")
            elif stat.S_ISREG(status.st_mode):
                files.append(name)
            elif not any(path.iterdir()):
                refused.append(f"{name}: an empty folder, which is not part of the package")
    return sorted(files), sorted(refused)


def _raise(error: OSError) -> None:
    raise error


def files_of(folder: Path) -> list[str]:
    """Names of a package's files, sorted, without Snakemake's own marker.

    Raises:
        UserError: it holds what no package may hold.
    """
    files, refused = scan(folder)
    if refused:
        raise UserError(f"{folder} holds what cannot be shipped:\n  " + "\n  ".join(refused))
    return files


def digests(folder: Path, leave_out: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of every file of a package except those in `leave_out`."""
    return {name: outputs.sha256(folder / name) for name in files_of(folder) if name not in leave_out}


def sums_text(digests: dict[str, str]) -> str:
    """The content of SHA256SUMS, as `sha256sum --check` reads it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def canonical(value: object) -> str:
    """JSON with sorted keys, indented, with a final newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
