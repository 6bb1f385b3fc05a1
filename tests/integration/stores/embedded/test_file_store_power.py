"""The file store after a power loss: durable commits exist or are reported, others may be lost silently."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from orchestrator.protocols import Commit, Event, Key, Write
from orchestrator.state.log import snapshot
from orchestrator.state.log.segments import HighWaterMark
from orchestrator.state.stores.file import FileStore
from orchestrator.testing.clock import ManualClock
from tests.power_loss import lose_power, simulate_reboot

BEAT, WORK = Key("beat", "b"), Key("work", "w")


def newest(folder: Path) -> Path:
    """Return the segment that is written to."""
    return max(folder.glob("*.jsonl"))


async def beat(store: FileStore, times: int) -> None:
    """Commit non-durably."""
    for _ in range(times):
        found = await store.get(BEAT)
        version = found.version if found else 0
        await store.commit(Commit([Write(BEAT, version, {"n": version, "x": "x" * 200})], durable=False))


async def work(store: FileStore) -> None:
    """Commit durably."""
    found = await store.get(WORK)
    version = found.version if found else 0
    await store.commit(Commit([Write(WORK, version, {"n": version})], [Event("worked")]))


async def test_undurable_commits_may_be_lost(tmp_path: Path) -> None:
    """At any length, with any mark: nothing is reported or flagged, and the store takes commits."""
    async with FileStore.open(tmp_path, ManualClock()) as store:
        await work(store)
        await beat(store, 2)
        await work(store)
        durable = newest(tmp_path).stat().st_size
        await beat(store, 8)
        shutil.copytree(tmp_path, tmp_path.with_name("kept"))
    for seed in range(60):
        folder = tmp_path.with_name(f"{tmp_path.name}-{seed}")
        shutil.copytree(tmp_path.with_name("kept"), folder)
        lose_power(folder, durable, random.Random(seed))
        async with FileStore.open(folder, ManualClock()) as store:
            assert not any(one.keys is None or one.keys for one in store.damage), (seed, store.damage)
            found, beaten = await store.get(WORK), await store.get(BEAT)
            assert found is not None
            assert beaten is not None
            assert (found.value, found.damaged, beaten.damaged) == ({"n": 1}, False, False)
            assert 2 <= beaten.version <= 10
            await work(store)
            await beat(store, 1)
            assert not (await store.verify()).mismatched
        async with FileStore.open(folder, ManualClock()) as store:
            assert (await store.verify()).is_valid
            found = await store.get(WORK)
            assert found is not None
            assert found.version == 3


@pytest.mark.parametrize("is_old", [False, True], ids=["mark of then", "mark of before"])
async def test_damaged_durable_commit_is_reported(tmp_path: Path, is_old: bool) -> None:
    """A later commit records that it was durable, even if the mark does not."""
    async with FileStore.open(tmp_path, ManualClock()) as store:
        await beat(store, 1)
        old = (tmp_path / "lock").read_bytes()
        await work(store)
        await beat(store, 3)
    log = newest(tmp_path)
    first, second, *rest = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([first, b"\0" * (len(second) - 1) + b"\n", *rest]))
    simulate_reboot(tmp_path, old if is_old else None)
    async with FileStore.open(tmp_path, ManualClock()) as store:
        assert [one.keys for one in store.damage] == [None]
        found = await store.get(BEAT)
        assert found is not None
        assert found.version == 4


async def test_missing_durable_commit_is_reported(tmp_path: Path) -> None:
    """A drive that acknowledges unwritten data: the mark knows."""
    async with FileStore.open(tmp_path, ManualClock()) as store:
        await work(store)
        size = newest(tmp_path).stat().st_size
        await beat(store, 1)
        await work(store)
        await beat(store, 3)
    log = newest(tmp_path)
    log.write_bytes(log.read_bytes()[:size])
    simulate_reboot(tmp_path)
    async with FileStore.open(tmp_path, ManualClock()) as store:
        (damage,) = store.damage
        assert damage.keys is None
        assert damage.message.startswith("commits 2 to 3 are")
        found = await store.get(WORK)
        assert found is not None
        assert found.damaged


async def test_missing_commit_of_this_boot_is_reported(tmp_path: Path) -> None:
    """Without a power loss nothing may be missing, durable or not."""
    async with FileStore.open(tmp_path, ManualClock()) as store:
        await work(store)
        size = newest(tmp_path).stat().st_size
        await beat(store, 3)
    newest(tmp_path).write_bytes(newest(tmp_path).read_bytes()[:size])
    async with FileStore.open(tmp_path, ManualClock()) as store:
        assert [one.keys for one in store.damage] == [None]


async def test_old_marker_hides_nothing(tmp_path: Path) -> None:
    """The mark may be older than the log: all commits in the log count."""
    async with FileStore.open(tmp_path, ManualClock(), segment_bytes=600) as store:
        await work(store)
        old = (tmp_path / "lock").read_bytes()
        for _ in range(5):
            await beat(store, 1)
            await work(store)
    assert len(list(tmp_path.glob("*.jsonl"))) > 2
    (tmp_path / snapshot.SNAPSHOT_FILE).unlink(missing_ok=True)
    simulate_reboot(tmp_path, old)
    async with FileStore.open(tmp_path, ManualClock()) as store:
        assert (await store.position(), store.damage) == (11, ())
        mark = HighWaterMark.decode((tmp_path / "lock").read_bytes())
        assert mark is not None
        assert (mark.position, mark.durable) == (11, 11)


async def test_segment_is_durable_before_the_next_starts(tmp_path: Path) -> None:
    """A durable commit makes all earlier commits durable, also those in earlier segments."""
    async with FileStore.open(tmp_path, ManualClock(), segment_bytes=600) as store:
        marks = list[HighWaterMark]()
        for _ in range(12):
            await beat(store, 1)
            mark = HighWaterMark.decode((tmp_path / "lock").read_bytes())
            assert mark is not None
            marks.append(mark)
    assert len({mark.segment for mark in marks}) > 2
    assert all(mark.durable == mark.segment - 1 for mark in marks)
