"""Copies of whole stores, directly and through a file: complete or absent, equal at every position."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any

import anyio
import pytest
import zstandard

from orchestrator.api.transfer import copy_state, export_store, import_store, open_store
from orchestrator.errors import HistoryCompacted, RefusedError, StoreUnavailable
from orchestrator.protocols import Commit, CommitRecord, Document, DocumentVersion, Event, Key, Store, Write
from orchestrator.state.log import loading, reading
from orchestrator.state.log.loading import Staging
from orchestrator.state.log.segments import list_segments
from orchestrator.state.stores.file import FileStore
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.state.transfer.copying import CopyResult, copy_store, export_to_stream, import_from_stream
from orchestrator.system.clock import SystemClock
from orchestrator.testing.clock import ManualClock
from orchestrator.testing.store_contract.suite import COMPACTED_LOG, make_dump, read_dump

pytestmark = pytest.mark.extended_rest

MUCH, GONE, BRIEF, LONG = (Key("task", name) for name in ("much", "gone", "brief", "long"))
ALL = 1 << 40  # bytes
SMALL = 1_500  # bytes of a segment


@pytest.fixture
def clock() -> ManualClock:
    """Return the time of the tests."""
    return ManualClock()


@pytest.fixture
async def source(tmp_path: Path, clock: ManualClock) -> AsyncIterator[FileStore]:
    """Return a store with deleted, expired and unexpired documents, whose history is compressed and compacted."""
    async with FileStore.open(tmp_path / "source", clock, segment_bytes=SMALL) as store:
        first = [Write(GONE, 0, {"n": 0}), Write(BRIEF, 0, {"n": 0}, ttl=60), Write(LONG, 0, {"ü": 2**70}, ttl=1e6)]
        await store.commit(Commit(first, [Event("begun", {"n": 1})]))
        await store.commit(Commit([Write(GONE, 1, None)]))
        for number in range(40):
            clock.advance(60)
            await store.commit(Commit([Write(MUCH, number, {"n": number, "text": "x" * 100})], [Event("counted")]))
            await store.commit(Commit(events=[Event("nothing")]))
        assert 20 < (await store.compact(clock.now() - 20 * 60, ALL)).first < 60
        yield store


Told = tuple[object, ...]


async def reported(store: Store) -> Told:
    """Return all that a store reports: its state at each readable position, and its end."""
    position = await store.position()
    moments = list[object]()
    for moment in range(position + 1):
        try:
            moments.append(await store.at(moment))
        except HistoryCompacted as gone:
            moments.append(gone.first)
    first = next((one for one in moments if not isinstance(one, int)), None)
    begin = moments.index(first)
    records = list[CommitRecord]()
    if begin < position:
        async for record in store.watch(begin):
            records.append(record)
            if record.position == position:
                break
    keys = (MUCH, GONE, BRIEF, LONG)
    documents: list[Document | None] = [await store.get(key) for key in keys]
    versions: list[Sequence[DocumentVersion]] = [await store.history(key, 100) for key in keys]
    return position, moments, records, documents, versions, await store.list("task")


def unpacked(path: Path) -> list[bytes]:
    """Return the lines of an export."""
    return zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes()).splitlines(keepends=True)


def files(location: Path) -> set[str]:
    """Return the names in a folder."""
    return {path.name for path in location.iterdir()}


async def test_copy_there_and_back_is_equal(source: FileStore, tmp_path: Path, clock: ManualClock) -> None:
    """From files to memory, to a file, to files: each copy equals the source, also after reopening."""
    expected, memory = await reported(source), MemoryStore(clock)
    copied = await copy_store(source, memory)
    assert (copied.position, copied.already_present) == (82, False)
    assert copied.first == (await source.compact(0.0, ALL)).first > 0
    assert copied.documents == 2  # one deleted, one expired
    assert await reported(memory) == expected
    exported = await export_store(memory, tmp_path / "file", clock=clock)
    async with FileStore.open(tmp_path / "target", clock, segment_bytes=SMALL) as target:
        imported = await import_store(tmp_path / "file", target)
        assert imported == exported == replace(copied, file_bytes=(tmp_path / "file").stat().st_size)
        assert await reported(target) == expected
        assert not target.damage
        assert (await target.commit(Commit([Write(GONE, 0, {}), Write(BRIEF, 0, {})]))) == 83
        assert [one.version for one in await target.list("task")] == [2, 3, 1, 40]
    async with FileStore.open(tmp_path / "target", clock) as target:
        assert await target.position() == 83
        assert (await target.verify()).is_valid
        assert (await target.compact(clock.now() - 60, ALL)).first > copied.first
        assert (await target.verify()).is_valid
    sizes = [one.path(tmp_path / "target").stat().st_size for one in list_segments(tmp_path / "target")]
    assert len(sizes) > 1
    assert not files(tmp_path / "target") & {"loading", "loaded"}


async def test_copied_segments_have_their_usual_size(source: FileStore, tmp_path: Path, clock: ManualClock) -> None:
    """However many commits are copied at once."""
    async with FileStore.open(tmp_path / "target", clock, segment_bytes=SMALL) as target:
        await copy_store(source, target)
        found = [one.path(tmp_path / "target").stat() for one in list_segments(tmp_path / "target")]
    assert len(found) > 3
    assert all(SMALL <= one.st_size < SMALL + 400 for one in found[1:-1])
    assert {one.st_mode & 0o777 for one in found} == {0o600}


async def test_active_store_is_copied_at_one_position(source: FileStore, tmp_path: Path, clock: ManualClock) -> None:
    """Commits continue meanwhile, also by another opener of the store; nothing is lost or partial."""
    async with (
        FileStore.open(tmp_path / "source", clock) as other,
        FileStore.open(tmp_path / "target", clock) as target,
        anyio.create_task_group() as tasks,
    ):

        async def work() -> None:
            for number in count(40):
                if is_finished.is_set():
                    return
                writes = [Write(MUCH, number, {"n": number}), Write(GONE, (number > 40) * (number - 38), {})]
                await other.commit(Commit(writes, durable=False))

        is_finished = anyio.Event()
        tasks.start_soon(work)
        while await source.position() < 90:
            await anyio.lowlevel.checkpoint()
        copied = await copy_store(source, target)
        is_finished.set()
    assert 90 <= copied.position <= await source.position()
    async with FileStore.open(tmp_path / "target", clock) as target:
        assert await target.position() == copied.position
        assert (await target.at(copied.position)).documents == (await source.at(copied.position)).documents


async def test_second_copy_is_a_no_op(source: FileStore, tmp_path: Path, clock: ManualClock) -> None:
    """But not a copy of another store, or onto a store with later commits, or from a source that has continued."""
    async with FileStore.open(tmp_path / "target", clock) as target:
        copied = await copy_store(source, target)
        assert await copy_store(source, target) == replace(copied, already_present=True)
        assert await copy_store(source, source) == replace(copied, already_present=True)
        other = MemoryStore(clock)
        for _ in range(82):
            await other.commit(Commit(events=[Event("else")]))
        with pytest.raises(RefusedError, match="not empty"):
            await copy_store(other, target)
        await source.commit(Commit(events=[Event("more")]))
        with pytest.raises(RefusedError, match="not empty"):
            await copy_store(source, target)
        await target.commit(Commit(events=[Event("other")]))
        with pytest.raises(RefusedError, match="not empty"):
            await copy_store(source, target)
        assert await target.position() == 83


class LossyStore(MemoryStore):
    """A store that loses part of its input."""

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`."""
        return await super().commit(replace(commit, events=()))

    async def load(self, dump: object) -> None:
        """Store other data than was dumped."""
        async for commit in dump.commits:  # type: ignore[attr-defined]  # it is a dump
            await self.commit(Commit([Write(Key("x", str(commit.position)), 0, {})]))


async def test_different_copy_is_reported(clock: ManualClock) -> None:
    source = MemoryStore(clock)
    await source.commit(Commit([Write(MUCH, 0, {})], [Event("e")]))
    with pytest.raises(StoreUnavailable, match="differs"):
        await copy_store(source, LossyStore(clock))


async def test_damaged_store_is_not_copied(tmp_path: Path, clock: ManualClock) -> None:
    """Neither to a store nor to a file; after a repair it is copied, with an equal result."""
    async with FileStore.open(tmp_path / "source", clock, segment_bytes=600) as source:
        for number in range(20):
            await source.commit(Commit([Write(MUCH, number, {"n": number, "text": "x" * 50})]))
        path = list_segments(tmp_path / "source")[1].path(tmp_path / "source")
        path.write_bytes(path.read_bytes().replace(b"xxx", b"xyx", 1))
        async with FileStore.open(tmp_path / "target", clock) as target:
            with pytest.raises(RefusedError, match=r"damaged.*verify --repair"):
                await copy_store(source, target)
            assert await read_dump(target) == (0, 0, [])
            with pytest.raises(RefusedError, match=r"damaged.*verify --repair"):
                await export_store(source, tmp_path / "file")
            assert files(tmp_path) == {"source", "target"}
            assert (await source.repair()).is_valid
            await copy_store(source, target)
            assert await reported(target) == await reported(source)


async def test_target_opened_by_another_process_is_rejected(tmp_path: Path, clock: ManualClock) -> None:
    """It sees the loaded state, or makes the load fail by committing first."""
    async with (
        FileStore.open(tmp_path / "target", clock) as target,
        FileStore.open(tmp_path / "target", clock) as other,
    ):
        await target.load(make_dump(COMPACTED_LOG, 8, 6))
        assert await read_dump(other) == (8, 6, list(COMPACTED_LOG))
        assert await other.commit(Commit(events=[Event("next")])) == 9
        assert await target.position() == 9
    async with (
        FileStore.open(tmp_path / "second", clock) as target,
        FileStore.open(tmp_path / "second", clock) as other,
    ):
        memory = MemoryStore(clock)
        await memory.load(make_dump(COMPACTED_LOG, 8, 6))
        async with memory.dump() as dump:

            async def interrupted() -> AsyncIterator[object]:
                async for commit in dump.commits:
                    yield commit
                await other.commit(Commit(events=[Event("mine")]))

            with pytest.raises(RefusedError, match="not empty"):
                await target.load(replace(dump, commits=interrupted()))  # type: ignore[arg-type]  # it is one
        assert await target.position() == 1
        assert not target.damage
        assert "loading" not in files(tmp_path / "second")


WORKER = """
import sys, anyio
from pathlib import Path
from orchestrator.system.clock import SystemClock
from orchestrator.state.stores.file import FileStore
from orchestrator.state.transfer.copying import copy_store
async def main():
    async with FileStore.open(Path(sys.argv[1]), SystemClock()) as source:
        async with FileStore.open(Path(sys.argv[2]), SystemClock(), segment_bytes=1500) as target:
            await copy_store(source, target)
anyio.run(main)
"""


def work(location: Path, failpoints: str = "", **limits: int) -> subprocess.CompletedProcess[bytes]:
    """Copy `source` to `target` in a separate process."""

    def limit() -> None:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, name), (value, value))

    return subprocess.run(
        [sys.executable, "-c", WORKER, str(location / "source"), str(location / "target")],
        env={**os.environ, **({"COUNCIL_FAILPOINTS": failpoints} if failpoints else {})},
        capture_output=True,
        check=False,
        preexec_fn=limit,
    )


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("failpoint", "is_there", "opens"),
    [
        ("state.load_staged@3", False, False),
        ("state.load_finished", False, True),
        ("state.loaded", True, True),
        ("state.load_put@3", True, False),
        pytest.param("state.load_staged", False, True, marks=pytest.mark.slow),
        pytest.param("state.load_finished", False, False, marks=pytest.mark.slow),
        pytest.param("state.loaded", True, False, marks=pytest.mark.slow),
        pytest.param("state.load_put", True, True, marks=pytest.mark.slow),
    ],
)
async def test_killed_load_is_complete_or_absent(
    source: FileStore, tmp_path: Path, clock: ManualClock, failpoint: str, is_there: bool, opens: bool
) -> None:
    """For current and later openers; a second copy succeeds."""
    expected = await reported(source)
    name, _, hit = failpoint.partition("@")
    async with FileStore.open(tmp_path / ("target" if opens else "elsewhere"), clock, segment_bytes=SMALL) as before:
        killed = await anyio.to_thread.run_sync(work, tmp_path, f"{name}=kill@{hit or 1}")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if opens and is_there:
            assert await before.commit(Commit(events=[Event("next")])) == 83
        elif opens:
            assert await read_dump(before) == (0, 0, [])
    async with FileStore.open(tmp_path / "target", clock, segment_bytes=SMALL) as target:
        assert not target.damage
        assert (await target.verify()).is_valid
        assert await target.position() == 82 * is_there + (opens and is_there)
        if not (opens and is_there):
            assert (await copy_store(source, target)).already_present is is_there
            assert await reported(target) == expected
        assert not files(tmp_path / "target") & {"loading", "loaded"}


async def test_full_disk_loads_nothing(source: FileStore, tmp_path: Path, clock: ManualClock) -> None:
    """The target stays empty, and accepts the copy once there is space."""
    full = await anyio.to_thread.run_sync(lambda: work(tmp_path, RLIMIT_FSIZE=1_000))
    assert full.returncode == 1
    assert b"StoreUnavailable" in full.stderr
    assert "loading" not in files(tmp_path / "target")
    async with FileStore.open(tmp_path / "target", clock) as target:
        assert await read_dump(target) == (0, 0, [])
        await copy_store(source, target)
        assert await reported(target) == await reported(source)


@pytest.fixture
async def exported(source: FileStore, tmp_path: Path, clock: ManualClock) -> Path:
    """Return the export of a store."""
    await export_store(source, tmp_path / "state.jsonl.zst", clock=clock)
    return tmp_path / "state.jsonl.zst"


async def test_export_consists_of_readable_lines(exported: Path, clock: ManualClock) -> None:
    """A header, commits and a footer with the checksum of the lines before."""
    header, *commits, footer = map(json.loads, unpacked(exported))
    assert (header["format"], header["version"], header["position"], header["time"]) == (
        "council-state", 1, 82, clock.now(),
    )  # fmt: skip
    assert header["writer"].endswith(f":{os.getpid()}")
    assert 20 < header["first"] < 60
    assert [one["position"] for one in commits if one["position"] > header["first"]] == list(
        range(header["first"] + 1, 83)
    )
    assert commits[0]["documents"][-1] == {
        "kind": "task", "id": "long", "version": 1, "value": {"ü": 2**70}, "expires": 1e9 + 1e6, "previous": 0,
    }  # fmt: skip
    assert commits[0]["events"] == [{"type": "begun", "data": {"n": 1}}]
    summed = subprocess.run(["sha256sum"], input=b"".join(unpacked(exported)[:-1]), capture_output=True, check=True)
    assert footer == {"commits": len(commits), "sha256": summed.stdout.split()[0].decode()}
    assert exported.stat().st_mode & 0o777 == 0o600


async def refused(data: bytes, store: Store) -> str:
    """Import an incomplete export into an empty store; return the reason of the rejection."""
    with pytest.raises(RefusedError) as caught:
        await import_from_stream("FILE", lambda: io.BytesIO(data), store)
    assert await store.position() == 0
    return str(caught.value)


async def test_truncated_file_is_rejected(exported: Path, tmp_path: Path, clock: ManualClock) -> None:
    """At any point; a file with trailing data, and an empty one, as well."""
    whole, store = exported.read_bytes(), MemoryStore(clock)
    for end in {*range(0, len(whole), 17), *range(len(whole) - 20, len(whole))}:
        told_why = await refused(whole[:end], store)
        assert "it is truncated" in told_why or "it is empty" in told_why
    assert "data after its end" in await refused(whole + b"\n", store)
    assert "data after its end" in await refused(whole + whole, store)
    async with FileStore.open(tmp_path / "target", clock) as target:
        assert "it is truncated" in await refused(whole[: len(whole) // 2], target)
        assert not files(tmp_path / "target") & {"loading", "loaded"}
        with pytest.raises(RefusedError, match="there is no file"):
            await import_store(tmp_path / "none", target)
        await import_store(exported, target)


async def test_file_with_a_flipped_bit_is_rejected(exported: Path, clock: ManualClock) -> None:
    """Any bit, except for the few without meaning: with one of those the content is unchanged."""
    whole, refusals = exported.read_bytes(), 0
    for location in range(0, len(whole), 5):
        store, flipped = MemoryStore(clock), bytearray(whole)
        flipped[location] ^= 1 << location % 8
        try:
            await import_from_stream("FILE", partial(io.BytesIO, bytes(flipped)), store)
        except RefusedError:
            assert await read_dump(store) == (0, 0, [])
            refusals += 1
        else:
            unpacker = zstandard.ZstdDecompressor().decompressobj()
            assert unpacker.decompress(bytes(flipped)) == b"".join(unpacked(exported))
    assert refusals > len(whole) // 5 * 0.98


def packed(lines: Sequence[bytes]) -> bytes:
    """Return the lines as the content of a file."""
    return zstandard.ZstdCompressor().compress(b"".join(lines))


async def test_file_that_is_not_an_export_is_rejected(exported: Path, clock: ManualClock) -> None:
    lines, store = unpacked(exported), MemoryStore(clock)
    header, footer = json.loads(lines[0]), json.loads(lines[-1])
    newer = json.dumps({**header, "version": 2, "more": True}).encode() + b"\n"
    assert "version is 2" in await refused(packed([newer, *lines[1:]]), store)
    assert "newer" in await refused(packed([newer, *lines[1:]]), store)
    assert "not a state export" in await refused(b"# a text\n", store)
    assert "not a state export" in await refused(packed([b"{}\n"]), store)
    assert "not a JSON object" in await refused(packed([b"text\n"]), store)
    assert "checksum" in await refused(packed([*lines[:5], *lines[6:]]), store)
    fewer = json.dumps({**footer, "commits": 1}).encode() + b"\n"
    assert "checksum" in await refused(packed([*lines[:-1], fewer]), store)
    assert "data after its end" in await refused(packed([*lines, b"{}\n"]), store)
    assert "truncated" in await refused(packed(lines[:-1]), store)
    assert "truncated" in await refused(packed([*lines[:-1], lines[-1].rstrip()]), store)
    assert "position" in await refused(packed([lines[0], b'{"position": 0}\n']), store)
    bad = lines[1].replace(b'"n":0', b'"n":NaN', 1)
    assert bad != lines[1]
    assert "can't store " in await refused(packed([lines[0], bad, *lines[2:]]), store)
    await import_from_stream("FILE", lambda: io.BytesIO(packed(lines)), store)
    assert await store.position() == 82


@pytest.mark.parametrize(
    ("changes", "reported"),
    [
        ({"position": 1 << 70}, "position"),
        ({"position": (1 << 64) - 1}, "position"),
        ({"time": 1e300}, "time"),
        ({"time": -1e300}, "time"),
        ({"writer": "\ud800"}, "writer"),
        ({"events": [{"type": "\udfff", "data": {}}]}, "events.0.type"),
        ({"events": [{"type": "e", "data": {"n": float("inf")}}]}, "can't store "),
        ({"events": [{"type": "e", "data": {"text": "x" * (5 << 20)}}]}, "can't store "),
        ({"documents": [{"id": "\ud800"}]}, "documents.0.id"),
        ({"documents": [{"version": 1 << 64}]}, "documents.0.version"),
        ({"documents": [{"version": (1 << 64) - 1}]}, "documents.0.version"),
        ({"documents": [{"previous": 1 << 64}]}, "documents.0.previous"),
        ({"documents": [{"previous": 1}]}, "names commit 1 as the previous one"),
        ({"documents": [{}, {}]}, "the commit writes it twice"),
    ],
)
async def test_unusable_content_is_rejected(
    changes: dict[str, Any], reported: str, tmp_path: Path, clock: ManualClock
) -> None:
    """Even with a valid checksum; nothing of it is in the store then."""
    document = {"kind": "task", "id": "a", "version": 1, "value": {}, "expires": None, "previous": 0}
    commit = {"position": 1, "time": 0.0, "writer": "x", "events": [], **changes}
    commit["documents"] = [document | one for one in changes.get("documents", [])]
    position = commit["position"]
    header = {
        "format": "council-state",
        "version": 1,
        "position": position,
        "first": position - 1,
        "time": 0,
        "writer": "",
    }
    lines = [json.dumps(one).encode() + b"\n" for one in (header, commit)]
    footer = {"commits": 1, "sha256": hashlib.sha256(b"".join(lines)).hexdigest()}
    data = packed([*lines, json.dumps(footer).encode() + b"\n"])
    async with FileStore.open(tmp_path / "state", clock) as store:
        assert reported in await refused(data, store)
        assert await store.position() == 0
        assert await store.commit(Commit(events=[Event("e")])) == 1


_LITTLE_MEMORY = """
import anyio, resource, sys
from pathlib import Path
from orchestrator.errors import RefusedError
from orchestrator.api.transfer import import_store, open_store

async def main():
    async with open_store("memory:") as store:
        await import_store(Path("bomb"), store)
        await store.position()

limit = 1 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    anyio.run(main)
except RefusedError as error:
    print(error)
"""


@pytest.mark.parametrize("line", [b"\n", pytest.param(b"x", marks=pytest.mark.slow)])
def test_decompression_bomb_takes_bounded_memory(tmp_path: Path, line: bytes) -> None:
    """Neither many empty lines, each an object in memory, nor one endless line."""
    packer = zstandard.ZstdCompressor().compressobj()
    part = line * (1 << 20)
    (tmp_path / "bomb").write_bytes(b"".join(packer.compress(part) for _ in range(300)) + packer.flush())
    ended = subprocess.run(
        [sys.executable, "-c", _LITTLE_MEMORY], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout.partition(": ")[0]) == (0, "bomb"), ended.stderr


async def test_file_is_replaced_only_by_force(exported: Path, source: FileStore, tmp_path: Path) -> None:
    """And a folder never; nothing is left next to it."""
    before = exported.read_bytes()
    with pytest.raises(RefusedError, match="--force"):
        await export_store(source, exported)
    assert exported.read_bytes() == before
    await source.commit(Commit(events=[Event("more")]))
    assert (await export_store(source, exported, force=True)).position == 83
    assert json.loads(unpacked(exported)[0])["position"] == 83
    assert exported.stat().st_mode & 0o777 == 0o600
    with pytest.raises(RefusedError, match="is a folder"):
        await export_store(source, tmp_path / "source", force=True)
    os.mkfifo(tmp_path / "pipe")  # such as /dev/null, which root could replace
    with pytest.raises(RefusedError, match="is not a regular file"):
        await export_store(source, tmp_path / "pipe", force=True)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").symlink_to(exported)
    for force in (True, False):
        with pytest.raises(RefusedError, match="is a link"):
            await export_store(source, tmp_path / "link", force=force)
    assert (tmp_path / "link").is_symlink()
    assert files(tmp_path) == {"source", "pipe", "link", exported.name}


async def test_failed_export_leaves_nothing(source: FileStore, tmp_path: Path) -> None:
    """Nor does it remove a file that another process created meanwhile."""

    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        await export_to_stream(source, Full(), 0.0)
    for location in (tmp_path / "none/file", tmp_path / "source/lock/file", tmp_path / ("long" * 100)):
        with pytest.raises(RefusedError, match="use a file in an existing folder"):
            await export_store(source, location)
    assert files(tmp_path) == {"source"}


async def test_path_created_concurrently_is_not_overwritten(
    source: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = tmp_path / "file"

    async def export_and_lose(store: Store, stream: IO[bytes], time: float) -> CopyResult:
        location.write_text("first")
        return await export_to_stream(store, stream, time)

    monkeypatch.setattr("orchestrator.api.transfer.export_to_stream", export_and_lose)
    with pytest.raises(RefusedError, match="already exists"):
        await export_store(source, location)
    assert location.read_text() == "first"
    assert files(tmp_path) == {"source", "file"}


async def test_stores_have_several_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL, or the path of a folder, as text or a Path."""
    monkeypatch.chdir(tmp_path)
    async with open_store("made") as store:
        await store.commit(Commit(events=[Event("e")]))
    async with open_store(f"file://{tmp_path}/made", must_exist=True) as store:
        assert await store.position() == 1
    with pytest.raises(RefusedError, match=r"there is no state in .*/none"):
        async with open_store("none", must_exist=True):
            pass
    assert files(tmp_path) == {"made"}
    with pytest.raises(RefusedError, match="no store for 'nothing:'"):
        await copy_state("made", "nothing:")
    assert (await copy_state("made", tmp_path / "copied", clock=SystemClock())).commits == 1


async def test_large_logs_take_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits are read and written in parts, regardless of the length of the log."""
    for module in (loading, reading):
        monkeypatch.setattr(module, "PART_BYTES", 4_000)
    clock, most = ManualClock(), 0
    async with (
        FileStore.open(tmp_path / "source", clock) as source,
        FileStore.open(tmp_path / "target", clock) as target,
    ):
        for number in range(100):
            await source.commit(Commit([Write(MUCH, number, {"text": "x" * 1000})], durable=False))
        add = Staging.add

        def watched(staging: Staging, lines: Sequence[object]) -> None:
            nonlocal most
            most = max(most, len(lines))
            add(staging, lines)  # type: ignore[arg-type]  # they are lines

        monkeypatch.setattr(Staging, "add", watched)
        await copy_store(source, target)
    assert 0 < most < 10
