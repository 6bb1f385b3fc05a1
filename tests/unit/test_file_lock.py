"""The file lock across tasks, processes, cancellation and kill -9."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from orchestrator.errors import LockHeld, describe_shortage
from orchestrator.system.file_lock import FileLock, lock_descriptor, unlock_descriptor
from tests.programs import run_python

HOLDER = """
import sys, anyio
from pathlib import Path
from orchestrator.system.file_lock import FileLock

async def main():
    async with FileLock(Path(sys.argv[1])).hold() as held:
        print("held", flush=True)
        await anyio.to_thread.run_sync(sys.stdin.readline)
anyio.run(main)
"""

OWNER_OF_A_CHILD = """
import sys, anyio
from pathlib import Path
from orchestrator.system import process
from orchestrator.system.file_lock import FileLock

async def main():
    async with FileLock(Path(sys.argv[1])).hold() as held:
        keep = [held.fd] if sys.argv[2] == "keep" else []
        # `cat` reads what we leave open, so that the test can end it.
        child = ["sh", "-c", "echo $$ > pid.new; mv pid.new pid; exec cat fifo"]
        await process.run(child, env={"PATH": "/usr/bin:/bin"}, cwd=Path(sys.argv[1]).parent, keep_fds=keep)
anyio.run(main)
"""

GIVES_UP = """
import sys, anyio
from pathlib import Path
from orchestrator.errors import LockHeld, describe_shortage
from orchestrator.system.file_lock import FileLock

async def main():
    try:
        async with FileLock(Path(sys.argv[1])).hold(timeout=0.05):
            pass
    except LockHeld:
        print("gave up")
anyio.run(main)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.lock"


@contextmanager
def held_elsewhere(path: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock in another process until the yielded function is called."""
    with run_python(HOLDER, path) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child.stdin.close


def is_free(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "condition not met within 20 s"
        await anyio.sleep(0.005)


def open_fds() -> set[str]:
    return {path.name for path in Path("/dev/fd").iterdir() if path.is_symlink()}


def waiting_threads() -> int:
    return sum(thread.name == "flock a.lock" for thread in threading.enumerate())


async def test_lock_survives_opening_and_closing_the_file_elsewhere(path: Path) -> None:
    """Closing another descriptor of a file would release a POSIX lock."""
    async with FileLock(path).hold():
        path.read_bytes()
        os.close(os.open(path, os.O_RDWR))
        assert not is_free(path)
    assert is_free(path)


async def test_two_holders_in_one_process_exclude_each_other(path: Path, tmp_path: Path) -> None:
    """Including another spelling of the path."""
    alias = tmp_path / "x" / ".." / "a.lock"
    (tmp_path / "x").mkdir()
    async with FileLock(path).hold():
        for name in (path, alias):
            with pytest.raises(LockHeld):
                async with FileLock(name).hold(timeout=0):
                    pass
    async with FileLock(alias).hold(timeout=0):
        pass


async def test_tasks_of_a_process_get_the_lock_in_request_order(path: Path) -> None:
    """First come, first served, one at a time."""
    order: list[int] = []

    async def work(number: int) -> None:
        async with FileLock(path).hold():
            order.append(number)
            await anyio.sleep(0)
            order.append(number)

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(work, number)
            await anyio.sleep(0)
    assert order == [number for number in range(20) for _ in "ab"]


@pytest.mark.parametrize("keeps", [False, True], ids=["not-kept", "kept"])
async def test_lock_of_a_killed_owner_is_held_only_by_its_child(path: Path, keeps: bool) -> None:
    """A killed owner's lock is free at once; with an inherited descriptor once the child ended too."""
    fifo, pid_file = path.parent / "fifo", path.parent / "pid"
    os.mkfifo(fifo)
    with run_python(OWNER_OF_A_CHILD, path, "keep" if keeps else "no") as owner:
        await until(pid_file.exists)
        assert not is_free(path)
        owner.kill()
        owner.wait()
    child = int(pid_file.read_text())
    try:
        os.kill(child, 0)
        if keeps:
            with pytest.raises(LockHeld, match=rf"process {owner.pid} \(ended, but a child process"):
                async with FileLock(path).hold(timeout=0.2):
                    pass
        else:
            async with FileLock(path).hold(timeout=10):
                pass
    finally:
        os.kill(child, signal.SIGKILL)
    async with FileLock(path).hold(timeout=10):
        pass


async def test_released_lock_file_is_not_deleted(path: Path) -> None:
    """Deleting it would let a waiter and a newcomer lock two different files."""
    async with anyio.create_task_group() as group:
        with held_elsewhere(path) as release:
            inode = path.stat().st_ino
            waiting = FileLock(path).hold()
            group.start_soon(lambda: anyio.to_thread.run_sync(release))
            async with waiting:
                assert path.stat().st_ino == inode
                with run_python(GIVES_UP, path) as third:
                    assert third.communicate()[0] == "gave up\n"
    assert path.stat().st_ino == inode


async def test_waiter_gets_the_lock_when_another_process_ends(path: Path) -> None:
    """It gets the lock when the holder is killed."""
    with run_python(HOLDER, path) as child:
        assert child.stdout is not None
        child.stdout.readline()

        async def kill() -> None:
            await until(lambda: waiting_threads() == 1)
            child.kill()

        async with anyio.create_task_group() as group:
            group.start_soon(kill)
            async with FileLock(path).hold(timeout=20):
                assert not is_free(path)


async def test_observer_is_not_a_holder(path: Path) -> None:
    found: list[bool] = []

    async def look() -> None:
        found.append(await FileLock(path).is_held())

    async def look_at_once() -> list[bool]:
        found.clear()
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(look)
        return found

    with path.open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert await look_at_once() == [False] * 20
    async with FileLock(path).hold():
        assert await look_at_once() == [True] * 20
    assert await look_at_once() == [False] * 20
    async with FileLock(path).hold(timeout=0):
        pass


async def test_timeout_names_the_holder(path: Path) -> None:
    """The message says which process to wait for or stop."""
    with run_python(HOLDER, path) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(LockHeld, match=rf"a\.lock is locked by process {child.pid} \(alive, since 20.* UTC\)"):
            async with FileLock(path).hold(timeout=0):
                pass


async def test_lock_without_a_free_descriptor_is_unsigned(path: Path) -> None:
    """A lock whose holder cannot be written is still acquired and released."""
    code = (
        "import os, sys, resource, anyio\nfrom pathlib import Path\n"
        "from orchestrator.system.file_lock import FileLock\n"
        "async def main():\n"
        "    lock = FileLock(Path(sys.argv[1]))\n"
        "    async with lock.hold():\n"
        "        pass\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n"
        "    taken = []\n"
        "    try:\n"
        "        while True:\n"
        "            taken.append(os.open('/dev/null', os.O_RDONLY))\n"
        "    except OSError:\n"
        "        os.close(taken.pop())\n"
        "    for _ in range(2):\n"
        "        async with lock.hold():\n"
        "            print('held')\n"
        "anyio.run(main)\n"
    )
    done = await anyio.run_process([sys.executable, "-c", code, str(path)], check=False)
    assert (done.returncode, done.stdout) == (0, b"held\nheld\n"), done.stderr


def test_lock_service_failure_is_an_error_of_the_system(path: Path) -> None:
    """A failed lock or unlock is reported by its errno, which has a fix, whatever the library raises."""
    with path.open("w") as file:
        descriptor = file.fileno()
    for call in (lock_descriptor, unlock_descriptor):
        with pytest.raises(OSError, match="Bad file descriptor") as raised:
            call(descriptor)
        assert raised.value.errno == errno.EBADF
    no_locks = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    assert describe_shortage(no_locks) == (
        "no locks available", "use a local file system, or start the lock service of this one",
    )  # fmt: skip


async def test_unsigned_holder_has_no_name(path: Path) -> None:
    path.write_bytes(b'\xff{"pid": []')
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(LockHeld, match="an unknown process"):
            async with FileLock(path).hold(timeout=0):
                pass


async def test_abandoned_wait_releases_the_lock(path: Path) -> None:
    """A lock acquired after the waiter gave up is released at once."""
    with held_elsewhere(path) as release:
        with pytest.raises(LockHeld):
            async with FileLock(path).hold(timeout=0.02):
                pass
        assert waiting_threads() == 1
        release()
        await until(lambda: waiting_threads() == 0 and is_free(path))


async def test_abandoned_waits_do_not_accumulate(path: Path) -> None:
    """All waits of a process share one thread, however many were abandoned."""
    lock = FileLock(path)
    with held_elsewhere(path) as release:
        for _ in range(5):
            with pytest.raises(LockHeld):
                async with lock.hold(timeout=0.02):
                    pass
            assert waiting_threads() == 1
        with pytest.raises(LockHeld):
            async with lock.hold(timeout=0):
                pass
        release()
        async with lock.hold(timeout=20):
            assert not is_free(path)
            await until(lambda: waiting_threads() == 0)
    assert is_free(path)


@pytest.mark.parametrize("turns", range(12))
async def test_cancelled_wait_leaves_nothing_locked(path: Path, turns: int) -> None:
    """At any point of the acquisition."""
    before = open_fds()

    async def work() -> None:
        async with FileLock(path).hold():
            await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        group.start_soon(work)
        for _ in range(turns):
            await anyio.sleep(0.0005)
        group.cancel_scope.cancel()
    async with FileLock(path).hold(timeout=5):
        pass
    await until(lambda: waiting_threads() == 0)
    assert open_fds() == before


async def test_lock_acquired_during_cancellation_is_released(path: Path) -> None:
    """The waiting thread acquired the lock, but its task is cancelled before the notification."""
    async with anyio.create_task_group() as group:
        with held_elsewhere(path) as release:
            group.start_soon(FileLock(path).hold().__aenter__)
            await until(lambda: waiting_threads() == 1)
            release()
            # The loop is blocked meanwhile: the message of the thread is sent but not yet read.
            while waiting_threads():
                time.sleep(0.001)
            assert not is_free(path)
            group.cancel_scope.cancel()
    assert is_free(path)


async def test_waiters_for_another_process_take_turns(path: Path) -> None:
    """After one task waited for the file, the next waiter of its process acquires a lock of its own."""
    got: list[int] = []

    async def work(number: int) -> None:
        async with FileLock(path).hold() as held:
            os.fstat(held.fd)
            assert not is_free(path)
            got.append(number)

    with held_elsewhere(path) as release:
        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(work, number)
            await until(lambda: waiting_threads() == 1)
            release()
    assert got == [0, 1, 2]
    assert is_free(path)


async def test_release_frees_the_lock_despite_an_inherited_descriptor(path: Path) -> None:
    """A leftover child, such as a daemon started by a hook, does not keep it."""
    async with FileLock(path).hold() as held:
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[held.fd])
        assert not is_free(path)
    try:
        assert is_free(path)
    finally:
        child.communicate()


async def test_lock_in_a_missing_folder_is_not_held(tmp_path: Path) -> None:
    assert not await FileLock(tmp_path / "missing" / "lock").is_held()
    assert list(tmp_path.iterdir()) == []


async def test_process_that_gave_up_can_exit_while_the_lock_is_held(path: Path) -> None:
    """The thread blocked in the kernel does not keep the process alive."""
    with held_elsewhere(path), run_python(GIVES_UP, path) as child:
        assert child.communicate(timeout=20)[0] == "gave up\n"
        assert child.returncode == 0


async def test_lock_file_is_private_and_not_a_symlink(path: Path, tmp_path: Path) -> None:
    """Other users cannot read the holder, and nothing is written through a link."""
    async with FileLock(path).hold():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        async with FileLock(tmp_path / "link").hold():
            pass
    assert (tmp_path / "victim").read_text() == "precious"


async def test_failing_body_releases_the_lock(path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with FileLock(path).hold():
            raise ZeroDivisionError
    assert is_free(path)
