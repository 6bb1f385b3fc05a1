"""The file store with a snapshot: its content equals the log's, or it is ignored."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from orchestrator.protocols import Commit, Damage, Document, Event, Key, Write
from orchestrator.state.log import snapshot
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock

GONE, KEPT, MOVED = Key("task", "gone"), Key("task", "kept"), Key("spec", "ü")
HISTORY = [
    Commit([Write(GONE, 0, {"n": 1}), Write(KEPT, 0, {"n": 2})]),
    Commit([Write(GONE, 1, None), Write(MOVED, 0, {"n": 3})], [Event("e")]),
    Commit([Write(KEPT, 1, {"n": 4})]),
    Commit([Write(MOVED, 1, {"n": 5})]),
]

Found = tuple[Mapping[Key, Document], int, Sequence[Damage]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of several segments with a snapshot of its first three commits, and later commits."""
    monkeypatch.setattr(snapshot, "MIN_NEW_BYTES", 1)
    return tmp_path / "state"


async def commit(folder: Path, commits: Sequence[Commit]) -> None:
    """Add commits to the store, in segments of two."""
    async with FileStore.open(folder, SystemClock(), segment_bytes=200) as store:
        for one in commits:
            await store.commit(one)


async def read(folder: Path) -> Found:
    """Return what an opener reads; it leaves no new snapshot."""
    async with FileStore.open(folder, SystemClock()) as store:
        found = {document.key: document for kind in ("task", "spec") for document in await store.list(kind)}
        return found, await store.position(), store.damage


async def without_snapshot(folder: Path) -> Found:
    """Return what an opener reads from the log alone."""
    (folder / snapshot.SNAPSHOT_FILE).unlink()
    return await read(folder)


async def test_snapshot_equals_the_log(folder: Path) -> None:
    """Documents, versions and positions are the log's, and later commits are replayed."""
    await commit(folder, HISTORY[:3])
    image = (folder / snapshot.SNAPSHOT_FILE).read_bytes()
    await commit(folder, HISTORY[3:])
    (folder / snapshot.SNAPSHOT_FILE).write_bytes(image)
    assert snapshot.read_snapshot(folder) is not None
    quick = await read(folder)
    assert quick == await without_snapshot(folder)
    assert {key: one.value for key, one in quick[0].items()} == {KEPT: {"n": 4}, MOVED: {"n": 5}}
    assert quick[1:] == (4, ())


async def test_snapshot_has_the_versions_of_deleted_documents(folder: Path) -> None:
    """A document that is created again after a reopening continues its versions."""
    await commit(folder, HISTORY)
    assert snapshot.read_snapshot(folder) is not None
    await commit(folder, [Commit([Write(GONE, 0, {})])])
    assert (await read(folder))[0][GONE].version == 3


async def test_damage_behind_a_snapshot_is_found(folder: Path) -> None:
    """For each changed byte of the log an opener reads the same as without the snapshot."""
    await commit(folder, HISTORY)
    image = (folder / snapshot.SNAPSHOT_FILE).read_bytes()
    segments = sorted(folder.glob("*.jsonl"))
    assert len(segments) > 1
    for segment in segments:
        good = segment.read_bytes()
        for offset in range(len(good)):
            segment.write_bytes(good[:offset] + bytes([good[offset] ^ 0x40]) + good[offset + 1 :])
            (folder / snapshot.SNAPSHOT_FILE).write_bytes(image)
            assert snapshot.read_snapshot(folder) is None
        segment.write_bytes(good)


async def test_shorter_log_behind_a_snapshot_is_found(folder: Path) -> None:
    """A truncated, missing or inserted segment is reported."""
    await commit(folder, HISTORY)
    image, segments = (folder / snapshot.SNAPSHOT_FILE).read_bytes(), sorted(folder.glob("*.jsonl"))
    for segment in segments:
        good = segment.read_bytes()
        segment.unlink()
        assert snapshot.read_snapshot(folder) is None
        segment.write_bytes(good[:-1])
        assert snapshot.read_snapshot(folder) is None
        segment.write_bytes(good)
    assert snapshot.read_snapshot(folder) is not None
    (folder / f"{2:020d}.jsonl").touch()
    assert snapshot.read_snapshot(folder) is None
    (folder / f"{2:020d}.jsonl").unlink()
    segments[0].write_bytes(segments[0].read_bytes()[:-10])
    found = await read(folder)
    assert found[2]
    assert (folder / snapshot.SNAPSHOT_FILE).read_bytes() == image
    assert found == await without_snapshot(folder)


async def test_torn_snapshot_is_ignored(folder: Path) -> None:
    """A truncated or changed snapshot counts as none; so does one with inconsistent parts."""
    await commit(folder, HISTORY)
    image = (folder / snapshot.SNAPSHOT_FILE).read_bytes()
    for size in range(len(image)):
        (folder / snapshot.SNAPSHOT_FILE).write_bytes(image[:size])
        assert snapshot.read_snapshot(folder) is None
        (folder / snapshot.SNAPSHOT_FILE).write_bytes(image[:size] + bytes([image[size] ^ 0x40]) + image[size + 1 :])
        assert snapshot.read_snapshot(folder) is None
    (folder / snapshot.SNAPSHOT_FILE).write_bytes(image[:20])
    assert (await read(folder))[1:] == (4, ())


async def test_each_segment_gets_a_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill only the newest segment has to be replayed."""
    monkeypatch.setattr(snapshot, "MIN_NEW_BYTES", 1)
    async with FileStore.open(folder, SystemClock(), segment_bytes=500) as store:
        for number in range(20):
            await store.commit(Commit([Write(KEPT, number, {"n": number})]))
        found = snapshot.read_snapshot(folder)
        assert found is not None
        newest = max(int(path.stem) for path in folder.glob("*.jsonl"))
        assert found.table.position == newest - 1


async def test_damage_leaves_no_snapshot(folder: Path) -> None:
    """An unreadable part of the log prevents it: each opener gets the report."""
    await commit(folder, HISTORY)
    segment = min(folder.glob("*.jsonl"))
    segment.write_bytes(segment.read_bytes().replace(b'"n":1', b'"n":9'))
    (folder / snapshot.SNAPSHOT_FILE).unlink()
    assert (await read(folder))[2]
    assert not (folder / snapshot.SNAPSHOT_FILE).exists()
    assert (await read(folder))[2]


async def test_damage_during_use_is_not_saved(folder: Path) -> None:
    """The checksums are of the data that was read and written, not of the final content of the disk."""
    async with FileStore.open(folder, SystemClock()) as store:
        await store.commit(HISTORY[0])
        await store.commit(HISTORY[1])
        segment = min(folder.glob("*.jsonl"))
        segment.write_bytes(segment.read_bytes().replace(b'"n":1', b'"n":9'))
    assert (folder / snapshot.SNAPSHOT_FILE).exists()
    assert (await read(folder))[2]


async def test_unwritable_snapshot_stops_nothing(folder: Path) -> None:
    folder.mkdir()
    (folder / snapshot.SNAPSHOT_FILE).mkdir()
    await commit(folder, HISTORY)
    assert (await read(folder))[1:] == (4, ())
