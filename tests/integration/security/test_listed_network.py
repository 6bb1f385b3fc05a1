"""A session with `network: {allow: [...]}` reaches the listed hosts through its proxy, and nothing else."""

from __future__ import annotations

import http.server
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from orchestrator.client.session import ShortSocketPath
from orchestrator.domain.runs.outcome import ProcessExit
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.settings.run_settings import NetworkSettings, PathAccess, SandboxSettings
from orchestrator.errors import RefusedError
from orchestrator.sandbox import landlock
from orchestrator.sessions.sandbox.policy import SandboxKind, choose_sandbox
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox, SandboxScope
from orchestrator.sessions.setup.shell import CommandFailed, CommandSucceeded, Shell, ShellCommand, ShellResult
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand, run_supervised
from orchestrator.system.process import internal_program_folders
from tests.conftest import Repository
from tests.sandboxes import require_sandbox
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.extended_rest,
    pytest.mark.sandbox,
    pytest.mark.skipif(sys.platform != "linux", reason="there is a sandbox on Linux only"),
]

PATIENCE = 60.0
FETCH = """
import sys, urllib.request, urllib.error
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=20).read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"""
ATTEMPTS = """
import json, os, socket, sys
port, here = int(sys.argv[1]), os.environ["HTTP_PROXY"].rpartition(":")[2]
def connect(*address):
    socket.create_connection(address, timeout=20).close()
def datagram():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53))
def multipath():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as made: made.connect(("127.0.0.1", port))
def fast_open():
    with socket.socket() as made: made.sendto(b"x", 0x20000000, ("127.0.0.1", port))
def fast_open_message():
    with socket.socket() as made: made.sendmsg([b"x"], [], 0x20000000, ("127.0.0.1", port))
def raw():
    socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
def packet():
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)
found = {}
tries = dict(direct=lambda: connect("127.0.0.1", port), six=lambda: connect("::1", port), datagram=datagram, raw=raw,
             public=lambda: connect("192.0.2.1", 443), multipath=multipath, fast_open=fast_open,
             fast_open_message=fast_open_message, packet=packet, proxy=lambda: connect("127.0.0.1", int(here)))
for name, attempt in tries.items():
    try: attempt()
    except OSError: continue
    found[name] = True
print(json.dumps(sorted(found)))
"""


class Page(http.server.BaseHTTPRequestHandler):
    """An HTTP handler that answers every request."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"reached")

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    """Yield the port of a server on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture(params=[SandboxKind.BUBBLEWRAP, SandboxKind.LANDLOCK])
def kind(request: pytest.FixtureRequest) -> SandboxKind:
    """Yield each kind of sandbox available here that can limit the network to hosts."""
    return require_sandbox(request.param, network=False, hosts=("a.example",))


class Workspace:
    """The environment that sessions run in."""

    def __init__(self, top: Path) -> None:
        self.top, self.tree, self.scratch = top, top / "tree", top / "scratch"
        self.tree.mkdir()
        self.denied: list[str] = []

    def sandbox(self, kind: SandboxKind, hosts: tuple[str, ...]) -> RunSandbox:
        config = SandboxSettings(
            network=NetworkSettings(allow=hosts), readable=tuple(map(str, internal_program_folders()))
        )
        return RunSandbox(kind, (), config)

    @property
    def ground(self) -> SandboxScope:
        return SandboxScope((self.tree,), (), self.scratch)

    def command(self, argv: list[str], **env: str) -> SupervisedCommand:
        return SupervisedCommand(
            argv=argv,
            env={"PATH": os.environ["PATH"], **env},
            cwd=self.tree,
            stdin=None,
            stdout=self.top / "stdout",
            stderr=self.top / "stderr",
            cap=1 << 20,
            timeout=PATIENCE,
            grace=5,
            lock=self.top / "task.1.lock",
        )

    async def run(self, kind: SandboxKind, hosts: tuple[str, ...], argv: list[str], **env: str) -> ProcessExit:
        command = self.command(argv, **env)
        async with self.sandbox(kind, hosts).apply(self.ground, command, PathAccess()) as fenced:
            ended = await run_supervised(fenced.command)
        self.denied = list(fenced.denied)
        return ended

    async def shell(self, kind: SandboxKind, hosts: tuple[str, ...], text: str) -> ShellResult:
        environment = {"PATH": os.environ["PATH"]}
        lock = self.top / "check.lock"
        shell = Shell(self.sandbox(kind, hosts), self.ground, self.tree, lock, environment, Redactor({}))
        return await shell.run(ShellCommand(text, self.top / "logs" / "check", PATIENCE, "checks_timeout"))

    @property
    def output(self) -> str:
        return (self.top / "stdout").read_text() + (self.top / "stderr").read_text()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def python(source: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-c", source, *arguments]


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
async def test_listed_host_is_reached(workspace: Workspace, kind: SandboxKind, port: int, name: str) -> None:
    """By a program that reads its proxy from the environment, as most do."""
    ended = await workspace.run(kind, (f"{name}:{port}",), python(FETCH, f"http://{name}:{port}/"))
    assert (ended.exit, ended.spawn_error, workspace.output) == (0, None, "reached\n")
    assert workspace.denied == []


@pytest.mark.parametrize("length", [70, 80, 90, 100, 110, 150])
async def test_folder_with_a_long_path_works(tmp_path: Path, kind: SandboxKind, port: int, length: int) -> None:
    """A socket address is limited to about a hundred bytes; the path of its folder may be longer."""
    top = tmp_path / ("x" * max(1, length - len(str(tmp_path)) - len("/scratch") - 1))
    top.mkdir()
    workspace = Workspace(top)
    ended = await workspace.run(kind, (f"127.0.0.1:{port}",), python(FETCH, f"http://127.0.0.1:{port}/"))
    assert (ended.exit, workspace.output) == (0, "reached\n")


async def test_listed_host_is_reached_by_a_tunnel(workspace: Workspace, kind: SandboxKind, port: int) -> None:
    argv = ["curl", "--silent", "--show-error", "--proxytunnel", f"http://127.0.0.1:{port}/"]
    ended = await workspace.run(kind, (f"127.0.0.1:{port}",), argv)
    assert (ended.exit, workspace.output) == (0, "reached")


async def test_unlisted_host_is_denied(workspace: Workspace, kind: SandboxKind, port: int) -> None:
    """The program gets a message, and the run records the host once."""
    script = f"for _ in 1 2; do curl --silent --noproxy '' http://127.0.0.1:{port}/; done"
    ended = await workspace.run(kind, ("api.example.com",), ["sh", "-c", script])
    assert ended.exit == 0
    assert workspace.output.count(f"127.0.0.1:{port} is not in `network.allow`") == 2
    assert workspace.denied == [f"127.0.0.1:{port}"]


async def test_nothing_is_reached_without_the_proxy(workspace: Workspace, kind: SandboxKind, port: int) -> None:
    """Not by TCP, UDP or raw sockets, nor by kinds of TCP that Landlock does not cover."""
    argv = python(ATTEMPTS, str(port))
    ended = await workspace.run(kind, (f"127.0.0.1:{port}",), argv)
    assert ended.exit == 0, workspace.output
    assert json.loads((workspace.top / "stdout").read_text()) == ["proxy"]


async def test_only_tcp_is_proxied(workspace: Workspace) -> None:
    """No kernel module that Landlock does not cover can be selected instead."""
    source = "import socket; socket.socket().setsockopt(6, 31, b'smc')"
    if landlock.abi_version() < landlock.MIN_ABI_FOR_PORTS:
        pytest.skip("this kernel's Landlock limits no connections")
    await workspace.run(SandboxKind.LANDLOCK, ("api.example.com",), python(source))
    assert "OSError: [Errno 92] Protocol not available" in workspace.output


async def test_session_accepts_no_connections(workspace: Workspace, kind: SandboxKind) -> None:
    """A listening socket is on a loopback of the session, or fails, with or without a port."""
    for source in ("socket.create_server(('127.0.0.1', 0))", "socket.socket().listen()"):
        ended = await workspace.run(kind, ("api.example.com",), python(f"import socket; {source}"))
        assert (ended.exit == 0) == (kind is SandboxKind.BUBBLEWRAP), workspace.output


async def test_program_has_the_token_of_its_session_only(workspace: Workspace, kind: SandboxKind, port: int) -> None:
    """Without the token, or with another one, the proxy rejects the request."""
    script = f"""import os, urllib.request
    url = os.environ["HTTP_PROXY"]
    for proxy in (url, "http://" + url.partition("@")[2], url.replace("@", "x@")):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler(dict(http=proxy)))
        try: print(opener.open("http://127.0.0.1:{port}/", timeout=20).status)
        except urllib.error.HTTPError as error: print(error.code)""".replace("\n    ", "\n")
    await workspace.run(kind, (f"127.0.0.1:{port}",), python(script))
    assert workspace.output == "200\n407\n407\n"
    assert workspace.denied == []


async def test_token_is_in_no_log(workspace: Workspace, kind: SandboxKind, port: int) -> None:
    """Neither in its environment form nor in its request form."""
    script = f"env | grep -i proxy; curl --silent --verbose http://127.0.0.1:{port}/ 2>&1; echo $HTTP_PROXY >kept"
    await workspace.run(kind, (f"127.0.0.1:{port}",), ["sh", "-c", script], NO_PROXY="*", no_proxy="*")
    token = (workspace.tree / "kept").read_text().partition("council:")[2].partition("@")[0]
    assert len(token) == 32
    assert "HTTPS_PROXY=http://council:[redacted]@127.0.0.1:" in workspace.output
    assert "Proxy-Authorization: Basic [redacted]" in workspace.output
    assert token not in workspace.output


async def test_proxy_settings_of_the_user_are_ignored(workspace: Workspace, kind: SandboxKind, port: int) -> None:
    """They could bypass the proxy, so they are not passed on."""
    argv = ["sh", "-c", "echo $HTTP_PROXY $NO_PROXY $no_proxy $NODE_USE_ENV_PROXY | sed 's/.*@//; s/:[0-9]* / /'"]
    hosts = (f"127.0.0.1:{port}", f"[::1]:{port}")
    await workspace.run(kind, hosts, argv, NO_PROXY="*", no_proxy="*", HTTP_PROXY="http://proxy.example:1")
    own = "localhost localhost " if kind is SandboxKind.BUBBLEWRAP else ""
    assert workspace.output == f"127.0.0.1 {own}1\n"


async def test_session_has_its_own_loopback(workspace: Workspace, port: int) -> None:
    """In bubblewrap a session reaches its own server directly, as tests of a project need."""
    require_sandbox(SandboxKind.BUBBLEWRAP, network=False)
    script = "python3 -m http.server 8000 --bind 127.0.0.1 >/dev/null 2>&1 & echo mine >page; "
    script += "curl --silent --retry 50 --retry-connrefused --retry-delay 1 http://127.0.0.1:8000/page"
    await workspace.run(SandboxKind.BUBBLEWRAP, ("api.example.com",), ["sh", "-c", script])
    assert workspace.output == "mine\n"


async def test_proxied_start_is_as_clean_as_without(workspace: Workspace, kind: SandboxKind) -> None:
    """The same descriptors, signals, arguments, folder and environment."""
    source = "import os, sys; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1], os.getcwd(), sys.argv[1:])\n"
    argv = ["sh", "-c", 'grep SigIgn /proc/self/status; exec "$@"', "sh", *python(source, "-x", "")]
    ended = await workspace.run(kind, ("api.example.com",), argv, A="b")
    assert ended.exit == 0, workspace.output
    # Signals from 32 on belong to the C library: programs that it starts by posix_spawn, as make does, ignore them.
    ignored = int(workspace.output.splitlines()[0].removeprefix("SigIgn:"), 16)
    assert ignored & ((1 << 31) - 1) == 0
    assert workspace.output.splitlines()[1] == f"[0, 1, 2] {workspace.tree} ['-x', '']"
    assert not list(workspace.scratch.glob(".council-*"))


async def test_missing_program_is_reported(workspace: Workspace, kind: SandboxKind) -> None:
    """It is distinguished from a failing program, as in each sandbox."""
    ended = await workspace.run(kind, ("api.example.com",), ["no-such-program"])
    assert ended == ProcessExit(None, None, "exit", "no-such-program: No such file or directory", 0, 0, 0, None)
    ended = await workspace.run(kind, ("api.example.com",), ["sh", "-c", "exit 127"])
    assert (ended.exit, ended.spawn_error) == (127, None)


async def test_proxy_ends_with_its_session(workspace: Workspace, kind: SandboxKind) -> None:
    source = """
import os, socket, time
port = int(os.environ["HTTP_PROXY"].rpartition(":")[2]); client = socket.create_connection(("127.0.0.1", port))
open("part", "w").write(str(port)); os.rename("part", "port"); time.sleep(300)"""
    found = workspace.tree / "port"
    async with anyio.create_task_group() as group:
        group.start_soon(workspace.run, kind, ("api.example.com",), python(source))
        await anyio.to_thread.run_sync(wait_for, found.exists)
        group.cancel_scope.cancel()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(found.read_text())))
    assert not list(workspace.scratch.glob(".council-*"))


async def test_proxy_serves_its_session_only(workspace: Workspace, port: int) -> None:
    """A process that answers before the session starts is not accepted; the session gets its own proxy."""
    require_sandbox(SandboxKind.BUBBLEWRAP, network=False)
    hosts = (f"127.0.0.1:{port}",)
    command = workspace.command(python(FETCH, f"http://127.0.0.1:{port}/"))
    fencing = workspace.sandbox(SandboxKind.BUBBLEWRAP, hosts)
    with socket.create_server(("127.0.0.1", 0)) as planted:
        async with fencing.apply(workspace.ground, command, PathAccess()) as fenced:
            (meeting,) = workspace.scratch.glob(".council-*")
            with (
                ShortSocketPath(str(workspace.scratch), meeting.name) as folder,
                socket.socket(socket.AF_UNIX) as intruder,
            ):
                intruder.connect(f"{folder}/{meeting.name}")
                socket.send_fds(intruder, [b"+"], [planted.fileno()])
                with socket.create_connection(planted.getsockname()):
                    ended = await run_supervised(fenced.command)
                    planted.setblocking(False)
                    planted.accept()[0].close()  # although no other process did it
    assert (ended.exit, workspace.output) == (0, "reached\n")


async def test_failed_check_names_the_denied_host(workspace: Workspace, kind: SandboxKind, port: int) -> None:
    url = f"http://127.0.0.1:{port}/"
    assert await workspace.shell(kind, (f"127.0.0.1:{port}",), f"curl --silent --fail {url}") == CommandSucceeded()
    failed = await workspace.shell(kind, ("api.example.com",), f"curl --silent --fail --noproxy '' {url}")
    assert isinstance(failed, CommandFailed)
    assert f"(`network.allow` does not cover 127.0.0.1:{port})" in failed.describe()


@pytest.mark.extended_variants
def test_run_reports_denied_hosts(repository: Repository, kind: SandboxKind, port: int) -> None:
    """Each once, after the session; the session and its checks reach the allowed hosts."""
    fetch = f"curl --silent --show-error --fail --noproxy '' http://127.0.0.1:{port}/ >>page"
    refused = "curl --silent --output answer --noproxy '' http://127.0.0.1:1/ http://127.0.0.1:1/; cat answer"
    shell = {"use": "command", "argv": ["sh", "{prompt_file}"]}
    task = {
        "id": "fetch",
        "prompt": f"{fetch}; {refused}; rm answer",
        "allow_failing_base": True,
        "checks": [f"{fetch}; grep reachedreached page"],
    }
    file = repository.configure(
        [task], adapters={"sh": shell}, sandbox=kind.value, network={"allow": [f"127.0.0.1:{port}"]}
    )
    ended = repository.council("run", str(file), "--json")
    assert ended.states == {"fetch": "landed"}, ended
    reported = [line for line in ended.lines if line.get("event") == "task.host_denied"]
    assert [(line["task"], line["host"]) for line in reported] == [("fetch", "127.0.0.1:1")]


async def test_kernel_without_connection_limits_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a remedy, and only if hosts are listed."""
    monkeypatch.setattr(landlock, "abi_version", lambda: 3)
    with pytest.raises(
        RefusedError, match=r"supports only ABI 3; `network.allow` requires ABI 4 .*`network: off`.*bubblewrap"
    ):
        await choose_sandbox("landlock", network=False, hosts=("a.example",), environ=os.environ)
    with pytest.raises(RefusedError, match=r"`network\.allow` requires ABI 4"):
        await choose_sandbox("auto", network=False, hosts=("a.example",), environ={"PATH": "/nowhere"})
    assert await choose_sandbox("landlock", network=False, environ=os.environ) is SandboxKind.LANDLOCK


async def test_hosts_without_a_sandbox_are_rejected() -> None:
    """A limit that can't be enforced is rejected, as `network: off` is."""
    with pytest.raises(RefusedError, match="`network: off` needs a sandbox"):
        await choose_sandbox("off", network=False, hosts=("a.example",), environ=os.environ)


async def test_landlock_is_used_without_bubblewrap() -> None:
    """If the kernel can limit connections."""
    require_sandbox(SandboxKind.LANDLOCK, network=False, hosts=("a.example",))
    environ = {"PATH": "/nowhere"}
    assert await choose_sandbox("auto", network=False, hosts=("a.example",), environ=environ) is SandboxKind.LANDLOCK
