"""The watcher of a rule's starter where Python or the kernel has no file descriptors of processes."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from slmake import cli

STARTER = [sys.executable, "-c", "input()"]


def test_a_python_without_pidfd_open_ends_with_its_starter(monkeypatch):
    ended, kill = threading.Event(), os.kill
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.setattr(os, "kill", lambda pid, sign: ended.set() if pid == os.getpid() else kill(pid, sign))
    starter = subprocess.Popen(STARTER, stdin=subprocess.PIPE)
    cli.end_with(cli.engine(starter.pid))
    assert not ended.wait(0.7)
    starter.communicate(b"\n")
    assert ended.wait(10)


def test_a_process_has_ended_before_its_parent_takes_its_exit_code():
    starter = subprocess.Popen(STARTER, stdin=subprocess.PIPE)
    assert cli._running(str(starter.pid))
    starter.stdin.close()
    end = time.monotonic() + 10
    while cli._running(str(starter.pid)):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert Path(f"/proc/{starter.pid}").exists()  # nobody has waited for it
    starter.wait()
    assert not cli._running(str(starter.pid))
