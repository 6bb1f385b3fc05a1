"""Verify and repair of a damaged log: the readable commits count from then on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import HistoryCompacted
from orchestrator.protocols import Commit, Event, Key, Write
from orchestrator.state.documents.log_reader import read_range
from orchestrator.state.log import snapshot
from orchestrator.state.stores.file import SEGMENT_BYTES, FileStore
from orchestrator.testing.clock import ManualClock

HIT, WHOLE, NEVER, GONE = Key("task", "hit"), Key("task", "whole"), Key("task", "never"), Key("request", "gone")


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    """The folder of a store of three segments: only the second one has the second version of a document."""
    async with FileStore.open(tmp_path, ManualClock(), segment_bytes=600) as store:
        await store.commit(Commit([Write(HIT, 0, {"n": "first"}), Write(WHOLE, 0, {"n": 0})]))
        for number in range(1, 12):
            await store.commit(Commit([Write(WHOLE, number, {"n": number})], [Event("counted")]))
            if number == 4:
                await store.commit(Commit([Write(HIT, 1, {"n": "second"}), Write(NEVER, 0, {"n": "only"})]))
    (tmp_path / snapshot.SNAPSHOT_FILE).unlink(missing_ok=True)
    assert len(log(tmp_path)) >= 3
    return tmp_path


def log(folder: Path) -> list[Path]:
    """Return the segments."""
    return sorted(folder.glob("*.jsonl*"))


def spoil(folder: Path, what: bytes, by: bytes) -> Path:
    """Change some bytes of the log; return the segment."""
    (segment,) = [path for path in log(folder) if what in path.read_bytes()]
    segment.write_bytes(segment.read_bytes().replace(what, by, 1))
    return segment


async def test_intact_log_is_not_repaired(folder: Path) -> None:
    """Verify reports its size, and repair does nothing."""
    async with FileStore.open(folder, ManualClock()) as store:
        verified = await store.verify()
        assert verified.is_valid
        assert (verified.position, verified.bytes) == (13, sum(path.stat().st_size for path in log(folder)))
        assert await store.repair() == verified
        assert await store.position() == 13


async def test_damage_during_use_is_found(folder: Path) -> None:
    """Values that were read before stay valid, and repair uses them."""
    async with FileStore.open(folder, ManualClock()) as store:
        spoil(folder, b'"second"', b'"sec0nd"')
        verified = await store.verify()
        assert not verified.is_valid
        assert set(verified.damaged) == {HIT, NEVER}
        assert not verified.mismatched
        assert (await store.repair()).is_valid
        found = await store.get(HIT)
        assert found is not None
        assert (found.value, found.version) == ({"n": "second"}, 3)


@pytest.mark.parametrize(
    "damage",
    [lambda folder: spoil(folder, b'"second"', b'"sec0nd"'), lambda folder: spoil(folder, b'"never"', b'"NEVER"')],
)
async def test_lost_commits_are_accepted(folder: Path, damage: Callable[[Path], Path]) -> None:
    """The newest known value becomes the next version, or none; the damaged part is kept aside."""
    spoiled = damage(folder).read_bytes()
    async with FileStore.open(folder, ManualClock()) as store:
        before = await store.get(HIT)
        assert before is not None
        assert before.damaged
        verified = await store.verify()
        assert HIT in verified.damaged
        assert (await store.repair()).is_valid
        after, whole = await store.get(HIT), await store.get(WHOLE)
        assert after is not None
        assert whole is not None
        assert (after.value, after.damaged, after.version) == ({"n": "first"}, False, before.version + 1)
        assert whole.value == {"n": 11}
        assert await store.get(NEVER) is None
        events = (await store.history(HIT))[0].events
        assert [event.data["key"] for event in events if event.type == "state.repaired"].count("task/hit") == 1
        with pytest.raises(HistoryCompacted):
            await store.at(1)
    assert any(path.read_bytes() == spoiled for path in (folder / "damaged").iterdir())
    async with FileStore.open(folder, ManualClock()) as store:
        assert not store.damage
        assert await store.get(HIT) == after
        assert (await store.verify()).is_valid


async def test_damage_in_the_newest_segment_is_repaired(folder: Path) -> None:
    """That segment is closed first."""
    newest = log(folder)[-1]
    newest.write_bytes(newest.read_bytes().replace(b'{"n":11}', b'{"n":99}'))
    async with FileStore.open(folder, ManualClock()) as store:
        assert WHOLE in (await store.verify()).damaged
        assert (await store.repair()).is_valid
        found = await store.get(WHOLE)
        assert found is not None
        assert found.value == {"n": 10}


async def requested(folder: Path, *, follow: bool = True, segment_bytes: int = SEGMENT_BYTES) -> list[Path]:
    """Create a store with an answered request (`GONE`), with or without later commits; return its segments."""
    async with FileStore.open(folder, ManualClock(), segment_bytes=segment_bytes) as store:
        await store.commit(Commit([Write(GONE, 0, {"n": "asked"}), Write(WHOLE, 0, {"n": 0})]))
        await store.commit(Commit([Write(GONE, 1, None)], [Event("answered")]))
        if follow:
            await store.commit(Commit([Write(WHOLE, 1, {"n": 1})], [Event("counted")]))
    return log(folder)


@pytest.mark.parametrize("follow", [True, False])
async def test_deleted_document_stays_deleted(tmp_path: Path, *, follow: bool) -> None:
    """The commit of the deletion is damaged, but its header has it; the history reports that."""
    await requested(tmp_path, follow=follow)
    spoil(tmp_path, b'"answered"', b'"answerEd"')
    async with FileStore.open(tmp_path, ManualClock()) as store:
        assert not (await store.verify()).damaged
        before = await store.position()
        assert await store.get(GONE) is None
        assert (await store.repair()).is_valid
        assert await store.get(GONE) is None
    async with FileStore.open(tmp_path, ManualClock()) as store:
        assert (await store.verify()).is_valid
        assert await store.get(GONE) is None
        assert GONE not in (await store.at(before)).documents
        await store.commit(Commit([Write(GONE, 0, {"n": "again"})]))
        found = await store.get(GONE)
        assert found is not None
        assert found.version > 2


@pytest.mark.parametrize("is_open", [True, False])
async def test_versions_of_deleted_documents_never_decrease(tmp_path: Path, *, is_open: bool) -> None:
    """A lost commit may have created and deleted it again; the store was opened before or after."""
    (segment,) = await requested(tmp_path)
    async with FileStore.open(tmp_path, ManualClock()) as known:
        lines = segment.read_bytes().splitlines(keepends=True)
        segment.write_bytes(b"".join([*lines[:2], b"x" * (len(lines[2]) - 1) + b"\n"]))
        async with FileStore.open(tmp_path, ManualClock()) as reopened:
            store = known if is_open else reopened
            assert WHOLE in (await store.verify()).damaged
            assert (await store.repair()).is_valid
    async with FileStore.open(tmp_path, ManualClock()) as store:
        assert (await store.verify()).is_valid
        assert await store.get(GONE) is None
        await store.commit(Commit([Write(GONE, 0, {"n": "again"})]))
        found = await store.get(GONE)
        assert found is not None
        assert found.version > 3
        keys = [event.data["key"] async for record in read_range(store, 3, await store.position())
                for event in record.events if event.type == "state.repaired"]  # fmt: skip
        assert keys == ["task/whole"]


async def test_expiry_applies_after_a_repair(tmp_path: Path) -> None:
    """An accepted value has its remaining time; an expired one does not reappear."""
    clock, late = ManualClock(), Key("task", "late")
    async with FileStore.open(tmp_path, clock) as store:
        await store.commit(Commit([Write(HIT, 0, {"n": 1}, ttl=100.0), Write(late, 0, {"n": 1}, ttl=10.0)]))
        await store.commit(Commit([Write(WHOLE, 0, {"n": 0})]))
    (segment,) = log(tmp_path)
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(lines[0] + b"\n")
    clock.advance(50.0)
    async with FileStore.open(tmp_path, clock) as store:
        assert (await store.repair()).is_valid
        assert await store.get(late) is None
        found = await store.get(HIT)
        assert found is not None
        assert found.expires == clock.now() + 50.0
        clock.advance(50.0)
        assert await store.get(HIT) is None


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("with_snapshot", [True, False])
async def test_repeated_commit_affects_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, *, with_snapshot: bool
) -> None:
    """The newest as any other, also if the log is read from a snapshot on."""
    monkeypatch.setattr(snapshot, "MIN_NEW_BYTES", 1 if with_snapshot else 1 << 20)
    segment = (await requested(tmp_path, segment_bytes=1))[number]
    segment.write_bytes(2 * segment.read_bytes())
    async with FileStore.open(tmp_path, ManualClock()) as store:
        (damage,) = store.damage
        assert damage.keys == ()
        found = await store.verify()
        assert (found.is_valid, found.position, found.damaged, found.mismatched) == (False, 3, [], [])
        whole = await store.get(WHOLE)
        assert whole is not None
        assert (whole.version, whole.damaged) == (2, False)
        assert (await store.repair()).is_valid
        assert await store.get(WHOLE) == whole
        assert await store.get(GONE) is None


async def test_commit_copied_over_another_affects_everything(tmp_path: Path) -> None:
    """The copied commit is detected as an additional one."""
    (segment,) = await requested(tmp_path)
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join([lines[0], lines[0], lines[2]]))
    async with FileStore.open(tmp_path, ManualClock()) as store:
        assert None in [one.keys for one in store.damage]
        assert {GONE, WHOLE} <= set((await store.verify()).damaged)


async def test_completely_lost_log_is_accepted(tmp_path: Path) -> None:
    """The mark says that there was a log; positions continue."""
    (segment,) = await requested(tmp_path)
    segment.unlink()
    async with FileStore.open(tmp_path, ManualClock()) as store:
        assert not (await store.verify()).is_valid
        await store.repair()
        assert await store.commit(Commit([Write(WHOLE, 0, {"n": 0})])) > 3


async def test_copy_during_use_affects_nothing(tmp_path: Path) -> None:
    """An open store continues after the copy."""
    (segment,) = await requested(tmp_path)
    async with FileStore.open(tmp_path, ManualClock()) as store:
        await store.commit(Commit([Write(WHOLE, 2, {"n": 2})]))
        data = segment.read_bytes()
        segment.write_bytes(data + data.splitlines(keepends=True)[-1])
        assert await store.commit(Commit([Write(WHOLE, 3, {"n": 3})])) == 5
        assert [one.keys for one in store.damage] == [()]
    async with FileStore.open(tmp_path, ManualClock()) as store:
        found = await store.get(WHOLE)
        assert found is not None
        assert (found.value, found.damaged) == ({"n": 3}, False)
        assert (await store.repair()).is_valid
