"""Check that the client of a session socket belongs to the session.

A token can be stolen; the kernel's peer credentials can't be forged (SO_PEERCRED in unix(7)). A process belongs to a
session if it has our user id and descends from the supervisor that holds the session's lock. The supervisor is a child
subreaper, so daemons remain its descendants, as do processes in bubblewrap, whose init is a descendant.

Without /proc (macOS) ancestry is not available: there the user id and the token decide.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from orchestrator.system.file_lock import lock_descriptor
from orchestrator.system.process_table import process_stat

_PEER_PIDFD: Final = 77  # SO_PEERPIDFD, from Linux 6.5 on
_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid
_MACOS_LEVEL, _MACOS_CREDENTIALS = 0, 1  # SOL_LOCAL, LOCAL_PEERCRED
_MAX_DEPTH: Final = 1_000  # generations
_MAX_WALKS: Final = 10  # until two consecutive walks return the same ancestors


def belongs_to_session(connected: socket.socket, lock: Path) -> bool:
    """Return whether a client belongs to the session of a lock. Blocks briefly.

    Call it when the connection is accepted. The supervisor holds `lock`. A process that has exited by then does not
    belong to any session.
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
        # If the process is alive and the lock is still held, neither process id was reused.
        return _is_alive(connected, pid) and _holder(lock) == supervisor
    return False


def _user_on_macos(connected: socket.socket) -> int:
    credentials = connected.getsockopt(_MACOS_LEVEL, _MACOS_CREDENTIALS, 76)  # struct xucred: version, uid, groups
    return int(struct.unpack_from("II", credentials)[1])


def _holder(lock: Path) -> int | None:
    """Return the pid of the holder of a session's lock, or None."""
    descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        is_free = lock_descriptor(descriptor, block=False, shared=True)
        return None if is_free else int(json.loads(file.read(1 << 10))["pid"])


def _descends(pid: int, ancestor: int) -> bool:
    """Return whether a process is a descendant of another.

    A parent may exit during a walk and its id may be reused, so two consecutive walks must agree.
    """
    previous: list[tuple[int, int]] | None = None
    for _ in range(_MAX_WALKS):
        ancestors = _ancestors(pid, ancestor)
        if ancestors is not None and ancestors == previous:
            return ancestors[-1][0] == ancestor
        previous = ancestors
    return False


def _ancestors(pid: int, last: int) -> list[tuple[int, int]] | None:
    """Return a process and its ancestors up to `last`, with start times, if alive."""
    ancestors: list[tuple[int, int]] = []
    while pid and len(ancestors) < _MAX_DEPTH:
        stat = process_stat(pid)
        if stat is None:
            return None
        ancestors.append((pid, stat.started))
        if pid == last:
            break
        pid = stat.parent
    return ancestors


def _is_alive(connected: socket.socket, pid: int) -> bool:
    """Return whether the client process is alive, so that its id is not reused."""
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
