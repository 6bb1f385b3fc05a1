"""Filter the system calls of a sandboxed program with seccomp (seccomp(2)).

The filter complements Landlock and bubblewrap. It covers kernel interfaces that a coding CLI does not need and that
many sandbox escapes used (io_uring, userfaultfd, bpf, new user namespaces), the kernel keyring, memory of other
processes, input to a terminal, and optionally sockets.

The supervisor imports this in every session: keep imports few and within the standard library. A denied call fails with
EPERM; a call for which programs have a fallback fails with ENOSYS. Call numbers are from the kernel's tables for x86_64
and aarch64 (include/uapi/asm-generic/unistd.h); from 424 on they are equal. Programs of other architectures, including
32-bit ones, can't make any call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

from orchestrator.sandbox.landlock import libc

#: Allowed sockets: all; families covered by network namespaces; only unix sockets; unix sockets and outgoing TCP; none.
ALL, NAMESPACED, UNIX, STREAM, NONE = "all", "namespaced", "unix", "stream", "none"

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK, _AF_PACKET = 1, 2, 10, 16, 17
_SOCK_STREAM, _SOCK_TYPE_MASK, _IPPROTO_TCP = 1, 0xF, 6
_MSG_FASTOPEN, _TCP_ULP = 0x20000000, 31
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
# CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET; see clone(2)
_NEW_NAMESPACES = 0x80 | 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER_MODE = 38, 22, 2
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06  # see linux/bpf_common.h
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data, whose low words come first
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000

#: x86_64, aarch64.
_DENIED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "fanotify_init": (300, 262),
    "open_by_handle_at": (304, 265),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
}
#: Denied unless namespaces cover them: System V and POSIX IPC.
_SHARED_IPC = {
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semctl": (66, 191),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgctl": (71, 187),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
}
#: Also denied: calls that change another process, with the index of the argument for its id (0 means the caller).
#: A limit on processor time ends a process like a signal.
_PROCESS_TARGETING = {
    "prlimit64": ((302, 261), 0),
    "setpriority": ((141, 140), 1),
    "ioprio_set": ((251, 30), 1),
    "sched_setaffinity": ((203, 122), 0),
    "sched_setattr": ((314, 274), 0),
    "sched_setparam": ((142, 118), 0),
    "sched_setscheduler": ((144, 119), 0),
    "migrate_pages": ((256, 238), 0),
    "move_pages": ((279, 239), 0),
}
#: Denied unless read-only mounts cover them: file attributes. The error is that of a file system without attributes.
_ATTRIBUTES = {
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
}
#: The same: FS_IOC_SETFLAGS (64 and 32 bits), FS_IOC_FSSETXATTR, FS_IOC_ENABLE_VERITY, FS_IOC_SET_ENCRYPTION_POLICY.
_SETTING_FLAGS = (0x40086602, 0x40046602, 0x401C5820, 0x40806685, 0x800C6613)
_LISTEN, _SETSOCKOPT = (50, 201), (54, 208)
_COVERED = (_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK, _AF_PACKET)
#: Calls that send, with the index of the flags argument.
_SENDING = (((44, 206), 3), ((46, 211), 2), ((307, 269), 3))
_SOCKET, _CLONE, _CLONE3, _UNSHARE, _IOCTL = (41, 198), (56, 220), (435, 435), (272, 97), (16, 29)


def is_supported() -> bool:
    """Return whether filters are supported on this machine."""
    return sys.platform == "linux" and os.uname().machine in _ARCHITECTURES


def build_filter(*, sockets: str = ALL, namespaced: bool = True, nesting: bool = False) -> bytes:
    """Return a filter for this machine, in the format of bubblewrap's `--seccomp`.

    The format is an array of `struct sock_filter`. `sockets` is one of the constants; socket pairs are always allowed.
    NAMESPACED excludes families that no network namespace covers, such as those between a virtual machine and its host.
    STREAM makes Landlock's rule for the ports of `connect` cover the whole network: only TCP, no incoming connections,
    and no connections that a send opens implicitly. It also forbids listening on unix sockets, since a filter can't
    distinguish them from TCP sockets by descriptor.

    A program that is not `namespaced` would share System V and POSIX queues, semaphores and memory with the machine,
    and could change attributes of read-only files, and limits, priorities and CPU affinity of other processes: all of
    this is denied. With `nesting`, it may create namespaces. Raises OSError if the machine is not supported.
    """
    if not is_supported():
        raise OSError(errno.ENOSYS, f"system call filters are not supported on {os.uname().machine}")
    machine = os.uname().machine
    column = list(_ARCHITECTURES).index(machine)
    made = [
        _operation(_LOAD, _ARCHITECTURE_AT),
        *_unless(_EQUAL, _ARCHITECTURES[machine], _fail(errno.ENOSYS)),
        _operation(_LOAD, _NUMBER_AT),
        *_when(_AT_LEAST, _X32, _fail(errno.ENOSYS)),
    ]
    for numbers in _DENIED.values():
        made += _when(_EQUAL, numbers[column], _fail(errno.EPERM))
    made += [] if namespaced else _deny_host_access(column)
    made += _deny_argument(_IOCTL[column], 1, _EQUAL, (_TIOCSTI, _TIOCLINUX), errno.EPERM)
    if not nesting:
        # A filter can't inspect the arguments of clone3: the C library falls back to clone.
        made += _when(_EQUAL, _CLONE3[column], _fail(errno.ENOSYS))
        made += _deny_argument(_CLONE[column], 0, _ANY_BIT, (_NEW_NAMESPACES,), errno.EPERM)
        made += _deny_argument(_UNSHARE[column], 0, _ANY_BIT, (_NEW_NAMESPACES,), errno.EPERM)
    if sockets == NONE:
        made += _when(_EQUAL, _SOCKET[column], _fail(errno.EACCES))
    elif sockets == UNIX:
        made += _allow_argument(_SOCKET[column], 0, (_AF_UNIX,), errno.EACCES)
    elif sockets == NAMESPACED:
        made += _allow_argument(_SOCKET[column], 0, _COVERED, errno.EAFNOSUPPORT)
    elif sockets == STREAM:
        made += _deny_other_sockets(column)
    return b"".join([*made, _operation(_RETURN, _ALLOW)])


def _deny_host_access(column: int) -> list[bytes]:
    """Deny access to other processes, shared IPC, and file attributes."""
    made = []
    for numbers in _SHARED_IPC.values():
        made += _when(_EQUAL, numbers[column], _fail(errno.EPERM))
    for numbers in _ATTRIBUTES.values():
        made += _when(_EQUAL, numbers[column], _fail(errno.ENOTSUP))
    for numbers, argument in _PROCESS_TARGETING.values():
        made += _allow_argument(numbers[column], argument, (0,), errno.EPERM)
    return [*made, *_deny_argument(_IOCTL[column], 1, _EQUAL, _SETTING_FLAGS, errno.ENOTTY)]


def install_filter(program: bytes) -> None:
    """Install a permanent filter for this thread and its children. Raises OSError."""
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a length and, aligned, a pointer
    described = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)))
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_SECCOMP, _FILTER_MODE)):
        pointer = described if option == _PR_SET_SECCOMP else None
        if libc().prctl(option, ctypes.c_ulong(value), pointer, 0, 0):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _operation(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _fail(number: int) -> bytes:
    return _operation(_RETURN, _FAIL | number)


def _when(test: int, value: int, then: bytes) -> list[bytes]:
    """Return operations that run `then` if the test of the loaded value is true."""
    return [_operation(test, value, 0, len(then) // 8), then]


def _unless(test: int, value: int, then: bytes) -> list[bytes]:
    return [_operation(test, value, len(then) // 8, 0), then]


def _unless_any(values: tuple[int, ...], then: bytes) -> list[bytes]:
    """Return operations that run `then` if the loaded value is not in `values`."""
    left, size = len(values), len(then) // 8
    return [*(_operation(_EQUAL, value, left - nth - 1 + size) for nth, value in enumerate(values)), then]


def _deny_argument(number: int, argument: int, test: int, values: tuple[int, ...], error: int) -> list[bytes]:
    """Deny a call if the low word of an argument passes the test for any of `values`."""
    tests = (part for value in values for part in _when(test, value, _fail(error)))
    # Load the call number again for the following operations.
    then = b"".join([_operation(_LOAD, _ARGUMENTS_AT + 8 * argument), *tests, _operation(_LOAD, _NUMBER_AT)])
    return _when(_EQUAL, number, then)


def _deny_other_sockets(column: int) -> list[bytes]:
    """Deny sockets other than unix and TCP, and operations that bypass Landlock."""
    error = _fail(errno.EACCES)
    tcp = b"".join(
        [
            *_unless_any((_AF_INET, _AF_INET6), error),
            _operation(_LOAD, _ARGUMENTS_AT + 8),
            _operation(_AND, _SOCK_TYPE_MASK),
            *_unless(_EQUAL, _SOCK_STREAM, error),
            _operation(_LOAD, _ARGUMENTS_AT + 16),
            *_unless_any((0, _IPPROTO_TCP), error),
        ]
    )
    then = [_operation(_LOAD, _ARGUMENTS_AT), *_unless(_EQUAL, _AF_UNIX, tcp), _operation(_LOAD, _NUMBER_AT)]
    made = [*_when(_EQUAL, _SOCKET[column], b"".join(then)), *_when(_EQUAL, _LISTEN[column], error)]
    for numbers, argument in _SENDING:
        made += _deny_argument(numbers[column], argument, _ANY_BIT, (_MSG_FASTOPEN,), errno.EOPNOTSUPP)
    # Kernel modules can turn TCP into another protocol (ULP). The error is that of a kernel without these modules.
    return made + _deny_argument(_SETSOCKOPT[column], 2, _EQUAL, (_TCP_ULP,), errno.ENOPROTOOPT)


def _allow_argument(number: int, argument: int, values: tuple[int, ...], error: int) -> list[bytes]:
    """Deny a call unless the low word of an argument is in `values`."""
    test = _unless_any(values, _fail(error))
    then = b"".join([_operation(_LOAD, _ARGUMENTS_AT + 8 * argument), *test, _operation(_LOAD, _NUMBER_AT)])
    return _when(_EQUAL, number, then)
