"""Try to break out of the sandbox: `hostile.py SETTING ATTACK…` prints as JSON which attacks succeeded.

SETTING is JSON: the paths `tree`, `house`, `hidden`, `outside`, `pid` of a process outside, `port` of a server.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

SETTING = json.loads(sys.argv[1])
TREE, HOUSE, HIDDEN, OUTSIDE = (Path(SETTING[name]) for name in ("tree", "house", "hidden", "outside"))
SECRET, KEPT = HIDDEN / "secret", HOUSE / "kept"
PID, PORT = SETTING["pid"], SETTING["port"]
LIBC = ctypes.CDLL(None, use_errno=True)
MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
PTRACE_SEIZE = 0x4206
NUMBERS = {"x86_64": {"add_key": 248, "io_uring_setup": 425}, "aarch64": {"add_key": 217, "io_uring_setup": 425}}[
    os.uname().machine
]


def read_hidden() -> object:
    return SECRET.read_bytes()


def list_hidden() -> object:
    return SECRET in HIDDEN.iterdir()


def write_hidden() -> object:
    return (HIDDEN / "planted").write_text("x")


def read_hidden_file() -> object:
    return (HOUSE / "hidden-file").read_bytes()


def read_hidden_inside_writable() -> object:
    return (TREE / "private" / "secret").read_bytes()


def read_through_symlink() -> object:
    (TREE / "link").symlink_to(SECRET)
    return (TREE / "link").read_bytes()


def write_through_symlink() -> object:
    (TREE / "way-out").symlink_to(OUTSIDE)
    return (TREE / "way-out" / "planted").write_text("x")


def write_outside() -> object:
    return (OUTSIDE / "planted").write_text("x")


def write_root() -> object:
    for folder in ("/", "/etc", "/usr", "/run", "/dev", str(Path.home())):
        try:
            Path(folder, f"planted-{os.getpid()}").write_text("x")
        except OSError:
            continue
        return True
    return False


def overwrite() -> object:
    return KEPT.write_text("x")


def truncate() -> object:
    os.truncate(KEPT, 0)
    return True


def delete() -> object:
    KEPT.unlink()
    return True


def rename_in() -> object:
    return KEPT.rename(TREE / "stolen")


def rename_out() -> object:
    (TREE / "payload").write_text("x")
    return (TREE / "payload").rename(HOUSE / "payload")


def rename_over() -> object:
    (TREE / "payload").write_text("x")
    return (TREE / "payload").rename(KEPT)


def hardlink() -> object:
    os.link(KEPT, TREE / "hard")
    return (TREE / "hard").write_text("x")


def chmod() -> object:
    KEPT.chmod(0o640)
    return True


def own_root() -> object:
    return Path(f"/proc/self/root{SECRET}").read_bytes()


def own_folder() -> object:
    return Path("/proc/self/cwd", os.path.relpath(SECRET, Path.cwd())).read_bytes()


def others_root() -> object:
    return Path(f"/proc/{PID}/root{SECRET}").read_bytes()


def parents_root() -> object:
    return Path(f"/proc/1/root{SECRET}").read_bytes()


def others_environment() -> object:
    return b"CANARY" in Path(f"/proc/{PID}/environ").read_bytes()


def others_signal() -> object:
    os.kill(PID, signal.SIGTERM)
    return True


def everybodys_signal() -> object:
    for pid in range(2, 200):
        try:
            os.kill(pid, 0)
        except OSError:
            continue
        if Path(f"/proc/{pid}/comm").read_text().startswith("kthreadd"):
            return True
    return False


def ptrace() -> object:
    return LIBC.ptrace(PTRACE_SEIZE, PID, None, None) == 0


def remount() -> object:
    for place in ("/", str(HOUSE), str(HIDDEN)):
        if LIBC.mount(b"none", place.encode(), None, MS_REMOUNT | MS_BIND, None) == 0:
            return True
        if LIBC.umount2(place.encode(), 2) == 0:
            return True
    return False


def remount_as_root_of_a_namespace() -> object:
    script = 'umount -l "$1"; mount -o remount,rw,bind "$2"; cat "$1/secret" || echo x >"$2/kept"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(HIDDEN), str(HOUSE)]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


def device() -> object:
    os.mknod(TREE / "disk", 0o600 | 0o060000, os.makedev(7, 0))
    return True


def socket_file() -> object:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.path.relpath(HIDDEN / "socket"))
    return True


def services() -> object:
    named = Path("/etc/resolv.conf").resolve()
    return [path for path in Path("/run").rglob("*") if path != named and path not in named.parents]


def network() -> object:
    with socket.create_connection(("127.0.0.1", PORT), timeout=5):
        return True


def hypervisor() -> object:
    """Create a socket by which a virtual machine reaches its host."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM):
        return True


def _by_proxy(port: int) -> bool:
    url = urlsplit(os.environ["HTTPS_PROXY"])
    token = b64encode(f"{url.username}:{url.password}".encode()).decode()
    with socket.create_connection((url.hostname, url.port), timeout=5) as proxy:
        head = f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nProxy-Authorization: Basic {token}\r\n\r\n"
        proxy.sendall(head.encode())
        return proxy.recv(1 << 10).startswith(b"HTTP/1.1 200 ")


def listed_host() -> object:
    return _by_proxy(PORT)


def other_host() -> object:
    return _by_proxy(SETTING["other_port"])


def fast_open() -> object:
    """Connect by TCP Fast Open, which Landlock does not check."""
    with socket.socket() as client:
        return client.sendto(b"x", 0x20000000, ("127.0.0.1", PORT))


def multipath() -> object:
    """Connect by MPTCP, which Landlock does not check."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as client:
        client.connect(("127.0.0.1", PORT))
    return True


def datagram() -> object:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        return client.sendto(b"x", ("192.0.2.1", 9))  # a network reserved for documentation (RFC 5737)


def same_port() -> object:
    """Connect to another host, at the proxy's port."""
    with socket.create_connection(("127.0.0.2", urlsplit(os.environ["HTTPS_PROXY"]).port), timeout=5):
        return True


def interfaces() -> object:
    return [name for _, name in socket.if_nameindex() if name != "lo"]


# Further attacks of the table in docs/security.md.


def chmod_and_times() -> object:
    KEPT.chmod(0o640)
    os.utime(KEPT, (1, 1))
    return True


def attributes() -> object:
    def extended() -> object:
        os.setxattr(KEPT, "user.planted", b"x")
        return True

    return attempt(extended) or attempt(_flags)


def _flags() -> object:
    """Mark a file as excluded from backups (FS_IOC_SETFLAGS in ioctl_iflags(2))."""
    descriptor = os.open(KEPT, os.O_RDONLY)
    fcntl.ioctl(descriptor, 0x40086602, struct.pack("=i", 0x40))
    return True


def read_kept() -> object:
    return KEPT.read_bytes()


def execute() -> object:
    return subprocess.run(["/usr/bin/env", "true"], check=False).returncode == 0


def gain_privileges() -> object:
    return "NoNewPrivs:\t0" in Path("/proc/self/status").read_text()


def own_loopback() -> object:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    return True


def _connect(address: object) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)  # type: ignore[arg-type]  # a path, or an abstract name (begins with a null byte)
    return True


def run_socket() -> object:
    return _connect(SETTING["run_socket"])


def hidden_socket() -> object:
    return _connect(SETTING["hidden_socket"])


def shown_socket() -> object:
    return _connect(os.path.relpath(HOUSE / "socket"))


def abstract_socket() -> object:
    return _connect("\0" + SETTING["abstract_socket"])


def terminal() -> object:
    terminal = os.open(SETTING["terminal"], os.O_RDWR | os.O_NOCTTY)
    return os.write(terminal, b"x")


def type_into_terminal() -> object:
    """Fail with ENOTTY or EIO from the kernel itself where the call is not denied."""
    if LIBC.ioctl(0, 0x5412, b"x") == 0:
        return True
    return ctypes.get_errno() != errno.EPERM


def own_terminal() -> object:
    return os.openpty()


def signal_outside() -> object:
    os.kill(PID, 0)
    return True


def see_processes() -> object:
    return "sleep" in Path(f"/proc/{PID}/comm").read_text()


def memory_of_others() -> object:
    return ptrace() or Path(f"/proc/{PID}/environ").read_bytes()


def limit_others() -> object:
    """Change limits, priority or CPU affinity of a process outside."""

    def done(change: Callable[..., None], *arguments: object) -> bool:
        change(*arguments)
        return True

    changes: list[Callable[[], object]] = [
        lambda: resource.prlimit(PID, resource.RLIMIT_CPU, (1 << 30, 1 << 30)),
        lambda: done(os.setpriority, os.PRIO_PROCESS, PID, 19),
        lambda: done(os.sched_setaffinity, PID, os.sched_getaffinity(0)),
    ]
    return any(attempt(one) for one in changes)


def shared_memory() -> object:
    return Path("/dev/shm", SETTING["shared"]).read_bytes() or LIBC.shmat(SETTING["segment"], None, 0) != -1


def system_v() -> object:
    LIBC.shmat.restype = ctypes.c_void_p
    return LIBC.shmat(SETTING["segment"], None, 0) != ctypes.c_void_p(-1).value or _queue()


def _queue() -> bool:
    """Read a message queue by its id from /proc; `msgget` by key is another call."""
    buffer = ctypes.create_string_buffer(200)
    return bool(LIBC.msgrcv(SETTING["queue"], buffer, 100, 0, 0o4000) > 0)


def own_shared_memory() -> object:
    return multiprocessing.Lock()


def keyring() -> object:
    return LIBC.syscall(NUMBERS["add_key"], b"user", b"planted", b"x", 1, -2) > 0


def io_uring() -> object:
    return LIBC.syscall(NUMBERS["io_uring_setup"], 1, ctypes.create_string_buffer(120)) >= 0


def namespaces() -> object:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if LIBC.unshare(0x10000000) == 0 else 1)
    return os.waitpid(pid, 0)[1] == 0


def core_dump() -> object:
    return resource.getrlimit(resource.RLIMIT_CORE)[0] != 0


def huge_file() -> object:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with (TREE / "huge").open("wb") as file:
        file.truncate(SETTING["file_size"] + 1)
    return True


def huge_memory() -> object:
    try:
        return len(bytearray(SETTING["memory"]))
    except MemoryError:
        return False


def attempt(attack: Callable[[], object]) -> bool:
    try:
        return bool(attack())
    except OSError:
        return False


if __name__ == "__main__":
    print(json.dumps([name for name in sys.argv[2:] if attempt(globals()[name])]))  # noqa: T201
