"""A process that is killed at each named step of a commit and of a snapshot: what it was told stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from orchestrator.clock import SystemClock
from orchestrator.protocols import HISTORY, Key
from orchestrator.state import snapshot
from orchestrator.state.file import FileStore
from tests.integration import file_store_worker

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


@pytest.mark.parametrize("step", STEPS)
async def test_killed_at_a_named_step(tmp_path: Path, step: str) -> None:
    """Every acknowledged commit is there, perhaps the one under way, and the state is what the log says."""
    name, _, hit = step.partition("@")
    done = subprocess.run(
        [sys.executable, file_store_worker.__file__, "snapshots", str(tmp_path), "victim"],
        env={**os.environ, "COUNCIL_FAILPOINTS": f"{name}=kill@{hit or 1}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    said = [tuple(map(int, line.split()[1:])) for line in done.stdout.splitlines()]
    async with FileStore.open(tmp_path, SystemClock()) as store:
        position, own = await store.position(), await store.get(OWN)
        reached = (own.version, own.position) if own else (0, 0)
        assert position in {len(said), len(said) + 1}
        assert reached == ((position, position) if position else (0, 0))
        assert [one.version for one in await store.history(OWN)] == list(range(position, 0, -1))[:HISTORY]
        found = await store.verify()
        assert found.is_sound, found
        assert [damage.keys for damage in store.damage if damage.keys != ()] == []
    async with FileStore.open(tmp_path, SystemClock()) as again:  # and by whoever comes next
        assert (await again.position(), (await again.verify()).is_sound) == (position, True)
        await again.compact(-inf, 1 << 30)
    assert not list(tmp_path.glob(f"{snapshot.NAME}*.new"))
