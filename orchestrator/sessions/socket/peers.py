"""Which process is at the other end of a session's socket, and whether it belongs to that session.

A token can be stolen; the kernel's word on who connected can't (SO_PEERCRED in unix(7)). A process belongs to a session
if it is of our user and descends from the supervisor that holds the session's lock. The supervisor is a child
subreaper, so that daemons stay its descendants, and so is what is in a bubblewrap, whose init is its descendant.

Without /proc (macOS) ancestry can't be told: there the user and the token decide.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from orchestrator.system.process_table import process_stat

_PEER_PIDFD: Final = 77  # SO_PEERPIDFD, from Linux 6.5 on
_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid
_MACOS_LEVEL, _MACOS_CREDENTIALS = 0, 1  # SOL_LOCAL, LOCAL_PEERCRED
_DEEPEST: Final = 1_000  # generations
_TRIES: Final = 10  # walks, until two in turn found the same ancestors


def belongs_to_session(connected: socket.socket, lock: Path) -> bool:
    """Whether who connected belongs to the session whose supervisor holds `lock`. Blocks, though not for long.

    To be asked when the connection is accepted. A process that has ended by then belongs to no session.
    """
    with suppress(OSError, ValueError):
        if sys.platform != "linux":
            return _user_on_macos(connected) == os.getuid()
        pid, user, _ = _CREDENTIALS.unpack(
            connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        supervisor = _holder(lock)
        if user != os.getuid() or not pid or supervisor is None or not _descends(pid, supervisor):
            return False
        # That the process still lives, and the lock is still held, says that no id was another's meanwhile.
        return _lives(connected, pid) and _holder(lock) == supervisor
    return False


def _user_on_macos(connected: socket.socket) -> int:
    credentials = connected.getsockopt(_MACOS_LEVEL, _MACOS_CREDENTIALS, 76)  # struct xucred: version, uid, groups
    return int(struct.unpack_from("II", credentials)[1])


def _holder(lock: Path) -> int | None:
    """Return the process that holds a session's lock, by its signature; None where nobody holds it."""
    descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(json.loads(file.read(1 << 10))["pid"])
    return None


def _descends(pid: int, ancestor: int) -> bool:
    """Whether a process is a descendant of another.

    A parent may end meanwhile and its id may be given to a stranger, so two walks in turn must agree.
    """
    before: list[tuple[int, int]] | None = None
    for _ in range(_TRIES):
        found = _ancestors(pid, ancestor)
        if found is not None and found == before:
            return found[-1][0] == ancestor
        before = found
    return False


def _ancestors(pid: int, last: int) -> list[tuple[int, int]] | None:
    """Return a process and those above it, up to `last`, with when they started; None if one ended meanwhile."""
    found: list[tuple[int, int]] = []
    while pid and len(found) < _DEEPEST:
        stat = process_stat(pid)
        if stat is None:
            return None
        found.append((pid, stat.started))
        if pid == last:
            break
        pid = stat.parent
    return found


def _lives(connected: socket.socket, pid: int) -> bool:
    """Whether the process that connected has not ended, and its id is still its own."""
    try:
        descriptor = connected.getsockopt(socket.SOL_SOCKET, _PEER_PIDFD)
    except OSError:  # an older kernel
        return Path(f"/proc/{pid}").exists()
    try:
        polled = select.poll()
        polled.register(descriptor, select.POLLIN)
        return not polled.poll(0)
    finally:
        os.close(descriptor)
