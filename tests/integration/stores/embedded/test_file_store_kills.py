"""A process is killed at each named step of a commit and of a snapshot: acknowledged commits stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from orchestrator.protocols import VERSIONS_KEPT, Commit, Key, Write
from orchestrator.state.log import snapshot
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.integration.stores import store_worker

pytestmark = pytest.mark.extended

OWN = Key("own", "victim")
STEPS = (
    "state.appended",
    "state.appended@7",
    "state.published",
    "state.published@7",
    "state.rolled",
    "state.rolled@3",
    "state.snapshot_staged",
    "state.snapshot_staged@2",
    "state.snapshot_written",
    "state.snapshot_written@2",
)


def run_killed(folder: Path, step: str) -> list[tuple[int, ...]]:
    """Let another process commit until it is killed at a step; return the acknowledged commits."""
    name, _, hit = step.partition("@")
    done = subprocess.run(
        [sys.executable, store_worker.__file__, "snapshots", str(folder), "victim"],
        env={**os.environ, "COUNCIL_FAILPOINTS": f"{name}=kill@{hit or 1}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return [tuple(map(int, line.split()[1:])) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("step", STEPS)
async def test_store_killed_at_a_failpoint_is_intact(tmp_path: Path, step: str) -> None:
    """Every acknowledged commit exists, perhaps the one in progress, and the state matches the log."""
    acknowledged = run_killed(tmp_path, step)
    async with FileStore.open(tmp_path, SystemClock()) as store:
        position, own = await store.position(), await store.get(OWN)
        reached = (own.version, own.position) if own else (0, 0)
        assert position in {len(acknowledged), len(acknowledged) + 1}
        assert reached == ((position, position) if position else (0, 0))
        assert [one.version for one in await store.history(OWN)] == list(range(position, 0, -1))[:VERSIONS_KEPT]
        found = await store.verify()
        assert found.is_valid, found
        assert [damage.keys for damage in store.damage if damage.keys != ()] == []
    async with FileStore.open(tmp_path, SystemClock()) as again:  # and for the next opener
        assert (await again.position(), (await again.verify()).is_valid) == (position, True)
        await again.compact(-inf, 1 << 30)
    assert not list(tmp_path.glob(f"{snapshot.SNAPSHOT_FILE}*.new"))


@pytest.mark.parametrize(("step", "left"), [("state.appended@3", 1), ("state.published@3", 1), ("state.rolled@2", 0)])
async def test_open_store_continues_after_a_killed_writer(tmp_path: Path, step: str, left: int) -> None:
    """A small commit without a sync follows the log's end, although the mark is older."""
    async with FileStore.open(tmp_path, SystemClock()) as store:
        first = await store.commit(Commit([Write(Key("own", "first"), 0, {})]))
        behind = first + len(run_killed(tmp_path, step)) + left
        await store.get(OWN)  # so that everything up to the mark is known
        position = await store.commit(Commit([Write(Key("own", "other"), 0, {"n": 1})], durable=False))
        own = await store.get(OWN)
        assert (position, own and own.position) == (behind + 1, behind)
        assert (await store.verify()).is_valid
