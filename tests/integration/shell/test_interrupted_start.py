"""Ctrl-C during the start of `council`: nothing has begun, and the exit code reports the interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Repository

pytestmark = pytest.mark.extended

#: Makes the import of a module wait for the other end of a fifo.
WAITING = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["WAIT_AT"]:
            sys.meta_path.remove(self)
            open(os.environ["WAIT_ON"]).read()

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    "module",
    [
        "orchestrator.client.session",
        "orchestrator.cli.main",
        "orchestrator.cli.commands.runs.run",
        "anyio._backends._asyncio",
    ],
)
def test_interrupt_during_the_start_is_reported_as_such(repository: Repository, tmp_path: Path, module: str) -> None:
    """During the imports, and during the lookup of the command."""
    (tmp_path / "sitecustomize.py").write_text(WAITING)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    more = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[3]}", "WAIT_AT": module, "WAIT_ON": str(fifo)}
    child = subprocess.Popen(
        [Path(sys.executable).with_name("council"), "run", str(repository.configure([{"id": "a", "prompt": "x"}]))],
        cwd=repository.top,
        env={**repository.environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with fifo.open("w"):  # it waits there from now on
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate()
    assert (child.returncode, stdout, stderr.strip().removeprefix("council: ")) == (130, "", "interrupted")
