"""Record what was built with DVC, and keep the times by which Snakemake knows it.

    python scripts/commit.py

`dvc commit` puts a file of its cache in the place of one that was built. Where the same content was built before, that is the
old file with its old time, and Snakemake would take it for older than what it was made from, and build again at every call.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    files = [path for folder in ("results", "build") for path in Path(folder).rglob("*") if path.is_file()]
    times = {path: path.stat().st_mtime_ns for path in files}
    done = subprocess.run([sys.executable, "-m", "dvc", "commit", "--force", "--quiet"])
    for path, before in times.items():
        if path.exists() and path.stat().st_mtime_ns != before:
            os.utime(path, ns=(before, before))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
