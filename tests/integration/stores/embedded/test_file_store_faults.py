"""The file store on a failing disk: the n-th call of each kind fails, once or from then on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from orchestrator.protocols import Commit, Key, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.testing.clock import ManualClock
from tests.faults import strace_fails
from tests.waiting import wait_for

pytestmark = pytest.mark.extended

SCENARIO = Path(__file__).with_name("file_store_scenario.py")
FAULTS = [
    *((call, "ENOSPC") for call in ("pwrite64", "write", "fdatasync", "openat", "rename")),
    *((call, "EIO") for call in ("pwrite64", "write", "fdatasync", "fsync", "rename", "openat", "unlink")),
    *((call, "EIO") for call in ("pread64", "read", "mkdir")),
]
#: More than the scenario makes of any of them.
MANY = 500

Line = dict[str, Any]


class Server:
    """A server that starts scenarios, each in a process that waits for a tracer."""

    def __init__(self, folder: Path) -> None:
        """Start the server; `folder` is for trace files."""
        self._trace = folder / "trace"
        self._process = subprocess.Popen(
            [sys.executable, str(SCENARIO)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        """Stop the server."""
        self._process.communicate(timeout=10)

    def run(self, folder: Path, call: str, error: str, when: str) -> tuple[list[Line], int]:
        """Return the scenario's output, and the number of failed calls."""
        assert self._process.stdin
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        child = int(self._line()["child"])
        wait_for(lambda: _status(child, "State").startswith("T"))
        inject = ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}"]
        with subprocess.Popen(["strace", "-f", "-qq", "-o", self._trace, *inject, "-p", str(child)]) as strace:
            wait_for(lambda: _status(child, "TracerPid") == str(strace.pid))
            os.kill(child, signal.SIGCONT)
            lines = []
            while "ended" not in (line := self._line()):
                lines.append(line)
        assert line == {"ended": 0}, lines[-3:]
        return lines, self._trace.read_text().count("(INJECTED)")

    def _line(self) -> Line:
        assert self._process.stdout
        line: Line = json.loads(self._process.stdout.readline())
        return line


def _status(pid: int, field: str) -> str:
    found = re.search(rf"^{field}:\s*(\S+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of scenarios."""
    with TemporaryDirectory() as folder:
        if why := strace_fails(Path(folder)):
            pytest.skip(why)
        server = Server(Path(folder))
        yield server
        server.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for many quick stores: in memory if the machine offers it."""
    shared_memory = Path("/dev/shm")
    with TemporaryDirectory(dir=shared_memory if os.access(shared_memory, os.W_OK) else None) as directory:
        yield Path(directory) / "state"


async def check(folder: Path, lines: list[Line], *, lasting: bool) -> None:
    """Check that exactly the acknowledged commits exist, undamaged, and that the store takes commits."""
    assert lines[-1] == {"step": "over"}
    refused = [line for line in lines if "refused" in line]
    for line in refused:
        assert re.search(r": (check the disk and the system log|free some space)$", line["refused"]), line
    if not lasting:
        assert len(refused) <= 2, refused
    positions = Counter(line["position"] for line in lines if line["step"] == "commit" and "position" in line)
    assert not [position for position, times in positions.items() if times > 1]
    async with FileStore.open(folder, ManualClock()) as store:
        assert not any(one.keys is None or one.keys for one in store.damage), store.damage
        for name in "abc":
            tried = [line for line in lines if line.get("key") == f"task/{name}"]
            done = [line["number"] for line in tried if "position" in line]
            found = await store.get(Key("task", name))
            number = found.value["n"] if found else None
            newest = done[-1] if done else None
            # If nothing works on the disk any more, a rejected commit can't be undone.
            doubtful = [line["number"] for line in tried if line["number"] > (newest or 0)] if lasting else []
            assert number in {newest, *doubtful}, (number, tried[-3:])
            version = found.version if found else 0
            await store.commit(Commit([Write(Key("task", name), version, {"n": 0})]))
        assert (await store.verify()).is_valid
        assert await store.position() >= max(positions, default=0) + 3


async def run(server: Server, folder: Path, call: str, error: str, when: str) -> int:
    """Run a scenario with faults; return their number."""
    shutil.rmtree(folder, ignore_errors=True)
    lines, failed = server.run(folder, call, error, when)
    try:
        await check(folder, lines, lasting=when.endswith("+"))
    except BaseException as failure:
        failure.add_note(f"{call} fails with {error} at {when}: {lines}")
        raise
    return failed


@pytest.mark.parametrize(("call", "error"), FAULTS)
async def test_disk_that_fails_sometimes_loses_nothing(server: Server, folder: Path, call: str, error: str) -> None:
    """Single calls, and all calls from some call on."""
    failed = [await run(server, folder, call, error, when) for when in ("5", "3+")]
    assert any(failed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("last", ["", "+"], ids=["once", "from then on"])
@pytest.mark.parametrize(("call", "error"), FAULTS)
async def test_disk_that_fails_at_each_call_loses_nothing(
    server: Server, folder: Path, call: str, error: str, last: str
) -> None:
    number = 1
    while await run(server, folder, call, error, f"{number}{last}"):
        number += 1
        assert number < MANY
    assert number > 1


async def test_store_without_faults_rejects_nothing(server: Server, folder: Path) -> None:
    lines, failed = server.run(folder, "fdatasync", "EIO", str(MANY))
    assert not failed
    assert not [line for line in lines if "refused" in line]
    assert len([line for line in lines if line["step"] == "commit"]) == 24
    names = [path.name for path in folder.iterdir()]
    assert any(re.fullmatch(r"\d{20}-\d{20}\.jsonl\.zst", name) for name in names)
    assert any(re.fullmatch(r"\d{20}\.jsonl\.zst", name) for name in names)
    assert "snapshot" in names
    await check(folder, lines, lasting=False)
