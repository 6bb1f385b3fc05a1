"""The servers that tests start: none outlives a test process that is killed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_for

_START = """
import os, signal
from pathlib import Path
from tests.{0}_server import started_server
with started_server() as server:
    print(server.process.pid, server.folder, flush=True)
    signal.pause()
"""


@pytest.mark.extended_variants
@pytest.mark.parametrize("kind", ["redis", "postgres"])
def test_server_ends_with_its_killed_test_process(kind: str) -> None:
    """The server runs as another user if the tests run as root, and its output is in a file."""
    command = [sys.executable, "-c", _START.format(kind)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[4]) as child:
        assert child.stdout is not None
        words = child.stdout.readline().split()
        if not words:
            pytest.skip(f"no {kind} server")
        server, log = psutil.Process(int(words[0])), Path(words[1]) / "log"
        family = [server, *server.children(recursive=True)]
        assert log.stat().st_size > 0
        child.kill()
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family))
    shutil.rmtree(words[1])
