"""Print a remote source with its pin, to be put into params.yaml.

    python -m tools.pin az://data/phrases.jsonl
    az://data/phrases.jsonl#etag=0x8DC2B1F9A4C3E10

Azure Blob (and a datastore) is pinned by ETag: of a folder, by one value over the names and ETags of its files. A file of the web and a
local one are pinned by SHA-256 (it is read once for that), a hub's revision by the commit it stands for.
"""

import argparse
import tempfile
from pathlib import Path

from slmake import cli
from slmake.errors import UserError
from slmake.sources.syntax import Source, parse


def pinned(source: Source, job: cli.Job) -> str:
    """The source's text with a pin for what lies there now."""
    from slmake.sources import resolve

    if source.kind in ("az", "datastore"):
        _, _, found = resolve.blobs(source, "model")
        return f"{source.full}#etag={resolve.etag_of(found)}"
    if source.kind in ("registry", "pypi"):
        return source.full  # the version is the pin
    if source.kind == "hf":
        from slmake.sources.hub import commit_of

        return source.full.replace(f"@{source.revision}", f"@{commit_of(source)}", 1)
    with tempfile.TemporaryDirectory(prefix="slmake-pin-") as scratch:
        _, record = resolve.bring(source._replace(pin=None), "model", Path(scratch), job)
    return f"{source.full}#sha256={record['sha256']}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the source, with or without a pin")
    args = parser.parse_args(argv)
    with cli.job("pin") as job:
        try:
            source = parse(args.source, must_pin=False)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        print(pinned(source, job))


if __name__ == "__main__":
    main()
