"""Check a parameter file.

python -m slmake.params params.yaml
"""

import argparse
import sys

from slmake.errors import UserError
from slmake.params import load

if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="params.yaml", help="the file to check (default: params.yaml)")
    arguments = parser.parse_args()
    try:
        print(f"{arguments.file}: {len(load(arguments.file).model_fields_set)} sections, valid")
    except UserError as problem:
        sys.exit(f"error: {problem}")
