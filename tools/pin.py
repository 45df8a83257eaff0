"""Print a remote source with its pin, to be put into params.yaml.

    python -m tools.pin az://data/phrases.jsonl
    az://data/phrases.jsonl#etag=0x8DC2B1F9A4C3E10

Azure Blob (and a datastore) is pinned by ETag: of a folder, by one value over the names and ETags of its files. A file of the web and a
local one are pinned by SHA-256 (it is read once for that), a hub's revision by the commit that it stands for.
"""

import argparse

from slmake import cli
from slmake.errors import UserError
from slmake.sources.schemes import parse


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the source, with or without a pin")
    args = parser.parse_args(argv)
    with cli.job("pin") as job:
        try:
            source = parse(args.source, must_pin=False)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        print(source.pinned(job))


if __name__ == "__main__":
    main()
