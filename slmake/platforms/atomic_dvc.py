"""DVC's command line; its own files (dvc.lock) are written beside their place and renamed, where DVC writes in place.

    python -m slmake.platforms.atomic_dvc commit --force

A process that is killed while DVC writes would leave a part of dvc.lock, which DVC then cannot read.
"""

import io
import os
import sys
from pathlib import Path

from dvc.cli import main
from dvc.utils.serialize import _common

from slmake import cli, outputs


def dump(path, data, dumper, fs=None, **options) -> None:
    """Stands in for DVC's own function of the same arguments; DVC's version is pinned, and a test compares."""
    text = io.StringIO()
    dumper(data, text, **options)
    outputs.replace(Path(path), text.getvalue().encode())


_common._dump_data = dump

if __name__ == "__main__":
    cli.end_with(os.environ.get(cli.ENGINE, ""))
    sys.exit(main(sys.argv[1:]))
