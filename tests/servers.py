"""Servers of stores in tests: without one, a test is skipped, or fails in CI."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import processes, server_starter

NOBODY = 65534
"""The user that runs servers if the tests run as root."""
_MAX_START = 60.0


class MissingServer(Exception):
    """This machine has no server program."""


@contextmanager
def skipping(variable: str) -> Iterator[None]:
    """Skip the test if there is no server program; fail it in CI. `variable` contains the URL of a running server."""
    try:
        yield
    except MissingServer as error:
        if os.environ.get("CI"):
            pytest.fail(f"{error}, or set {variable}")
        pytest.skip(f"{error}, or set {variable}")


def start_server(
    argv: Sequence[str],
    folder: Path,
    is_ready: Callable[[int, str], bool],
    *,
    user: int | None,
    ended_by: signal.Signals = signal.SIGKILL,
) -> subprocess.Popen[bytes]:
    """Start a server in a folder as `user`, and wait until it is ready.

    `is_ready` gets its process id, and its output, which is appended to `folder/log`. If this process is killed, the
    server gets the signal `ended_by`.
    """
    log = folder / "log"
    with log.open("ab") as output:
        start = output.tell()
        words = map(str, (os.getpid(), int(ended_by), -1 if user is None else user))
        process = subprocess.Popen(
            [sys.executable, "-S", server_starter.__file__, *words, *argv],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder, start_new_session=True,
        )  # fmt: skip
    processes.servers.add(process.pid)
    until = time.monotonic() + _MAX_START
    while not is_ready(process.pid, said := log.read_bytes()[start:].decode(errors="replace")):
        if process.poll() is not None or time.monotonic() > until:
            raise AssertionError(f"the server has not started: {said}")
        time.sleep(0.02)
    return process
