"""File locks of sessions between real processes: order, fairness, death, and the list of locks."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.errors import FileLocked, LockUnavailable, RefusedError
from orchestrator.locking.file_locks import FileLocks, list_file_locks
from orchestrator.system.clock import SystemClock
from tests.programs import run_python

pytestmark = pytest.mark.extended_rest

ADA, BOB, EVE = (SessionName("r", task, 1) for task in ("ada", "bob", "eve"))

#: Locks a file for a session, prints that, and releases it when its standard input ends.
HOLDER = """
import sys, anyio
from pathlib import Path
from orchestrator.system.clock import SystemClock
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.locking.file_locks import FileLocks

async def main(folder, task, path, mode):
    locks, me = FileLocks(Path(folder), SystemClock()), SessionName("r", task, 1)
    await locks.acquire(me, [path], shared=mode == "shared", timeout=60)
    print("held", flush=True)
    await anyio.to_thread.run_sync(sys.stdin.readline)
    await locks.release_all(me)
anyio.run(main, *sys.argv[1:])
"""

#: The same, with a child that survives.
WITH_A_CHILD = HOLDER.replace(
    'print("held", flush=True)',
    'import subprocess; child = subprocess.Popen(["sleep", "600"], close_fds=False); print(child.pid, flush=True)',
)

#: Locks and releases one file repeatedly for some seconds, and prints how often it had it.
AGAIN_AND_AGAIN = """
import statistics, sys, time, anyio
from pathlib import Path
from orchestrator.system.clock import SystemClock
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.locking.file_locks import FileLocks

async def main(folder, task, mode, rounds, processes):
    locks, me = FileLocks(Path(folder), SystemClock()), SessionName("r", task, 1)
    passed = []
    print("ready", flush=True)
    sys.stdin.readline()
    served = Path(folder + ".had")

    def is_done():
        # Each process needs several rounds: one that the machine does not run for a while would be its median.
        turns = served.read_bytes()
        return len(turns) >= int(rounds) and all(turns.count(b"%d" % one) >= 10 for one in range(int(processes)))

    with served.open("ab", buffering=0) as had:
        while not is_done():
            before = had.seek(0, 2)
            await locks.acquire(me, ["a"], shared=mode == "shared", timeout=60)
            passed.append(had.seek(0, 2) - before)
            had.write(task.encode())
            time.sleep(0.002)  # so long that readers overlap
            await locks.release(me, ["a"])
    print(statistics.median(passed))
anyio.run(main, *sys.argv[1:])
"""

#: Locks several files in the given order, some number of times, all together; counts in an otherwise unprotected file.
ROUNDS = """
import sys, anyio
from pathlib import Path
from orchestrator.system.clock import SystemClock
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.locking.file_locks import FileLocks

async def main(folder, task, rounds, *paths):
    locks, me = FileLocks(Path(folder), SystemClock()), SessionName("r", task, 1)
    count = Path(folder).with_name("count")
    for _ in range(int(rounds)):
        await locks.acquire(me, paths, timeout=60)
        count.write_text(str(int(count.read_text()) + 1))
        await locks.release(me, paths)
anyio.run(main, *sys.argv[1:])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "locks"


def locks_of(folder: Path) -> FileLocks:
    return FileLocks(folder, SystemClock())


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def release(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.close()


@contextmanager
def held_elsewhere(folder: Path, task: str, path: str, mode: str = "exclusive") -> Iterator[subprocess.Popen[str]]:
    with run_python(HOLDER, folder, task, path, mode) as child:
        assert line(child) == "held"
        yield child


def locked_files(folder: Path) -> list[str]:
    """Return which files in a folder the kernel has locks on."""
    found = []
    for path in folder.iterdir():
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(path.name)
    return found


async def wait_for_waiters(folder: Path, owner: SessionName) -> None:
    with anyio.fail_after(20):
        while not any(one.owner == str(owner) and one.state == "waiting" for one in list_file_locks(folder)):
            await anyio.sleep(0.002)


async def wait_for_gate(folder: Path) -> None:
    with anyio.fail_after(20):
        while not any(name.endswith(".gate") for name in locked_files(folder)):
            await anyio.sleep(0.002)


@pytest.fixture
def known() -> frozenset[threading.Thread]:
    """Return the existing threads, which may still wait for a lock that is never released."""
    return frozenset(threading.enumerate())


async def wait_for_threads(known: frozenset[threading.Thread]) -> None:
    with anyio.fail_after(20):
        while any(thread.name.startswith("flock ") for thread in threading.enumerate() if thread not in known):
            await anyio.sleep(0.002)


async def test_locked_file_is_rejected_with_its_holder(folder: Path) -> None:
    """The error has the holder's session, process and time; other files are free."""
    with held_elsewhere(folder, "ada", "src/a.py") as child:
        began = time.monotonic()
        with pytest.raises(FileLocked) as caught:
            await locks_of(folder).acquire(BOB, ["src/a.py"], timeout=0.05)
        assert time.monotonic() - began < 4
        assert caught.value.holder == f"r/ada.1 (process {child.pid})"
        assert caught.value.since is not None
        assert 0 <= time.time() - caught.value.since < 60
        (record,) = await locks_of(folder).acquire(BOB, ["src/b.py"])
        assert (record.path, record.mode, record.owner, record.pid) == ("src/b.py", "exclusive", "r/bob.1", os.getpid())


async def test_lock_is_acquired_when_released(folder: Path) -> None:
    """The default is to wait; waiters are listed with the file."""
    locks = locks_of(folder)
    with held_elsewhere(folder, "ada", "a") as child:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: locks.acquire(BOB, ["a"], timeout=60))
            await wait_for_waiters(folder, BOB)
            seen = [(one.owner, one.path, one.mode, one.state) for one in list_file_locks(folder)]
            assert seen == [("r/ada.1", "a", "exclusive", "held"), ("r/bob.1", "a", "exclusive", "waiting")]
            release(child)
    assert [(one.owner, one.state) for one in list_file_locks(folder)] == [("r/bob.1", "held")]
    assert await locks.release_all(BOB) == 1
    assert list_file_locks(folder) == []


async def test_several_files_are_locked_all_or_none(folder: Path) -> None:
    """If one of three is locked, the other two are free again."""
    locks = locks_of(folder)
    with held_elsewhere(folder, "ada", "b"):
        with pytest.raises(FileLocked, match=r"^b is locked by r/ada\.1"):
            await locks.acquire(BOB, ["c", "b", "a"], timeout=0)
        assert locks.held() == []
        taken = await locks.acquire(EVE, ["c", "a", "./a"], timeout=0)
        assert [one.path for one in taken] == ["a", "c"]


async def test_second_lock_of_an_own_file_is_rejected_immediately(folder: Path) -> None:
    """Any spelling, shared or not, held or waited for: the error names the file, and nothing changes."""
    locks = locks_of(folder)
    await locks.acquire(ADA, ["src/a"])
    for shared in (False, True):
        with anyio.fail_after(2), pytest.raises(RefusedError, match=r"r/ada\.1 has already locked src/a"):
            await locks.acquire(ADA, ["b", "src/x/../a"], shared=shared, timeout=600)
    assert [one.path for one in locks.held(ADA)] == ["src/a"]
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: locks.acquire(BOB, ["src/a"], timeout=600))
        await wait_for_waiters(folder, BOB)
        with anyio.fail_after(2), pytest.raises(RefusedError, match=r"r/bob\.1 is already waiting for src/a"):
            await locks.acquire(BOB, ["src/a"], timeout=600)
        assert await locks.release(ADA, ["src//a", "never"]) == 1
    assert [one.path for one in locks.held(BOB)] == ["src/a"]


async def test_sessions_of_one_process_exclude_each_other(folder: Path) -> None:
    """The owner of a lock is the session, not the process."""
    locks = locks_of(folder)
    await locks.acquire(ADA, ["a"])
    with pytest.raises(FileLocked, match=r"locked by r/ada\.1"):
        await locks.acquire(BOB, ["a"], timeout=0.02)
    await locks.release_all(ADA)
    await locks.acquire(BOB, ["a"])


async def test_shared_locks_coexist_and_block_an_exclusive_one(folder: Path) -> None:
    """Within a process and between two; all holders are listed."""
    locks = locks_of(folder)
    with held_elsewhere(folder, "ada", "a", "shared") as child:
        await locks.acquire(BOB, ["a"], shared=True, timeout=0)
        await locks.acquire(EVE, ["a"], shared=True, timeout=0)
        seen = [(one.owner, one.mode, one.state) for one in list_file_locks(folder)]
        assert sorted(seen) == [(f"r/{task}.1", "shared", "held") for task in ("ada", "bob", "eve")]
        writer = SessionName("r", "writer", 1)
        with pytest.raises(FileLocked, match="is locked by r/"):
            await locks.acquire(writer, ["a"], timeout=0.02)
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: locks.acquire(writer, ["a"], timeout=60))
            await wait_for_gate(folder)
            late = SessionName("r", "late", 1)
            with pytest.raises(FileLocked):  # a reader behind a writer does not overtake it
                await locks.acquire(late, ["a"], shared=True, timeout=0.02)
            release(child)
            await locks.release_all(BOB)
            await locks.release_all(EVE)
        child.wait(20)  # the marks of another process are removed after its lock
        assert [one.owner for one in list_file_locks(folder)] == ["r/writer.1"]


@pytest.mark.extended_variants
@pytest.mark.parametrize("turns", [0, 2, 4, *(pytest.param(more, marks=pytest.mark.slow) for more in (6, 8, 10))])
@pytest.mark.parametrize("shared", [False, True])
async def test_cancelled_wait_leaves_nothing_locked(
    folder: Path, known: frozenset[threading.Thread], turns: int, *, shared: bool
) -> None:
    """Wherever the cancellation arrives in the locking of two files, nothing is locked or marked afterwards."""
    locks = locks_of(folder)
    with held_elsewhere(folder, "ada", "b") as child:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: locks.acquire(BOB, ["a", "b"], shared=shared, timeout=60))
            for _ in range(turns):
                await anyio.sleep(0.0005)
            group.cancel_scope.cancel()
        assert [one.owner for one in list_file_locks(folder)] == ["r/ada.1"]
        release(child)
        child.wait(20)
    await locks.acquire(EVE, ["a", "b"], timeout=20)
    await locks.release_all(EVE)
    await wait_for_threads(known)
    assert locked_files(folder) == []
    assert {path.suffix for path in folder.iterdir()} == {".lock", ".gate"}


async def test_cancelled_shared_wait_lets_exclusive_request_proceed(
    folder: Path, known: frozenset[threading.Thread]
) -> None:
    """The thread of an abandoned wait is reused by a wait of the other kind."""
    locks = locks_of(folder)
    with held_elsewhere(folder, "ada", "a") as child:
        for shared in (True, False, True):
            with pytest.raises(FileLocked):
                await locks.acquire(BOB, ["a"], shared=shared, timeout=0.05)
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: locks.acquire(EVE, ["a"], timeout=60))
            await wait_for_waiters(folder, EVE)
            release(child)
    with pytest.raises(FileLocked, match=r"r/eve\.1"):
        await locks.acquire(BOB, ["a"], shared=True, timeout=0)
    await wait_for_threads(known)


async def test_lock_of_a_killed_owner_is_free_despite_a_living_child(folder: Path) -> None:
    """`kill -9` releases its locks at once: no child inherits a lock, even one that inherits all descriptors."""
    with run_python(WITH_A_CHILD, folder, "ada", "a", "exclusive") as owner:
        child = int(line(owner))
        try:
            assert [one.owner for one in list_file_locks(folder)] == ["r/ada.1"]
            owner.kill()
            owner.wait(20)
            os.kill(child, 0)
            assert list_file_locks(folder) == []
            await locks_of(folder).acquire(BOB, ["a"], timeout=0)
        finally:
            os.kill(child, signal.SIGKILL)


async def test_killed_process_is_not_shown_as_holder_or_waiter(folder: Path) -> None:
    """The next reader removes its marks."""
    with held_elsewhere(folder, "ada", "a"), run_python(HOLDER, folder, "bob", "a", "exclusive") as waiter:
        await wait_for_waiters(folder, BOB)
        with held_elsewhere(folder, "eve", "b", "shared") as sharer:
            assert {one.owner for one in list_file_locks(folder)} == {"r/ada.1", "r/bob.1", "r/eve.1"}
            for child in (waiter, sharer):
                child.kill()
                child.wait(20)
        assert [one.owner for one in list_file_locks(folder)] == ["r/ada.1"]
        assert {path.suffix for path in folder.iterdir()} == {".lock", ".gate"}


def overtakes(folder: Path, modes: list[str], rounds: int) -> list[float]:
    """Return how often others typically got the file while each of several processes waited for it."""
    stack = [run_python(AGAIN_AND_AGAIN, folder, number, mode, rounds, len(modes)) for number, mode in enumerate(modes)]
    children = [one.__enter__() for one in stack]
    try:
        assert {line(child) for child in children} == {"ready"}
        for child in children:
            release(child)
        return [float(line(child)) for child in children]
    finally:
        for one in stack:
            one.__exit__(None, None, None)


async def test_eight_processes_share_a_file_fairly(folder: Path) -> None:
    """While one waits, nobody gets it more than twice."""
    assert max(overtakes(folder, ["exclusive"] * 8, 200)) <= 2 * 7


async def test_writer_is_not_starved_by_four_readers(folder: Path) -> None:
    """Overlapping readers could block it for ever: while it waits, none gets the lock more than twice."""
    writer, *_ = overtakes(folder, ["exclusive", *["shared"] * 4], 200)
    assert writer <= 2 * 4


@pytest.mark.parametrize("rounds", [100, pytest.param(1_000, marks=pytest.mark.slow)])
async def test_opposite_orders_do_not_deadlock(folder: Path, rounds: int) -> None:
    """Two sessions lock the same three files in opposite orders; none waits for ever, and no count is lost."""
    paths = ["x/a", "b", "c"]
    count = folder.with_name("count")
    count.write_text("0")
    with (
        run_python(ROUNDS, folder, "ada", rounds, *paths) as one,
        run_python(ROUNDS, folder, "bob", rounds, *reversed(paths)) as other,
    ):
        assert [one.wait(100), other.wait(100)] == [0, 0]
    assert int(count.read_text()) == 2 * rounds


#: Locks one file, prints that, and locks another on request; then prints the outcome.
THEN_ANOTHER = HOLDER.replace(
    "    await locks.release_all(me)",
    """    try:
        await locks.acquire(me, ["b"], timeout=60)
        print("both", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    await locks.release_all(me)""",
)


async def test_deadlock_of_two_processes_is_broken_immediately(folder: Path) -> None:
    """The last waiter gets an error with the cycle, and keeps its locks; the other continues."""
    ours = FileLocks(folder, SystemClock())
    with run_python(THEN_ANOTHER, folder, "ada", "a", "exclusive") as theirs:
        assert theirs.stdout is not None
        assert theirs.stdin is not None
        assert theirs.stdout.readline() == "held\n"
        await ours.acquire(BOB, ["b"])
        theirs.stdin.write("\n")
        theirs.stdin.flush()
        with anyio.fail_after(20):
            while "r/ada.1" not in await ours.list_waits():
                await anyio.sleep(0.01)
            with pytest.raises(LockUnavailable, match=r"would deadlock: r/bob.1 waits for a, r/ada.1 waits"):
                await ours.acquire(BOB, ["a"], timeout=60)
        assert [one.path for one in ours.held(BOB)] == ["b"]
        await ours.release_all(BOB)
        assert theirs.stdout.readline() == "both\n"


async def test_deadlock_of_three_with_a_shared_lock_is_broken_once(folder: Path) -> None:
    """Only the last waiter gets an error; the others get their locks."""
    locks = FileLocks(folder, SystemClock())
    wants = {ADA: ("a", "b"), BOB: ("b", "c"), EVE: ("c", "a")}
    refused: list[SessionName] = []
    for session, (first, _) in wants.items():
        await locks.acquire(session, [first], shared=session is ADA)

    async def take(session: SessionName, path: str) -> None:
        try:
            await locks.acquire(session, [path], timeout=60)
        except LockUnavailable:
            refused.append(session)
        await locks.release_all(session)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for session, (_, second) in wants.items():
                group.start_soon(take, session, second)
    assert len(refused) == 1


async def test_plain_waiter_is_never_rejected(folder: Path) -> None:
    """A queue behind one holder, and a holder that waits for another session, are no cycle."""
    locks = FileLocks(folder, SystemClock())
    await locks.acquire(ADA, ["a"])
    await locks.acquire(BOB, ["b"])

    async def take(session: SessionName, path: str) -> None:
        await locks.acquire(session, [path], timeout=60)
        await locks.release_all(session)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(take, BOB, "a")
            group.start_soon(take, EVE, "a")
            await anyio.sleep(0.6)  # two checks
            assert set(await locks.list_waits()) == {"r/bob.1", "r/eve.1"}
            await locks.release_all(ADA)
