"""File locks for tasks and processes of one machine: `flock` underneath, a queue of tasks in front.

For correctness, not courtesy: whoever holds one may rely on it. `flock` belongs to an open file, not to a
process: opening and closing the file elsewhere in the process does not drop it, two opens exclude each other
even within one process, and a child that keeps the descriptor keeps the lock if its owner is killed. An owner
that lives gives it back by an unlock, which takes it from such children, too: what it waited for has ended, and
what else they left behind (a daemon of a hook of the user's) must not hold it for ever. Lock files are
permanent: unlinking one while somebody waits makes two holders.

A lock can be held by one, or be shared by any number that all ask for it so. Who holds it alone has signed its file
(`LockHolder`), for messages and for people.
"""

from __future__ import annotations

import asyncio
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

#: A signature has room for so many bytes, and for as many more again as it takes: what was there before is covered.
_HOLDER_BLOCK_BYTES: Final = 512

FileLockMode = Literal["exclusive", "shared"]


@dataclass(frozen=True, slots=True)
class LockHolder:
    """What a lock's file says of who holds it."""

    id: str
    """Of this one taking, no other's."""
    pid: int
    started: int | None
    """When that process started, in the kernel's ticks since boot; None where they can't be told."""
    since: float
    """Wall-clock seconds."""
    mode: FileLockMode = "exclusive"
    owner: str = ""
    """For whom the process took it, in its own words."""
    subject: str = ""
    """What is locked, in its own words."""

    @classmethod
    def now(cls, since: float, mode: FileLockMode = "exclusive", owner: str = "", subject: str = "") -> LockHolder:
        """Return a signature of this process."""
        pid = os.getpid()
        return cls(secrets.token_hex(8), pid, _own_start_ticks(pid), since, mode, owner, subject)

    @classmethod
    def read(cls, path: Path) -> LockHolder | None:
        """Return the signature that a file has; None if it has none, or one that can't be read."""
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
        """Return the line that `read` reads, with room behind it."""
        record = {name: getattr(self, name) for name in self.__slots__}
        raw = json.dumps(record).encode() + b"\n"
        return raw.ljust(-(-len(raw) // _HOLDER_BLOCK_BYTES) * _HOLDER_BLOCK_BYTES)

    @property
    def is_alive(self) -> bool:
        """Whether the process that signed lives, as far as is known."""
        return _is_alive(self.pid, self.started)


@dataclass(frozen=True, slots=True)
class HeldLock:
    """A lock that is held; a child that is given `fd` goes on holding it if we are killed, until it ends."""

    path: Path
    fd: int

    def write_holder(self, signature: LockHolder | None) -> None:
        """Say in its file who holds it, or that nobody does; who shares a lock must not.

        It only serves messages: a full disk must not keep anyone from locking.
        """
        with suppress(OSError):
            os.pwrite(self.fd, b"\n" if signature is None else signature.encoded(), 0)

    def release(self) -> None:
        """Give it back; once."""
        _unlock(self.fd)


class FileLock:
    """The lock on `path`, whose folder must exist; the file is made if it is missing.

    The tasks of one event loop get it in the order of their asking, if they spell the path the same way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    async def is_held(self) -> bool:
        """Whether anyone holds the lock. Raises as `hold` does.

        Any number may look at once; who only tries to take the lock at that moment may find it held.
        """
        return await anyio.to_thread.run_sync(is_held, self.path)

    async def held_error(self) -> LockHeld:
        """Return the error that names who holds the lock."""
        holder, lives = await anyio.to_thread.run_sync(_describe_holder, self.path)
        return LockHeld(self.path, holder, owner_lives=lives)

    def try_acquire(self, *, shared: bool = False) -> HeldLock | None:
        """Take the lock if it is free, before anybody of this event loop who waits for it; None if it is not.

        Blocks for no longer than it takes to open a local file. It is not signed. Raises as `hold` does.
        """
        fd, locked = _open_and_try(self.path, shared=shared)
        if not locked:
            os.close(fd)
            return None
        return HeldLock(self.path, fd)

    async def take(self, *, shared: bool = False) -> HeldLock:
        """Wait until the lock is free, and take it; whoever has it may give it back in any task.

        It is not signed. Raises as `hold` does. A cancelled wait leaves nothing locked.
        """
        queue = _queue_of(self.path)
        await queue.take_turn()
        try:
            fd = await queue.lock(shared=shared)
        finally:
            queue.turn.release()
        assert fd is not None, "only who does not wait gets none"
        return HeldLock(self.path, fd)

    @asynccontextmanager
    async def hold(
        self,
        timeout: float | None = None,
        *,
        awaited: str | None = None,
    ) -> AsyncIterator[HeldLock]:
        """Hold the lock alone for the body; `timeout` is how many seconds to wait for it, 0 only tries.

        `awaited` is what the holder runs: a line on standard error says so where the wait takes some seconds.
        Raises LockHeld, which names the holder, StoreUnavailable where the file system has no locks, and
        OSError if the file can't be opened. A cancelled wait leaves nothing locked.
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
                await queue.take_turn()
                releases.callback(queue.turn.release)
                fd = await queue.lock(only_try=timeout == 0)
            if fd is None:
                raise await self.held_error()
            releases.callback(_unlock, fd)
            held = HeldLock(self.path, fd)
            with suppress(OSError):  # without a descriptor to spare it stays unsigned
                held.write_holder(LockHolder.now(time.time()))
            yield held


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

    async def lock(self, *, shared: bool = False, only_try: bool = False) -> int | None:
        """Return a descriptor that holds the lock; None only if it was to be tried and is not free."""
        while True:
            if self._waiter is None:
                with anyio.CancelScope(shield=True):
                    fd, locked = await anyio.to_thread.run_sync(lambda: _open_and_try(self._path, shared=shared))
                if locked:
                    return fd
                if only_try:
                    os.close(fd)
                    return None
                self._waiter = _Waiter(self, self._path, fd, shared=shared)
            elif only_try:
                return None
            waiter = self._waiter
            fd = await self._adopt(waiter)
            if waiter.shared == shared:
                return fd
            # Somebody gave up who wanted it in the other way: ask for it anew, since a change is no single step.
            _unlock(fd)

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

    def __init__(self, queue: _Queue, path: Path, fd: int, *, shared: bool) -> None:
        self.fd, self.shared = fd, shared
        self.wanted = True
        self.settled = anyio.Event()
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


def _open_and_try(path: Path, *, shared: bool = False) -> tuple[int, bool]:
    fd = _open(path)
    try:
        return fd, _flock(path, fd, block=False, shared=shared)
    except BaseException:
        os.close(fd)
        raise


def is_held(path: Path) -> bool:
    """Whether anyone holds the lock on a file, as `FileLock.is_held`. Blocks."""
    # Shared, or two that look at the same moment would take each other for a holder.
    fd, is_free = _open_and_try(path, shared=True)
    _unlock(fd)
    return not is_free


class _Locker:
    """`flock` by portalocker, its own locker: the module's default is a global that anyone may set to lockf."""

    def __init__(self) -> None:
        # Late: importing portalocker takes up to half a second where redis is installed.
        from portalocker import AlreadyLocked, LockException, LockFlags
        from portalocker.portalocker import FlockLocker

        self.locker = FlockLocker()
        self.held, self.failed = AlreadyLocked, LockException
        modes = {False: LockFlags.EXCLUSIVE, True: LockFlags.SHARED}
        self.flags = {
            (block, shared): flags if block else flags | LockFlags.NON_BLOCKING
            for shared, flags in modes.items()
            for block in (False, True)
        }


@cache
def _locker() -> _Locker:
    return _Locker()


def _flock(path: Path, fd: int, *, block: bool, shared: bool = False) -> bool:
    flock = _locker()
    try:
        flock.locker.lock(fd, flock.flags[block, shared])
    except flock.held:
        return False
    except flock.failed as exc:
        raise StoreUnavailable(path, str(exc), "put it on a local file system") from exc
    return True


def _unlock(fd: int) -> None:
    try:
        _locker().locker.unlock(fd)
    finally:
        os.close(fd)


def _describe_holder(path: Path) -> tuple[str, bool]:
    """Return who signed the lock file, in words, and whether that process lives as far as is known."""
    found = LockHolder.read(path)
    if found is None:
        return "a process that has not signed it", True
    since = datetime.fromtimestamp(found.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    state = "alive" if found.is_alive else "ended, but something it started holds it"
    return f"process {found.pid} ({state}, since {since})", found.is_alive


@cache
def _own_start_ticks(pid: int) -> int | None:
    return start_ticks(pid)


def waiting_processes(path: Path) -> list[int]:
    """Return the processes that wait for a lock right now, the first first; none where the system does not tell."""
    try:
        status, table = path.stat(), Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return []
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    # As in `7: -> FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF`; who holds it has no arrow (proc_locks(5)).
    rows = [line.split() for line in table.splitlines()]
    found = [row[5] for row in rows if len(row) > 6 and row[1:3] == ["->", "FLOCK"] and row[6] == file]
    return [int(pid) for pid in found]


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
