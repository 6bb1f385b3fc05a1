"""A compressed and compacted log has the same current state, and says how far its history goes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path

import anyio
import pytest

from orchestrator.errors import HistoryCompacted
from orchestrator.protocols import VERSIONS_KEPT, Commit, CommitRecord, Event, Key, Store, Write
from orchestrator.state.log import snapshot
from orchestrator.state.log.segments import list_segments
from orchestrator.state.stores.file import FileStore
from orchestrator.testing.clock import ManualClock

MUCH, FEW, GONE, OTHER = (Key("task", name) for name in ("much", "few", "gone", "other"))
COMMITS = 40
ALL = 1 << 40  # bytes


@pytest.fixture
def clock() -> ManualClock:
    """The tests' clock."""
    return ManualClock()


@pytest.fixture
async def store(tmp_path: Path, clock: ManualClock) -> AsyncIterator[FileStore]:
    """A store of small segments, with one commit a minute."""
    async with FileStore.open(tmp_path / "state", clock, segment_bytes=1_500) as opened:
        await opened.commit(Commit([Write(FEW, 0, {"n": 0}), Write(GONE, 0, {"n": 0})], [Event("begun")]))
        await opened.commit(Commit([Write(GONE, 1, None)]))
        for number in range(COMMITS):
            clock.advance(60)
            await opened.commit(Commit([Write(MUCH, number, {"n": number, "text": "x" * 100})], [Event("counted")]))
        yield opened


async def all_records(store: Store, after: int = 0) -> list[CommitRecord]:
    """Return all records after a position."""
    records, last = list[CommitRecord](), await store.position()
    async with aclosing(store.watch(after)) as watched:
        async for record in watched:
            records.append(record)
            if record.position == last:
                break
    return records


def files(tmp_path: Path) -> list[str]:
    """Return the names of the log's files."""
    return sorted(path.name for path in (tmp_path / "state").iterdir() if ".jsonl" in path.name)


async def test_packed_segments_have_the_same_content(store: FileStore, tmp_path: Path, clock: ManualClock) -> None:
    """For a store that is open, and for the next one; the newest segment is not compressed."""
    records, versions, state = await all_records(store), await store.history(MUCH, 100), await store.at(7)
    compacted = await store.compact(0.0, ALL)
    assert compacted.after < compacted.before
    assert compacted.first == 0
    names = files(tmp_path)
    assert len(names) > 5
    assert [name.endswith(".zst") for name in names] == [True] * (len(names) - 1) + [False]
    async with FileStore.open(tmp_path / "state", clock) as other:
        for one in (store, other):
            assert (await all_records(one), await one.history(MUCH, 100), await one.at(7)) == (records, versions, state)
            assert not one.damage
        await other.commit(Commit([Write(FEW, 1, {"n": 1})]))
        assert (await all_records(store, after=len(records)))[0].documents == {FEW: (2, {"n": 1})}
    (tmp_path / "state" / snapshot.SNAPSHOT_FILE).unlink(missing_ok=True)
    async with FileStore.open(tmp_path / "state", clock) as replayed:
        assert (await all_records(replayed))[:-1] == records


async def test_old_commits_keep_the_last_versions(store: FileStore, tmp_path: Path, clock: ManualClock) -> None:
    """Newer commits stay whole; older ones can't be read, and the log says so."""
    now, newest = clock.now(), [await store.get(key) for key in (MUCH, FEW, GONE)]
    whole, recent = await store.history(MUCH, 100), await store.at(40)
    compacted = await store.compact(now - 10 * 60, ALL)
    assert 20 < compacted.first < 33
    assert files(tmp_path)[0] == f"{1:020d}-{compacted.first:020d}.jsonl.zst"
    async with FileStore.open(tmp_path / "state", clock) as other:
        for one in (store, other):
            assert [await one.get(key) for key in (MUCH, FEW, GONE)] == newest
            assert await one.at(40) == recent
            assert (await one.at(compacted.first)).documents.keys() == {MUCH, FEW}
            with pytest.raises(HistoryCompacted, match=str(compacted.first)):
                await one.at(compacted.first - 1)
            kept = await one.history(MUCH, 100)
            assert kept == whole[: len(kept)]
            assert len(kept) >= VERSIONS_KEPT
            assert [version.value for version in await one.history(FEW)] == [{"n": 0}]
            assert list((await one.history(FEW))[0].events) == [Event("begun")]
            with pytest.raises(HistoryCompacted):
                await all_records(one)
            assert (await all_records(one, compacted.first))[0].position == compacted.first + 1
            assert not one.damage
        await other.commit(Commit([Write(GONE, 0, {"n": 1})]))
    found = await store.get(GONE)
    assert found is not None
    assert found.version == 3


async def test_log_can_be_compacted_repeatedly(store: FileStore, tmp_path: Path, clock: ManualClock) -> None:
    start, versions = clock.now() - COMMITS * 60, await store.history(MUCH, 100)
    for minutes in range(0, COMMITS, 7):
        await store.compact(start + minutes * 60, ALL)
        kept = await store.history(MUCH, 100)
        assert kept == versions[: len(kept)]
        assert len(kept) >= VERSIONS_KEPT
    assert len([one for one in list_segments(tmp_path / "state") if one.is_pruned]) == 1
    async with FileStore.open(tmp_path / "state", clock) as other:
        assert await other.history(MUCH) == versions[:VERSIONS_KEPT]
        assert not other.damage


async def test_log_size_is_limited(store: FileStore, clock: ManualClock) -> None:
    """Even young commits are removed, except the newest segment and the last versions."""
    for number in range(400):
        await store.commit(Commit(events=[Event("noise", {"text": str(number) * 30})]))
    before = await store.compact(0.0, ALL)
    after = await store.compact(0.0, before.after // 2)
    assert after.after <= before.after // 2
    found = await store.get(MUCH)
    assert found is not None
    assert found.version == COMMITS
    assert len(await store.history(MUCH)) == VERSIONS_KEPT


async def test_lagging_reader_starts_again(store: FileStore, tmp_path: Path, clock: ManualClock) -> None:
    """A process that was stopped during a compaction has the current state, and reports no damage."""
    async with FileStore.open(tmp_path / "state", clock, segment_bytes=1_500) as other:
        for number in range(COMMITS, 2 * COMMITS):
            clock.advance(60)
            await store.commit(Commit([Write(MUCH, number, {"n": number, "text": "x" * 100})]))
        await store.compact(clock.now() - 5 * 60, ALL)
        found = await other.get(MUCH)
        assert found is not None
        assert found.version == 2 * COMMITS
        assert await other.commit(Commit([Write(FEW, 1, {})])) == await store.position()
        assert not other.damage


async def test_process_that_wrote_the_newest_compacted_commit_continues(tmp_path: Path, clock: ManualClock) -> None:
    """It has read all of a segment that another process has closed and compacted."""
    folder = tmp_path / "state"
    async with (
        FileStore.open(folder, clock, segment_bytes=100) as writer,
        FileStore.open(folder, clock, segment_bytes=100) as other,
    ):
        await writer.commit(Commit([Write(MUCH, 0, {"text": "x" * 100})]))
        await other.commit(Commit([Write(FEW, 0, {"text": "x" * 100})]))
        assert (await other.compact(clock.now() + 1, 1)).first == 1
        assert await writer.get(FEW) is not None
        assert await writer.commit(Commit([Write(MUCH, 1, {})])) == 3
        assert not writer.damage


async def test_commits_and_followers_during_compactions(tmp_path: Path, clock: ManualClock) -> None:
    """Of two processes; every commit is kept, and seen once or reported as compacted."""
    folder, count = tmp_path / "state", 60
    keys = [Key("task", name) for name in "abc"]
    async with (
        FileStore.open(folder, clock, segment_bytes=2_000) as compacting,
        FileStore.open(folder, clock, segment_bytes=2_000) as other,
    ):

        async def write(store: FileStore, key: Key) -> None:
            for number in range(count):
                await store.commit(Commit([Write(key, number, {"n": number, "text": "x" * 200})], durable=False))

        async def compact() -> None:
            while True:
                await compacting.compact(clock.now() + 1, 1)

        async def follow(store: FileStore) -> None:
            after = 0
            while after < count * len(keys):
                with suppress(HistoryCompacted):
                    async with aclosing(store.watch(after)) as watched:
                        record = await anext(watched)
                        assert record.position == after + 1
                        after = record.position
                        continue
                after = (await store.statistics()).first

        async with anyio.create_task_group() as background:
            background.start_soon(compact)
            async with anyio.create_task_group() as group:
                for store in (compacting, other):
                    group.start_soon(follow, store)
                for store, key in zip((compacting, other, compacting), keys, strict=True):
                    group.start_soon(write, store, key)
            background.cancel_scope.cancel()
        for store in (compacting, other):
            assert not store.damage
            assert [version.version for version in await store.history(keys[0], 1)] == [count]
            assert await store.position() == count * len(keys)
        report = await other.verify()
        assert (*report.damage, *report.damaged, *report.mismatched) == ()


async def test_lagging_follower_is_notified(store: FileStore, clock: ManualClock) -> None:
    """Commits that it has not seen yet are not skipped silently."""
    async with aclosing(store.watch(3)) as watched:
        first = await anext(watched)
        assert first.position == 4
        await store.compact(clock.now(), ALL)
        with pytest.raises(HistoryCompacted), anyio.fail_after(10):
            async for _ in watched:
                pass


async def test_damaged_part_is_not_compacted(store: FileStore, tmp_path: Path, clock: ManualClock) -> None:
    """An unreadable segment may still be repairable."""
    oldest = tmp_path / "state" / files(tmp_path)[1]
    oldest.write_bytes(oldest.read_bytes().replace(b'"text":"xxx', b'"text":"yyy', 1))
    assert (await store.compact(clock.now(), ALL)).first == 0
    assert not any(one.is_pruned for one in list_segments(tmp_path / "state"))


async def test_damage_in_a_compacted_part_is_reported(store: FileStore, tmp_path: Path, clock: ManualClock) -> None:
    """For every byte: each document that was not written since is marked, none is silently older."""
    await store.commit(Commit([Write(OTHER, 0, {"n": 0})]))
    await store.compact(clock.now(), ALL)
    (thinned,) = [one.path(tmp_path / "state") for one in list_segments(tmp_path / "state") if one.is_pruned]
    good = thinned.read_bytes()
    for offset in range(0, len(good), 7):
        thinned.write_bytes(good[:offset] + bytes([good[offset] ^ 0x10]) + good[offset + 1 :])
        async with FileStore.open(tmp_path / "state", clock) as other:
            found, few = await other.get(OTHER), await other.get(FEW)
            assert found == await store.get(OTHER)
            assert few is None or few.damaged or few == await store.get(FEW)
            damaged = {damage.keys for damage in other.damage}
            # A few bytes at the beginning affect only how fast a store opens.
            assert damaged == ({None} if few is None or few.damaged else set())
            assert await other.position() == await store.position()


@pytest.mark.extended_variants
@pytest.mark.parametrize("failpoint", ["state.packed=kill", "state.packed=kill@3", "state.pruned=kill"])
async def test_killed_compaction_is_complete_or_absent(
    store: FileStore, tmp_path: Path, clock: ManualClock, failpoint: str
) -> None:
    """The next process finds the whole state, and finishes the compaction."""
    newest, versions = await store.get(MUCH), await store.history(MUCH)
    code = (
        "import sys, anyio\nfrom pathlib import Path\nfrom orchestrator.state.stores.file import FileStore\n"
        "from orchestrator.system.clock import SystemClock\n"
        "async def main():\n"
        "    async with FileStore.open(Path(sys.argv[1]), SystemClock()) as store:\n"
        "        await store.compact(1e12, 1 << 40)\n"
        "anyio.run(main)\n"
    )
    env = {**os.environ, "COUNCIL_FAILPOINTS": failpoint}
    done = await anyio.run_process([sys.executable, "-c", code, str(tmp_path / "state")], env=env, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    async with FileStore.open(tmp_path / "state", clock) as other:
        for one in (store, other):
            assert (await one.get(MUCH), await one.history(MUCH)) == (newest, versions)
            assert not one.damage
        compacted = await other.compact(clock.now(), ALL)
    assert compacted.first > 30
    assert len(files(tmp_path)) == len(list_segments(tmp_path / "state"))
    assert (await store.get(MUCH), await store.history(MUCH)) == (newest, versions)
    assert subprocess.run(["ls", tmp_path / "state"], capture_output=True, check=True).stdout.count(b".new") == 0
