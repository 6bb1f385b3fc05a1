"""Writers of one store killed at random times: acknowledged commits are neither lost nor reverted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import pytest

from orchestrator.protocols import Key
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.integration.stores import store_worker
from tests.waiting import wait_for

NAMES = [f"w{number}" for number in range(4)]


class Writers:
    """Processes that commit until killed, and their acknowledged commits."""

    def __init__(self, place: Path) -> None:
        argv = [sys.executable, store_worker.__file__, "churn", str(place)]
        self._server = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._started: SimpleQueue[int] = SimpleQueue()
        self.acknowledged: list[tuple[str, int, int]] = []  # name, version, position
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._pids: dict[str, int] = {}

    def start(self, name: str) -> None:
        """Start a writer in place of a killed one."""
        assert self._server.stdin
        self._server.stdin.write(f"{name}\n")
        self._server.stdin.flush()
        self._pids[name] = self._started.get(timeout=20)

    def kill(self, name: str) -> None:
        """Kill a writer at any point."""
        os.kill(self._pids[name], signal.SIGKILL)

    def have_said(self, count: int) -> bool:
        """Return whether that many commits were acknowledged."""
        return len(self.acknowledged) >= count

    def close(self) -> None:
        """Kill all writers."""
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        if self._server.stdin:
            self._server.stdin.close()
        self._reader.join()

    def _read(self) -> None:
        assert self._server.stdout
        with self._server.stdout as output:
            for line in output:
                name, first, second = line.split()
                if name == "started":
                    self._started.put(int(second))
                else:
                    self.acknowledged.append((name, int(first), int(second)))


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    """Return writers of one store."""
    made = Writers(tmp_path / "state")
    yield made
    made.close()


@pytest.mark.extended
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [12, pytest.param(300, marks=pytest.mark.slow)])
async def test_store_is_intact_after_writers_are_killed(writers: Writers, tmp_path: Path, kills: int) -> None:
    """After each kill acknowledged commits exist, documents match the log, and no version decreases."""
    dice, seen = random.Random(kills), dict.fromkeys(NAMES, 0)
    for name in NAMES:
        writers.start(name)
    for number in range(kills):
        target = len(writers.acknowledged) + dice.randrange(40)
        wait_for(partial(writers.have_said, target))
        threading.Event().wait(dice.uniform(0, 0.01))
        victim = dice.choice(NAMES)
        writers.kill(victim)
        said = list(writers.acknowledged)
        async with FileStore.open(tmp_path / "state", SystemClock()) as store:
            assert not any(one.keys is None or one.keys for one in store.damage), (number, store.damage)
            for name in NAMES:
                found = await store.get(Key("own", name))
                version = found.version if found else 0
                assert found is None or (found.value["n"], found.damaged) == (version, False)
                newest = max((reported for who, reported, _ in said if who == name), default=0)
                assert version >= max(newest, seen[name]), (number, name)
                seen[name] = version
            verified = await store.verify()
            assert verified.is_valid, (number, verified)
            assert verified.position >= max((position for _, _, position in said), default=0)
        writers.start(victim)
    positions = [position for _, _, position in writers.acknowledged]
    assert len(set(positions)) == len(positions)
    versions = [(name, version) for name, version, _ in writers.acknowledged]
    assert len(set(versions)) == len(versions)
    names = [path.name for path in (tmp_path / "state").iterdir()]
    assert any(name.endswith(".zst") for name in names)
