"""Names, checksums and canonical JSON of a package's files. The same inputs give the same bytes."""

import json
from pathlib import Path

from slmake import outputs

SUMS, BOM, PROVENANCE, SIGNATURE = "SHA256SUMS", "bom.cdx.json", "provenance.intoto.json", "model.sig"


def files_of(folder: Path) -> list[str]:
    """Names of a package's files, sorted, without Snakemake's own marker."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".snakemake")
    )


def digests(folder: Path, leave_out: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of every file of a package except those in `leave_out`."""
    return {name: outputs.sha256(folder / name) for name in files_of(folder) if name not in leave_out}


def sums_text(digests: dict[str, str]) -> str:
    """The content of SHA256SUMS, as `sha256sum --check` reads it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def canonical(value: object) -> str:
    """JSON with sorted keys, indented, with a final newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
