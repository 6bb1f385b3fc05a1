"""The table in docs/security.md: a program in each sandbox tries each row, and the cells have the results."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from orchestrator.client.session import ShortSocketPath
from orchestrator.domain.settings.run_settings import LimitSettings, NetworkSettings, PathAccess, SandboxSettings
from orchestrator.sandbox import seccomp
from orchestrator.sessions.sandbox.policy import SandboxKind
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox, SandboxScope
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand, run_supervised
from tests.sandboxes import require_sandbox

pytestmark = [
    pytest.mark.sandbox,
    pytest.mark.skipif(not seccomp.is_supported(), reason="the table is for Linux on x86_64 and aarch64"),
]

PAGE = Path(__file__).parents[3] / "docs" / "security.md"
HOSTILE = Path(__file__).with_name("hostile.py")
FILE_SIZE, MEMORY = 1 << 20, 512 << 20

#: The row, and the attempts of `hostile.py` for it; with `network: off` in the second table.
ROWS = {
    "**read** your other files": "read_kept",
    "**read** hidden files": "read_hidden",
    "**write** outside its own folders": "write_outside",
    "**write** modes and times of your other files": "chmod_and_times",
    "**write** extended attributes and flags of your other files": "attributes",
    "**execute** programs on the machine": "execute",
    "**execute** programs with more privileges (setuid)": "gain_privileges",
    "**network** with `network: on`": "network",
    "**sockets** of services in `/run`": "run_socket",
    "**sockets** elsewhere that are hidden": "hidden_socket",
    "**sockets** elsewhere that are not hidden, even with `network: off`": "shown_socket",
    "**sockets** without a file (abstract), with `network: on`": "abstract_socket",
    "**terminal**: read and write yours": "terminal",
    "**terminal**: type into yours (`TIOCSTI`)": "type_into_terminal",
    "**terminal**: use its own (pseudo-terminal)": "own_terminal",
    "**signals** to outside processes": "signal_outside",
    "**processes** outside: see them": "see_processes",
    "**processes** outside: trace or read their memory": "memory_of_others",
    "**processes** outside: change their limits, priority or processors": "limit_others",
    "**shared memory**: use that of others (`/dev/shm`, System V)": "shared_memory system_v",
    "**shared memory**: use its own": "own_shared_memory",
    "**keyring**: use that of the kernel": "keyring",
    "**kernel** interfaces that exploits often use (io_uring, userfaultfd, bpf)": "io_uring",
    "**kernel** namespaces: create its own": "namespaces",
    "**limits**: write a core dump": "core_dump",
    "**limits**: write a file larger than `limits.file_size`": "huge_file",
    "**limits**: have more private memory than `limits.memory` in a process": "huge_memory",
}
WITHOUT_NETWORK = {
    "**sockets** elsewhere that are not hidden, even with `network: off`": "shown_socket",
    "**network** with `network: off`": "network datagram",
    "**network** to the host of a virtual machine (vsock), with `network: off` or `{allow: …}`": "hypervisor",
    "**network** on its own loopback with `network: off`": "own_loopback",
}
WITH_HOSTS = {
    "**network** to the hosts of `network: {allow: …}`": "listed_host",
    "**network** to other hosts with `network: {allow: …}`": "other_host network datagram fast_open multipath",
    "**network** to other hosts with `network: {allow: …}`, at the port number of the proxy": "same_port",
    "**network** on its own loopback with `network: {allow: …}`": "own_loopback",
    "**network** to the host of a virtual machine (vsock), with `network: off` or `{allow: …}`": "hypervisor",
}


def table() -> dict[str, dict[str, str]]:
    """Return the cells of the page by row and kind of sandbox."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip((head.lower() for head in heads[1:]), row[1:], strict=True)) for row in rows}


def test_each_row_of_the_table_is_attacked() -> None:
    """A row that no test attacks is an unproven claim."""
    assert table().keys() == ROWS.keys() | WITHOUT_NETWORK.keys() | WITH_HOSTS.keys()


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[dict[str, object]]:
    """Yield resources outside of the session: a process, a terminal, sockets, shared memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    folders = {name: tmp_path / name for name in ("house", "hidden", "outside", "tree", "scratch")}
    for folder in folders.values():
        folder.mkdir()
    (folders["hidden"] / "secret").write_text("canary")
    (folders["house"] / "kept").write_text("kept")
    run_folder = Path("/run") if os.access("/run", os.W_OK) else Path(f"/run/user/{os.getuid()}")
    run_socket = run_folder / f"council-test-{os.getpid()}"
    hidden_socket = Path(f"/tmp/council-test-{os.getpid()}")  # a socket path is limited in length
    shared = Path("/dev/shm", f"council-test-{os.getpid()}")
    with ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(["sleep", "300"], env={"CANARY": "x"}))
        stack.callback(process.kill)
        controller, terminal = os.openpty()
        stack.callback(os.close, controller), stack.callback(os.close, terminal)
        server, other = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        home = stack.enter_context(ShortSocketPath(str(folders["house"])))
        for address in (f"{home}/socket", str(run_socket), str(hidden_socket), f"\0council-test-{os.getpid()}"):
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            with suppress(FileNotFoundError, PermissionError):
                listening.bind(address)
                listening.listen()
        shared.write_text("canary")
        for path in (run_socket, hidden_socket, shared):
            stack.callback(path.unlink, missing_ok=True)
        segment = libc.shmget(0, 4096, 0o1600)
        stack.callback(libc.shmctl, segment, 0, None)
        queue = libc.msgget(0, 0o1600)
        stack.callback(libc.msgctl, queue, 0, None)
        for _ in range(8):
            libc.msgsnd(queue, struct.pack("=q6s", 1, b"canary"), 6, 0)
        yield {
            **{name: str(path) for name, path in folders.items()},
            "pid": process.pid,
            "port": server.getsockname()[1],
            "other_port": other.getsockname()[1],
            "terminal": os.ttyname(terminal),
            "run_socket": str(run_socket),
            "hidden_socket": str(hidden_socket),
            "abstract_socket": f"council-test-{os.getpid()}",
            "shared": shared.name,
            "segment": segment,
            "queue": queue,
            "file_size": FILE_SIZE,
            "memory": MEMORY,
        }


async def tried(
    kind: SandboxKind, setting: dict[str, object], rows: dict[str, str], *, network: bool, hosts: tuple[str, ...] = ()
) -> set[str]:
    """Return the rows of which an attempt succeeded in a session."""
    paths = {name: Path(str(setting[name])) for name in ("house", "hidden", "tree", "scratch")}
    python = (Path(sys.prefix), Path(sys.base_prefix))
    config = SandboxSettings(
        network=NetworkSettings(allow=hosts) if hosts else "on" if network else "off",
        limits=LimitSettings(file_size=FILE_SIZE, memory=MEMORY),
        readable=tuple(map(str, (HOSTILE, paths["house"], *python))),
    )
    attacks = [attack for names in rows.values() for attack in names.split()]
    top = paths["house"].parent
    command = SupervisedCommand(
        argv=[sys.executable, "-I", str(HOSTILE), json.dumps(setting), *attacks],
        env={"PATH": os.environ["PATH"]},
        cwd=paths["tree"],
        stdin=None,
        stdout=top / "stdout",
        stderr=top / "stderr",
        cap=1 << 20,
        timeout=60,
        grace=5,
        lock=top / "task.1.lock",
    )
    fencing = RunSandbox(kind, (paths["hidden"], Path(str(setting["hidden_socket"]))), config)
    async with fencing.apply(SandboxScope((paths["tree"],), (), paths["scratch"]), command, PathAccess()) as fenced:
        # A host with the port number of the proxy.
        ports = {name: value.rpartition(":")[2] for name, value in fenced.command.env.items()}
        with socket.create_server(("127.0.0.2", int(ports.get("HTTPS_PROXY", 0)))):
            ended = await run_supervised(fenced.command)
    said = (top / "stdout").read_text() + (top / "stderr").read_text()
    assert (ended.exit, ended.spawn_error) == (0, None), said
    succeeded = json.loads((top / "stdout").read_text())
    return {row for row, names in rows.items() if set(names.split()) & set(succeeded)}


@pytest.mark.extended_variants
@pytest.mark.parametrize("kind", SandboxKind)
async def test_session_can_do_what_the_table_allows(kind: SandboxKind, outside: dict[str, object]) -> None:
    """Yes where an attempt succeeds, no where it fails, in each kind of sandbox available here."""
    require_sandbox(kind)
    expected = {row: cells[kind] == "yes" for row, cells in table().items()}
    rows = set(ROWS)
    if not Path(str(outside["run_socket"])).is_socket():
        rows.remove("**sockets** of services in `/run`")
    if "NoNewPrivs:\t0" not in Path("/proc/self/status").read_text():  # as in some containers
        rows.remove("**execute** programs with more privileges (setuid)")
    found = await tried(kind, outside, ROWS, network=True)
    assert {row: row in found for row in rows} == {row: expected[row] for row in rows}
    if kind is not SandboxKind.OFF:
        found = await tried(kind, outside, WITHOUT_NETWORK, network=False)
        assert {row: row in found for row in WITHOUT_NETWORK} == {row: expected[row] for row in WITHOUT_NETWORK}
        listed = (f"127.0.0.1:{outside['port']}",)
        found = await tried(kind, outside, WITH_HOSTS, network=False, hosts=listed)
        assert {row: row in found for row in WITH_HOSTS} == {row: expected[row] for row in WITH_HOSTS}
