"""Run a command and write what it took to a file: python -I -S bench/launch.py FILE COMMAND...

A small process of its own, because a child's peak memory starts from its parent's: the kernel counts the pages that it shared
before it became another program. Standard library only.
"""

import json
import os
import subprocess
import sys
import time


def main() -> None:
    began = time.monotonic()
    child = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    took = {
        "wall": time.monotonic() - began,
        "cpu": used.ru_utime + used.ru_stime,
        "peak": used.ru_maxrss * unit,
        "code": child.returncode,
    }
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        json.dump(took, out)


if __name__ == "__main__":
    main()
