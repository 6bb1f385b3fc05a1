"""File locks for tasks and processes of one machine: `flock` underneath, a queue of tasks in front.

For correctness, not courtesy: whoever holds one may rely on it. `flock` belongs to an open file, not to a
process: opening and closing the file elsewhere in the process does not drop it, two opens exclude each other
even within one process, and a child that keeps the descriptor keeps the lock if its owner is killed. An owner
that lives gives it back by an unlock, which takes it from such children, too: what it waited for has ended, and
what else they left behind (a daemon of a hook of the user's) must not hold it for ever. Lock files are
permanent: unlinking one while somebody waits makes two holders.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from orchestrator.errors import LockHeld, StoreUnavailable


@dataclass(frozen=True, slots=True)
class HeldLock:
    """A lock that is held; a child that is given `fd` goes on holding it if we are killed, until it ends."""

    path: Path
    fd: int


class FileLock:
    """The exclusive lock on `path`, whose folder must exist; the file is made if it is missing.

    The tasks of one event loop get it in the order of their asking, if they spell the path the same way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    async def is_held(self) -> bool:
        """Whether anyone holds the lock. Raises as `hold` does.

        Any number may look at once; who only tries to take the lock at that moment may find it held.
        """
        return await anyio.to_thread.run_sync(_is_held, self.path)

    async def held_error(self) -> LockHeld:
        """Return the error that names who holds the lock."""
        holder, lives = await anyio.to_thread.run_sync(_describe_holder, self.path)
        return LockHeld(self.path, holder, owner_lives=lives)

    @asynccontextmanager
    async def hold(self, timeout: float | None = None) -> AsyncIterator[HeldLock]:  # noqa: ASYNC109  (raises LockHeld)
        """Hold the lock for the body; `timeout` is how many seconds to wait for it, 0 only tries.

        Raises LockHeld, which names the holder, StoreUnavailable where the file system has no locks, and
        OSError if the file can't be opened. A cancelled wait leaves nothing locked.
        """
        queue = _queue_of(self.path)
        with ExitStack() as releases:
            fd = None
            with anyio.move_on_after(timeout):
                await queue.take_turn()
                releases.callback(queue.turn.release)
                fd = await queue.lock(only_try=timeout == 0)
            if fd is None:
                raise await self.held_error()
            releases.callback(_unlock, fd)
            yield HeldLock(self.path, fd)


class _Queue:
    """The tasks of one event loop that want one lock: one of them at a time deals with the file."""

    def __init__(self, path: Path) -> None:
        self.turn = anyio.Semaphore(1, max_value=1)
        self._path = path
        self._waiter: _Waiter | None = None

    async def take_turn(self) -> None:
        try:
            # Also a caller without time to wait gets what is free.
            self.turn.acquire_nowait()
        except anyio.WouldBlock:
            await self.turn.acquire()

    async def lock(self, *, only_try: bool) -> int | None:
        """Return a descriptor that holds the lock; None only if it was to be tried and is not free."""
        if self._waiter is None:
            with anyio.CancelScope(shield=True):
                fd, locked = await anyio.to_thread.run_sync(_open_and_try, self._path)
            if locked:
                return fd
            if only_try:
                os.close(fd)
                return None
            self._waiter = _Waiter(self, self._path, fd)
        elif only_try:
            return None
        return await self._adopt(self._waiter)

    async def _adopt(self, waiter: _Waiter) -> int:
        waiter.wanted = True
        try:
            await waiter.settled.wait()
        except anyio.get_cancelled_exc_class():
            waiter.wanted = False
            if waiter.settled.is_set():
                self.abandon(waiter)
            raise
        self._waiter = None
        if waiter.error is not None:
            os.close(waiter.fd)
            raise waiter.error
        return waiter.fd

    def abandon(self, waiter: _Waiter) -> None:
        """Give back what nobody wants any more."""
        os.close(waiter.fd)
        self._waiter = None


class _Waiter:
    """A thread that is blocked in `flock`, which nothing can interrupt.

    A task that gives up leaves it behind. The next task of the queue takes it over, so that there is never a
    second one; if there is none, the lock is given back as soon as it is got. It is a daemon: a process may
    end while another still holds the lock.
    """

    def __init__(self, queue: _Queue, path: Path, fd: int) -> None:
        self.fd = fd
        self.wanted = True
        self.settled = anyio.Event()
        self.error: StoreUnavailable | None = None
        self._queue, self._path = queue, path
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._wait, name=f"flock {path.name}", daemon=True).start()

    def _wait(self) -> None:
        error = None
        try:
            _flock(self._path, self.fd, block=True)
        except StoreUnavailable as exc:
            error = exc
        try:
            self._loop.call_soon_threadsafe(self._settle, error)
        except RuntimeError:  # the loop is closed: nobody is left who could want it
            os.close(self.fd)

    def _settle(self, error: StoreUnavailable | None) -> None:
        self.error = error
        self.settled.set()
        if not self.wanted:
            self._queue.abandon(self)


_queues: RunVar[WeakValueDictionary[Path, _Queue]] = RunVar("file_lock_queues")


def _queue_of(path: Path) -> _Queue:
    try:
        queues = _queues.get()
    except LookupError:
        queues = WeakValueDictionary()
        _queues.set(queues)
    return queues.setdefault(path, _Queue(path))


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _open_and_try(path: Path) -> tuple[int, bool]:
    fd = _open(path)
    try:
        return fd, _flock(path, fd, block=False)
    except BaseException:
        os.close(fd)
        raise


def _is_held(path: Path) -> bool:
    fd = _open(path)
    try:
        # Shared, or two that look at the same moment would take each other for a holder.
        is_free = _flock(path, fd, block=False, shared=True)
    except BaseException:
        os.close(fd)
        raise
    _unlock(fd)
    return not is_free


def _flock(path: Path, fd: int, *, block: bool, shared: bool = False) -> bool:
    # Importing portalocker takes up to half a second where redis is installed.
    from portalocker import AlreadyLocked, LockException, LockFlags  # noqa: PLC0415
    from portalocker.portalocker import FlockLocker  # noqa: PLC0415

    # Its own locker, since the module's default is a global that anyone may set to lockf.
    flags = LockFlags.SHARED if shared else LockFlags.EXCLUSIVE
    try:
        FlockLocker().lock(fd, flags if block else flags | LockFlags.NON_BLOCKING)
    except AlreadyLocked:
        return False
    except LockException as exc:
        raise StoreUnavailable(path, str(exc), "put it on a local file system") from exc
    if not shared:
        _sign(fd)
    return True


def _unlock(fd: int) -> None:
    from portalocker.portalocker import FlockLocker  # noqa: PLC0415  see _flock

    try:
        FlockLocker().unlock(fd)
    finally:
        os.close(fd)


def _sign(fd: int) -> None:
    pid = os.getpid()
    # The signature only serves messages: a full disk, or no descriptor to spare, must not keep anyone from locking.
    with suppress(OSError):
        record = {"pid": pid, "started": start_ticks(pid), "since": time.time()}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(record).encode(), 0)


def _describe_holder(path: Path) -> tuple[str, bool]:
    """Return who signed the lock file, in words, and whether that process lives as far as is known."""
    try:
        record = json.loads(path.read_bytes())
        pid, started = int(record["pid"]), record.get("started")
        since = datetime.fromtimestamp(record["since"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not signed it", True
    lives = _is_alive(pid, started)
    state = "alive" if lives else "ended, but something it started holds it"
    return f"process {pid} ({state}, since {since})", lives


def _is_alive(pid: int, started: int | None) -> bool:
    if started is not None:
        return start_ticks(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def start_ticks(pid: int) -> int | None:
    """When the process started, in the kernel's ticks since boot; None for a zombie or without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == b"Z" else int(fields[19])
