"""Restrict the file access of a process with Landlock (landlock(7)).

The supervisor imports this in every session: keep imports few and within the standard library. The system calls have no
wrappers in the C library; their numbers are the same on all architectures except alpha.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
from functools import cache

READ, WRITE = "read", "write"
#: The same rights except to execute.
READ_DATA, WRITE_DATA = "read-data", "write-data"
MIN_ABI = 3  # Linux 6.2; earlier versions do not control truncation
MIN_ABI_FOR_PORTS = 4  # Linux 6.7; earlier versions do not control connections

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH, _NET_PORT = 1, 1, 2
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION = 0x20080522
_SCOPES = 0b11  # abstract unix sockets, signals; from ABI 6 on

_BIND_TCP, _CONNECT_TCP = 1 << 0, 1 << 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_ALL = {3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_READING = _EXECUTE | _READ_FILE | _READ_DIR


@cache
def abi_version() -> int:
    """Return this kernel's Landlock ABI version, or 0 if it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)))


@cache
def libc() -> ctypes.CDLL:
    """Return the C library, cached because loading it is expensive."""
    return ctypes.CDLL(None, use_errno=True)


def restrict_thread(rules: list[tuple[str, str]], port: int | None = None) -> None:
    """Restrict this thread and its children to `rules`.

    Each rule is an absolute path and its access. It applies to everything beneath the path; missing paths are ignored.
    Write access includes read access, but device nodes can't be created anywhere. Capabilities are dropped, even for
    root. From ABI 6 on, processes outside can't be signalled or reached by abstract unix sockets. With a `port`, TCP
    sockets can't be bound, and can connect only to that port (on any host). Raises OSError if the restriction fails or
    the kernel does not support it.
    """
    version = abi_version()
    handled = _ALL[min(max(version, MIN_ABI), 5)]
    network = 0 if port is None else _BIND_TCP | _CONNECT_TCP
    attributes = struct.pack("=QQQ", handled, network, _SCOPES if version >= 6 else 0)
    ruleset = _call(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    writing = handled & ~(_MAKE_CHAR | _MAKE_BLOCK)
    rights = {READ: _READING, WRITE: writing, READ_DATA: _READING & ~_EXECUTE, WRITE_DATA: writing & ~_EXECUTE}
    for path, kind in rules:
        _allow(ruleset, path, rights[kind])
    if port is not None:
        _call(_ADD_RULE, ruleset, _NET_PORT, struct.pack("=QQ", _CONNECT_TCP, port), 0)
    if libc().prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0):
        raise _error()
    _call(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    # Root's capabilities bypass Landlock, for example to read other processes' environments; see capset(2).
    if libc().capset(struct.pack("=Ii", _CAPABILITY_VERSION, 0), bytes(24)):
        raise _error()


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISDIR(kind):
        rights &= _OF_FILES
    if not stat.S_ISLNK(kind):
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)
    os.close(descriptor)


def _call(number: int, *arguments: object) -> int:
    result = int(libc().syscall(number, *arguments))
    if result < 0:
        raise _error()
    return result


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
