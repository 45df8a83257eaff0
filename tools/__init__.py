"""What a person runs: `python -m tools.NAME`, and `make`."""

import getpass
import os


def provide_home() -> None:
    """Give a user whom the system does not know, as in containers, a name and a folder for caches: Snakemake and DVC ask for both."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    if not os.access(os.path.expanduser("~"), os.W_OK):  # noqa: PTH111 (Path.expanduser raises where there is none)
        os.environ.setdefault("XDG_CACHE_HOME", os.path.abspath(".snakemake/cache"))  # noqa: PTH100 (before anything is imported)


provide_home()
