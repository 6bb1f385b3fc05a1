"""File locks for the tasks and processes of a machine: `flock` with a task queue.

These locks are for correctness, not advisory. A `flock` belongs to an open file, not to a process: opening and closing
the file elsewhere in the process does not release it, two opens exclude each other even within a process, and a child
that keeps the descriptor keeps the lock if its owner is killed. A live owner unlocks the file, which also releases it
in such children: the work is done, and a leftover process (such as a daemon started by a user's hook) must not keep the
lock. Lock files are permanent: unlinking one while a process waits would allow two holders.

A lock is exclusive or shared. An exclusive holder is recorded in the file (`LockHolder`), for messages and users.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from orchestrator.errors import LockHeld, StoreUnavailable
from orchestrator.system.process_table import start_ticks
from orchestrator.system.slow_waits import NOTICE_AFTER, warn_if_slow

#: Holders are padded to a multiple of this size, so that a new one overwrites an older one.
_HOLDER_BLOCK_BYTES: Final = 512

FileLockMode = Literal["exclusive", "shared"]


@dataclass(frozen=True, slots=True)
class LockHolder:
    """The holder of an exclusive lock, as recorded in the lock file for messages."""

    id: str
    """Unique for each acquisition."""
    pid: int
    started: int | None
    """The start of the process in kernel ticks since boot, or None if unavailable."""
    since: float
    """Wall-clock seconds."""
    mode: FileLockMode = "exclusive"
    owner: str = ""
    """The party for which the process took the lock."""
    subject: str = ""
    """The locked resource."""

    @classmethod
    def now(cls, since: float, mode: FileLockMode = "exclusive", owner: str = "", subject: str = "") -> LockHolder:
        """Return this process as a holder."""
        pid = os.getpid()
        return cls(secrets.token_hex(8), pid, _own_start_ticks(pid), since, mode, owner, subject)

    @classmethod
    def read(cls, path: Path) -> LockHolder | None:
        """Return the holder recorded in a file, or None if missing or invalid."""
        try:
            raw = path.read_bytes()
            record: dict[str, Any] = json.loads(raw.partition(b"\n")[0])
            if not (isinstance(record["pid"], int) and isinstance(record["since"], int | float)):
                return None
            known = {name: record[name] for name in cls.__slots__ if name in record}
            return cls(**{"id": "", "started": None, **known})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def encoded(self) -> bytes:
        """Return a padded line that `read` can parse."""
        record = {name: getattr(self, name) for name in self.__slots__}
        raw = json.dumps(record).encode() + b"\n"
        return raw.ljust(-(-len(raw) // _HOLDER_BLOCK_BYTES) * _HOLDER_BLOCK_BYTES)

    @property
    def is_alive(self) -> bool:
        """Return whether the process is alive, as far as known."""
        return _is_alive(self.pid, self.started)


@dataclass(frozen=True, slots=True)
class HeldLock:
    """A held lock.

    If this process is killed, children that inherited `fd` keep the lock until they exit.
    """

    path: Path
    fd: int

    def write_holder(self, holder: LockHolder | None) -> None:
        """Write or clear the holder in the lock file.

        Errors are ignored, because the holder is only for messages: a full disk must not prevent locking.
        """
        with suppress(OSError):
            os.pwrite(self.fd, b"\n" if holder is None else holder.encoded(), 0)

    def release(self) -> None:
        """Release the lock. Call once."""
        _unlock(self.fd)


class FileLock:
    """The lock on `path`, whose folder must exist; the file is created if missing.

    Tasks of the same event loop acquire it in request order if they spell the path the same way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    async def is_held(self) -> bool:
        """Return whether the lock is held. Raises the errors of `hold`.

        Concurrent checks don't affect each other; a concurrent attempt to take the lock may find it held.
        """
        return await anyio.to_thread.run_sync(is_held, self.path)

    async def held_error(self) -> LockHeld:
        """Return the error that names the holder of the lock."""
        holder, pid, lives = await anyio.to_thread.run_sync(_describe_holder, self.path)
        return LockHeld(self.path, holder, pid=pid, owner_lives=lives)

    def try_acquire(self, *, shared: bool = False) -> HeldLock | None:
        """Take the lock if it is free, ahead of waiting tasks; otherwise return None.

        Does not record the holder. Blocks only to open a local file. Raises the errors of `hold`.
        """
        fd, locked = _try_open_and_lock(self.path, shared=shared)
        if not locked:
            os.close(fd)
            return None
        return HeldLock(self.path, fd)

    async def acquire(self, *, shared: bool = False) -> HeldLock:
        """Wait until the lock is free and take it; any task may release it.

        Does not record the holder. A cancelled wait leaves nothing locked. Raises the errors of `hold`.
        """
        queue = _queue_of(self.path)
        await queue.enter()
        try:
            fd = await queue.lock(shared=shared)
        finally:
            queue.mutex.release()
        assert fd is not None, "None is returned only with nonblocking"  # noqa: S101  (for the type checker)
        return HeldLock(self.path, fd)

    @asynccontextmanager
    async def hold(
        self,
        timeout: float | None = None,  # noqa: ASYNC109  (raises LockHeld)
        *,
        awaited: str | None = None,
    ) -> AsyncIterator[HeldLock]:
        """Hold the lock exclusively for the block.

        `timeout` is in seconds (0: don't wait). `awaited` describes the holder's activity, for a notice on standard
        error during a long wait. A cancelled wait leaves nothing locked. Raises LockHeld, which names the holder;
        StoreUnavailable if the file system does not support locks; and OSError if the file can't be opened.
        """
        queue = _queue_of(self.path)
        notice = (
            nullcontext()
            if awaited is None
            else warn_if_slow(lambda: f"{awaited} of {_describe_holder(self.path)[0]}", NOTICE_AFTER)
        )
        with ExitStack() as releases:
            fd = None
            with anyio.move_on_after(timeout), notice:
                await queue.enter()
                releases.callback(queue.mutex.release)
                fd = await queue.lock(nonblocking=timeout == 0)
            if fd is None:
                raise await self.held_error()
            releases.callback(_unlock, fd)
            held = HeldLock(self.path, fd)
            with suppress(OSError):  # without a free file descriptor the holder is not recorded
                held.write_holder(LockHolder.now(time.time()))
            yield held


class _Queue:
    """The tasks that request a lock; only one at a time accesses the file."""

    def __init__(self, path: Path) -> None:
        self.mutex = anyio.Semaphore(1, max_value=1)
        self._path = path
        self._waiter: _Waiter | None = None

    async def enter(self) -> None:
        try:
            # A caller whose timeout is zero must still get a free lock.
            self.mutex.acquire_nowait()
        except anyio.WouldBlock:
            await self.mutex.acquire()

    async def lock(self, *, shared: bool = False, nonblocking: bool = False) -> int | None:
        """Return a descriptor that holds the lock (None if not free, with `nonblocking`)."""
        while True:
            if self._waiter is None:
                with anyio.CancelScope(shield=True):
                    fd, locked = await anyio.to_thread.run_sync(lambda: _try_open_and_lock(self._path, shared=shared))
                if locked:
                    return fd
                if nonblocking:
                    os.close(fd)
                    return None
                self._waiter = _Waiter(self, self._path, fd, shared=shared)
            elif nonblocking:
                return None
            waiter = self._waiter
            fd = await self._adopt(waiter)
            if waiter.shared == shared:
                return fd
            # The cancelled request had the other mode. Request again, since a change of mode is not atomic.
            _unlock(fd)

    async def _adopt(self, waiter: _Waiter) -> int:
        waiter.wanted = True
        try:
            await waiter.finished.wait()
        except anyio.get_cancelled_exc_class():
            waiter.wanted = False
            if waiter.finished.is_set():
                self.abandon(waiter)
            raise
        self._waiter = None
        if waiter.error is not None:
            os.close(waiter.fd)
            raise waiter.error
        return waiter.fd

    def abandon(self, waiter: _Waiter) -> None:
        """Release a lock that tasks no longer request."""
        os.close(waiter.fd)
        self._waiter = None


class _Waiter:
    """A thread blocked in `flock`, which can't be interrupted.

    A cancelled task leaves it running. The next task in the queue adopts it, so there is never a second thread; if
    there is no task, the lock is released as soon as it is acquired. It is a daemon thread, so that the process can
    exit while another process holds the lock.
    """

    def __init__(self, queue: _Queue, path: Path, fd: int, *, shared: bool) -> None:
        self.fd, self.shared = fd, shared
        self.wanted = True
        self.finished = anyio.Event()
        self.error: StoreUnavailable | None = None
        self._queue, self._path = queue, path
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._wait, name=f"flock {path.name}", daemon=True).start()

    def _wait(self) -> None:
        error = None
        try:
            _flock(self._path, self.fd, block=True, shared=self.shared)
        except StoreUnavailable as exc:
            error = exc
        try:
            self._loop.call_soon_threadsafe(self._finish, error)
        except RuntimeError:  # the loop is closed, so no task can request the lock
            os.close(self.fd)

    def _finish(self, error: StoreUnavailable | None) -> None:
        self.error = error
        self.finished.set()
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


def _try_open_and_lock(path: Path, *, shared: bool = False) -> tuple[int, bool]:
    fd = _open(path)
    with ExitStack() as undo:
        undo.callback(os.close, fd)
        is_locked = _flock(path, fd, block=False, shared=shared)
        undo.pop_all()
    return fd, is_locked


def is_held(path: Path) -> bool:
    """Return whether the lock on a file is held, like `FileLock.is_held`. Blocks."""
    # Shared, so that concurrent checks don't mistake each other for a holder.
    try:
        fd, is_free = _try_open_and_lock(path, shared=True)
    except FileNotFoundError:  # its folder was removed, or never created
        return False
    _unlock(fd)
    return not is_free


class _Locker:
    """`flock` by an explicit portalocker locker: the default is global, maybe lockf."""

    def __init__(self) -> None:
        # Imported late: portalocker takes up to half a second to import if redis is installed.
        import portalocker  # noqa: PLC0415  (a slow import)

        self.locker = portalocker.portalocker.FlockLocker()
        self.held, self.failed = portalocker.AlreadyLocked, portalocker.LockException
        modes = {False: portalocker.LockFlags.EXCLUSIVE, True: portalocker.LockFlags.SHARED}
        self.flags = {
            (block, shared): flags if block else flags | portalocker.LockFlags.NON_BLOCKING
            for shared, flags in modes.items()
            for block in (False, True)
        }


@cache
def _locker() -> _Locker:
    return _Locker()


def lock_descriptor(fd: int, *, block: bool = True, shared: bool = False) -> bool:
    """Lock an open file; return False if it is locked and `block` is false.

    Raises OSError if locking fails.
    """
    flock = _locker()
    try:
        flock.locker.lock(fd, flock.flags[block, shared])
    except flock.held:
        return False
    except flock.failed as exc:
        raise _system_error(exc) from exc
    return True


def unlock_descriptor(fd: int) -> None:
    """Release the lock on an open file. Raises OSError if that fails."""
    flock = _locker()
    try:
        flock.locker.unlock(fd)
    except flock.failed as exc:
        raise _system_error(exc) from exc


def _system_error(error: BaseException) -> OSError:
    """Return the error of the system behind one of portalocker."""
    number = getattr(error.__cause__, "errno", None) or errno.ENOLCK
    return OSError(number, os.strerror(number))


def _flock(path: Path, fd: int, *, block: bool, shared: bool = False) -> bool:
    try:
        return lock_descriptor(fd, block=block, shared=shared)
    except OSError as exc:
        raise StoreUnavailable(path, exc.strerror or str(exc), "move it to a local file system") from exc


def _unlock(fd: int) -> None:
    try:
        unlock_descriptor(fd)
    finally:
        os.close(fd)


def _describe_holder(path: Path) -> tuple[str, int | None, bool]:
    """Return a description of a lock's holder, its pid, and whether it is alive."""
    holder = LockHolder.read(path)
    if holder is None:
        return "an unknown process", None, True
    since = datetime.fromtimestamp(holder.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    state = "alive" if holder.is_alive else "ended, but a child process holds it"
    return f"process {holder.pid} ({state}, since {since})", holder.pid, holder.is_alive


@cache
def _own_start_ticks(pid: int) -> int | None:
    return start_ticks(pid)


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
