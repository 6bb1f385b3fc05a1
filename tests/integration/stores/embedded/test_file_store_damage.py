"""The file store on a bad disk: no value is silently older, and damage never blocks a commit."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import pytest

from orchestrator.errors import LeaseLost, StoreUnavailable
from orchestrator.protocols import Commit, Damage, Document, Event, Guard, JsonObject, Key, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.faults import strace_fails

pytestmark = pytest.mark.extended

A, B, C, GONE, NEW = (Key("task", name) for name in ("a", "b", "c", "gone", "new"))
HISTORY = [
    Commit([Write(A, 0, {"n": 1}), Write(GONE, 0, {"n": 2})]),
    Commit([Write(B, 0, {"n": 3})], [Event("e", {"n": 4})]),
    Commit([Write(A, 1, {"n": 5}), Write(GONE, 1, None), Write(C, 0, {"n": 6})]),
    Commit([Write(B, 1, {"n": 7})]),
]
SEGMENT = f"{1:020d}.jsonl"


State = dict[Key, tuple[int, JsonObject]]


def state_after(commits: Sequence[Commit]) -> State:
    """Return the true documents after some commits: key -> (version, value)."""
    state: dict[Key, tuple[int, JsonObject | None]] = {}
    for write in (write for commit in commits for write in commit.writes):
        state[write.key] = (write.expected + 1, write.value)
    return {key: (version, value) for key, (version, value) in state.items() if value is not None}


TRUTH = state_after(HISTORY)


@dataclass(frozen=True)
class Good:
    """The files of a store that has committed `HISTORY`."""

    log: bytes
    mark: bytes


@pytest.fixture(scope="module")
def good() -> Good:
    """Return the undamaged files."""

    async def build(folder: Path) -> None:
        async with FileStore.open(folder, SystemClock()) as store:
            for commit in HISTORY:
                await store.commit(commit)

    with TemporaryDirectory() as directory:
        anyio.run(build, Path(directory))
        return Good((Path(directory) / SEGMENT).read_bytes(), (Path(directory) / "lock").read_bytes())


def positions(log: bytes, each: int) -> list[int]:
    """Return every `each`-th position in a log, and all around the ends of its lines."""
    ends = [position for position, byte in enumerate(log) if byte == ord("\n")]
    near = {end + step for end in ends for step in (-1, 0, 1, 2)}
    return sorted({*range(0, len(log), each), *near} & set(range(len(log))))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory for many quick opens: in memory if the machine offers it."""
    shared_memory = Path("/dev/shm")
    parent = shared_memory if os.access(shared_memory, os.W_OK) else None
    with TemporaryDirectory(dir=parent) as directory:
        yield Path(directory)


def write_files(folder: Path, log: bytes, mark: bytes | None) -> None:
    """Make `folder` contain exactly these files."""
    for path in folder.iterdir():
        path.unlink()
    (folder / SEGMENT).write_bytes(log)
    if mark:
        (folder / "lock").write_bytes(mark)


async def read(store: FileStore, key: Key) -> Document:
    """Read a document that must exist."""
    document = await store.get(key)
    assert document is not None
    return document


async def read_all(store: FileStore) -> dict[Key, Document]:
    """Return the existing documents, and check that `get` and `list` agree."""
    listed = {document.key: document for document in await store.list("task")}
    for key in (A, B, C, GONE, NEW):
        assert await store.get(key) == listed.get(key)
    return listed


def assert_true_or_flagged(found: Mapping[Key, Document], damage: Sequence[Damage]) -> None:
    """Check that each document is true or flagged, and missing only if unknown damage is reported."""
    for key in found.keys() | TRUTH.keys():
        if key in found and not found[key].damaged:
            assert (found[key].version, found[key].value) == TRUTH.get(key)
        elif key not in found:
            assert any(one.keys is None for one in damage), key
        else:
            assert damage


async def check_damaged(folder: Path, log: bytes, mark: bytes | None) -> None:
    """Open a damaged store, check its report, commit, and open it again."""
    write_files(folder, log, mark)
    async with FileStore.open(folder, SystemClock()) as store:
        before, damage = await read_all(store), store.damage
        assert_true_or_flagged(before, damage)
        assert damage, "a changed byte was not detected"
        position = await store.commit(Commit([Write(NEW, 0, {"n": 8})]))
        assert position > len(HISTORY)
        async for record in store.watch():
            for key, value in record.documents.items():
                assert key == NEW or Write(key, value[0] - 1, value[1]) in HISTORY[record.position - 1].writes
            if record.position == position:
                break
    async with FileStore.open(folder, SystemClock()) as store:
        again = await read_all(store)
        new = again.pop(NEW)
        assert (new.version, new.value, new.damaged) == (1, {"n": 8}, False)
        assert again == before
        for key, document in before.items():
            await store.commit(Commit([Write(key, document.version, {"n": 9})]))
            healed = await read(store, key)
            assert (healed.value, healed.damaged) == ({"n": 9}, False)
            assert healed.version > TRUTH.get(key, (0, None))[0]


@pytest.mark.parametrize("each", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda byte: byte ^ 0x01, id="low bit"),
        pytest.param(lambda byte: byte ^ 0x80, id="high bit", marks=pytest.mark.slow),
        pytest.param(lambda _: ord("\n"), id="newline", marks=pytest.mark.slow),
    ],
)
async def test_every_flipped_byte_is_detected(
    good: Good, folder: Path, change: Callable[[int], int], each: int
) -> None:
    """For each byte: the store opens, returns true or flagged values, takes commits, and remembers the damage."""
    for offset in positions(good.log, each):
        damaged = bytearray(good.log)
        damaged[offset] = change(damaged[offset])
        if damaged != good.log:
            await check_damaged(folder, bytes(damaged), good.mark)


@pytest.mark.parametrize("each", [5, pytest.param(1, marks=pytest.mark.slow)])
async def test_truncation_of_acknowledged_data_is_detected(good: Good, folder: Path, each: int) -> None:
    """If commits are missing at the log's end, at any length, all possibly affected documents are flagged."""
    for length in positions(good.log[:-1], each):
        await check_damaged(folder, good.log[:length], good.mark)


@pytest.mark.parametrize("each", [5, pytest.param(1, marks=pytest.mark.slow)])
async def test_torn_tail_is_truncated(good: Good, folder: Path, each: int) -> None:
    """A dying writer's partial line, at any length, is cut and reported; all earlier commits exist, unflagged."""
    ends = [0, *(end + 1 for end, byte in enumerate(good.log) if byte == ord("\n"))]
    for length in positions(good.log, each)[1:]:
        write_files(folder, good.log[:length], None)
        # A line without only its newline is whole.
        whole = sum(end <= length + 1 for end in ends) - 1
        async with FileStore.open(folder, SystemClock()) as store:
            assert await store.position() == whole
            found = await read_all(store)
            assert {key: (one.version, one.value) for key, one in found.items()} == state_after(HISTORY[:whole])
            assert not any(one.damaged for one in found.values())
            torn = length not in ends and length + 1 not in ends
            assert [(one.offset, one.keys) for one in store.damage] == ([(ends[whole], ())] if torn else [])
            await store.commit(Commit([Write(NEW, 0, {})]))
        async with FileStore.open(folder, SystemClock()) as store:
            assert (await store.position(), list(store.damage)) == (whole + 1, [])


async def test_damaged_value_keeps_the_older_one_with_a_flag(good: Good, folder: Path) -> None:
    """Damage inside a value names the document; the older value stays readable, at the lost value's version."""
    write_files(folder, good.log.replace(b'{"n":7}', b'{"n":1}'), good.mark)
    async with FileStore.open(folder, SystemClock()) as store:
        document = await read(store, B)
        assert (document.version, document.value, document.damaged) == (2, {"n": 3}, True)
        assert [(one.path, one.keys) for one in store.damage] == [(folder / SEGMENT, (B,))]
        assert not (await read(store, A)).damaged


async def test_damaged_value_without_an_older_one_is_flagged_and_empty(good: Good, folder: Path) -> None:
    """A document whose only version is damaged is listed, flagged, with an empty value."""
    write_files(folder, good.log.replace(b'{"n":6}', b'{"n":1}'), good.mark)
    async with FileStore.open(folder, SystemClock()) as store:
        document = await read(store, C)
        assert (document.version, document.value, document.damaged) == (1, {}, True)


async def test_damaged_lease_guards_nothing(folder: Path) -> None:
    """A guard on a lease with only an older value is rejected: another process may have taken over."""
    lease = Key("lease", "a")
    async with FileStore.open(folder, SystemClock()) as store:
        await store.commit(Commit([Write(lease, 0, {"epoch": 4})]))
        await store.commit(Commit([Write(lease, 1, {"epoch": 5})]))
    log = (folder / SEGMENT).read_bytes()
    (folder / SEGMENT).write_bytes(log.replace(b'{"epoch":5}', b'{"epoch":4}'))
    async with FileStore.open(folder, SystemClock()) as store:
        for epoch in (4, 5):
            with pytest.raises(LeaseLost):
                await store.commit(Commit(guards=[Guard(lease, epoch)]))


async def test_missing_segment_flags_its_possible_documents(folder: Path) -> None:
    async with FileStore.open(folder, SystemClock(), segment_bytes=1) as store:
        for commit in HISTORY:
            await store.commit(commit)
    (folder / f"{3:020d}.jsonl").unlink()
    async with FileStore.open(folder, SystemClock()) as store:
        found = await read_all(store)
        assert {key: one.damaged for key, one in found.items()} == {A: True, B: False, GONE: True}
        assert [one.keys for one in store.damage] == [None]
        assert await store.position() == len(HISTORY)


async def test_garbage_between_lines_costs_nothing(good: Good, folder: Path) -> None:
    """Bytes that are no line are reported; as no position is missing, no document is flagged."""
    first_end = good.log.index(b"\n") + 1
    write_files(folder, good.log[:first_end] + b"garbage\n\n" + good.log[first_end:], None)
    async with FileStore.open(folder, SystemClock()) as store:
        found = await read_all(store)
        assert {key: (one.version, one.value, one.damaged) for key, one in found.items()} == {
            key: (*truth, False) for key, truth in TRUTH.items()
        }
        assert [(one.offset, one.keys) for one in store.damage] == [(first_end, ())]


async def test_live_store_truncates_a_torn_tail_of_another_process(folder: Path) -> None:
    """The next committer cuts a dead writer's partial line and reports it; readers are not blocked by it."""
    async with FileStore.open(folder, SystemClock()) as store:
        await store.commit(HISTORY[0])
        size = (folder / SEGMENT).stat().st_size
        with (folder / SEGMENT).open("ab") as log:
            log.write(b"0123abcd 000000")
        assert await store.position() == 1
        await store.commit(HISTORY[1])
        assert [(one.offset, one.keys) for one in store.damage] == [(size, ())]
        assert (await read(store, B)).value == {"n": 3}


async def test_complete_commit_of_a_dead_writer_is_adopted(good: Good, folder: Path) -> None:
    """Readers do not see a written but unpublished commit until the next committer adopts it."""
    *_, last = good.log.splitlines(keepends=True)
    write_files(folder, good.log[: -len(last)], None)
    async with FileStore.open(folder, SystemClock()) as store:
        with (folder / SEGMENT).open("ab") as log:
            log.write(last)
        assert await store.position() == len(HISTORY) - 1
        assert await store.commit(Commit([Write(B, 2, {"n": 8})])) == len(HISTORY) + 1
        assert list(store.damage) == []


async def test_damaged_marker_is_rewritten(folder: Path) -> None:
    """If the mark in the lock file is damaged while the store is open, readers continue and rewrite it."""
    async with FileStore.open(folder, SystemClock()) as store:
        await store.commit(HISTORY[0])
        mark = (folder / "lock").read_bytes()
        with (folder / "lock").open("r+b") as lock:
            lock.write(b"spoiled")
        assert (await read(store, A)).value == {"n": 1}
        assert (folder / "lock").read_bytes() == mark


async def test_log_that_shrank_is_not_written_to(folder: Path) -> None:
    """If the log is truncated while it is open, a commit is rejected instead of leaving a hole in it."""
    async with FileStore.open(folder, SystemClock()) as store:
        await store.commit(HISTORY[0])
        os.truncate(folder / SEGMENT, 5)
        with pytest.raises(StoreUnavailable, match="shorter"):
            await store.commit(HISTORY[1])
        assert (folder / SEGMENT).stat().st_size == 5


FILL = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    import anyio
    from orchestrator.system.clock import SystemClock
    from orchestrator.errors import StoreUnavailable
    from orchestrator.protocols import Commit, Key, Write
    from orchestrator.state.stores.file import FileStore

    async def main(folder: Path, limit: int) -> None:
        async with FileStore.open(Path(folder), SystemClock()) as store:
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            key, version = Key("task", "a"), 0
            try:
                while version < 100:
                    await store.commit(Commit([Write(key, version, {"n": version, "x": "x" * 1800})]))
                    version += 1
            except StoreUnavailable as error:
                print(error)
            document = await store.get(key)
            assert document.version == version == await store.position()
            try:
                await store.commit(Commit([Write(Key("task", "b"), 0, {})]))
                print("small fits", version)
            except StoreUnavailable:
                print("small does not fit", version)

    anyio.run(main, sys.argv[1], int(sys.argv[2]))
    """
)


def run_child(*argv: str | Path) -> list[str]:
    """Run a program to its end and return its output lines."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


async def assert_refilled(folder: Path, last_line: str) -> None:
    """Check that after a full disk exactly the acknowledged commits exist, undamaged."""
    small = last_line.startswith("small fits")
    version = int(last_line.rsplit(maxsplit=1)[-1])
    async with FileStore.open(folder, SystemClock()) as store:
        assert (await read(store, A)).value["n"] == version - 1
        assert (await store.position(), list(store.damage)) == (version + small, [])


async def test_file_size_limit_changes_nothing_acknowledged(folder: Path) -> None:
    """A write that exceeds the file size limit is undone and reported with the fix; smaller ones still fit."""
    what, last = run_child(sys.executable, "-c", FILL, folder, "65536")
    assert "ulimit -f" in what
    assert last.startswith("small fits")
    await assert_refilled(folder, last)


async def test_full_disk_changes_nothing_acknowledged(folder: Path) -> None:
    """On a full file system a commit is rejected with the fix, and acknowledged commits stay."""
    disk = folder / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.strip()}")
    try:
        what, last = run_child(sys.executable, "-c", FILL, disk / "state", "0")
        assert "free some space" in what
        await assert_refilled(disk / "state", last)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(("when", "recovers"), [("5", True), ("5..6", True), ("5..7", False), ("5+", False)])
async def test_failing_sync_is_never_acknowledged(folder: Path, tmp_path: Path, when: str, recovers: bool) -> None:
    """If a sync fails, its commit and all later ones are rejected until the outcome is known."""
    if why := strace_fails(tmp_path):
        pytest.skip(why)
    inject = ["strace", "-f", "-qq", "-o", str(tmp_path / "trace"), "-e", "trace=fdatasync"]
    inject += ["-e", f"inject=fdatasync:error=EIO:when={when}"]
    what, last = run_child(*inject, sys.executable, "-c", FILL, folder, "0")
    assert "check the disk" in what
    assert last == f"small {'fits' if recovers else 'does not fit'} 4"
    await assert_refilled(folder, last)
