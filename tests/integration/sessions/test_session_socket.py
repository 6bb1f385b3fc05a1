"""The session socket: reachable in each sandbox, only as its own session, and robust against any input."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from orchestrator.client.commands import MAX_HANDOFF_BYTES, MAX_REQUEST_BYTES
from orchestrator.client.session import SessionConnection
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.settings.run_settings import SandboxSettings
from orchestrator.errors import RefusedError
from orchestrator.locking.file_locks import FileLocks
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.slots import WorktreeSlot
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.sandbox.policy import SandboxKind
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox, SandboxScope
from orchestrator.sessions.socket.listener import SessionSocket, open_session_socket
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand, run_supervised
from orchestrator.system.clock import SystemClock
from tests.fake_session_service import FakeSessionService
from tests.sandboxes import require_sandbox

pytestmark = pytest.mark.sandbox

KINDS = [SandboxKind.BUBBLEWRAP, SandboxKind.LANDLOCK, SandboxKind.OFF]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> SandboxKind:
    """Yield each kind of sandbox available here, and none."""
    return require_sandbox(request.param)


@dataclass
class Site:
    """Sessions of one run, each with its worktree, hidden from each other."""

    hub: Hub
    session_service: FakeSessionService

    def worktree(self, task: str, number: int, attempt: int = 1) -> Worktree:
        """Create the folders of a session."""
        slot = WorktreeSlot(self.hub, number)
        made = Worktree(self.hub, "run-1", task, attempt, held_slot=slot)
        for folder in (made.git_dir, made.tree / "src", self.hub.objects):
            folder.mkdir(parents=True, exist_ok=True)
        (made.tree / ".git").write_text(f"gitdir: {made.git_dir}\n")
        made.prompt_file.write_text("Fix it.")
        return made

    @asynccontextmanager
    async def session(
        self, task: str = "models", number: int = 1, attempt: int = 1
    ) -> AsyncIterator[tuple[Worktree, SessionSocket]]:
        """Open the socket of a session."""
        worktree = self.worktree(task, number, attempt)
        async with open_session_socket(worktree, self.session_service) as session_socket:
            yield worktree, session_socket

    async def run(
        self, kind: SandboxKind, worktree: Worktree, session_socket: SessionSocket, argv: list[str], **changes: Any
    ) -> tuple[int | None, str]:
        """Run a program in the session's sandbox; return its exit code and output."""
        said = [self.hub.root.parent / f"{worktree.task}.{stream}" for stream in ("out", "err")]
        for one in said:
            one.unlink(missing_ok=True)
        command = SupervisedCommand(
            argv=argv,
            env=session_socket.extend_environment({"PATH": os.defpath}),
            cwd=worktree.tree,
            stdin=None,
            stdout=said[0],
            stderr=said[1],
            cap=1 << 20,
            timeout=60,
            grace=5,
            lock=worktree.lock,
        )
        fencing = RunSandbox(kind, (self.hub.root,), SandboxSettings())
        async with fencing.apply(
            SandboxScope.of(worktree), replace(command, **changes), session_socket.reach
        ) as fenced:
            ended = await run_supervised(fenced.command)
        assert ended.spawn_error is None, ended
        return ended.exit, "".join(one.read_text() for one in said)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Return a site whose paths are longer than a socket address may be."""
    hub = Hub(tmp_path / ("a-long-name-" * 10) / "hub")
    hub.root.mkdir(parents=True)
    return Site(hub, FakeSessionService())


# From inside


@pytest.mark.extended_variants
async def test_sandboxed_program_requests_as_the_session(site: Site, kind: SandboxKind) -> None:
    """`council` is found, and needs no option to identify the session."""
    async with site.session() as (worktree, session_socket):
        assert await site.run(kind, worktree, session_socket, ["council", "lock", "src/a.py", "./src/../b.py"]) == (
            0,
            "locked: src/a.py, b.py\n",
        )
        code, said = await site.run(kind, worktree, session_socket, ["council", "peers", "--json"])
    assert code == 0, said
    (peer,) = json.loads(said)["peers"]
    assert (peer["task"], peer["files"], peer["is_me"]) == ("models", ["src/a.py", "b.py"], True)
    assert {str(session) for session, _, _ in site.session_service.asked} == {"run-1/models.1"}


async def test_council_starts_in_a_sandbox_for_any_python(
    site: Site, kind: SandboxKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a Python that was typed with `..` may lead through folders hidden from the session."""
    hidden = site.hub.root / "hidden"
    hidden.mkdir()
    for name in ("executable", "prefix", "base_prefix"):
        monkeypatch.setattr(sys, name, f"{hidden}/{os.path.relpath(getattr(sys, name), hidden)}")
    async with site.session() as (worktree, session_socket):
        assert await site.run(kind, worktree, session_socket, ["council", "lock", "a.py"]) == (0, "locked: a.py\n")


@pytest.mark.extended_variants
async def test_sandboxed_program_submits_a_handoff_and_shares(site: Site, kind: SandboxKind) -> None:
    """From a file, and from an argument; a missing file is reported."""
    async with site.session() as (worktree, session_socket):
        (worktree.tree / "plan.json").write_text('{"tasks": []}')
        argv = ["council", "submit-handoff", "../tree/plan.json"]
        assert await site.run(kind, worktree, session_socket, argv) == (0, "handoff accepted: 2 bytes\n")
        code, said = await site.run(kind, worktree, session_socket, ["council", "submit-handoff", "none.json"])
        assert (code, "can't read none.json" in said) == (2, True)
        put = ["council", "share", "put", "api/ports", '[1, "two"]']
        assert await site.run(kind, worktree, session_socket, put) == (0, "shared api/ports: version 1\n")
        code, said = await site.run(kind, worktree, session_socket, ["council", "share", "get", "api/ports", "--json"])
    assert (code, json.loads(said)["value"]) == (0, [1, "two"])
    assert site.session_service.handed_over == [{"tasks": []}]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["council", "slot", "--", "sh", "-c", "exit 5"], 5),  # in the same slot
        pytest.param(["missing-program"], 127, marks=pytest.mark.extended),
        pytest.param(["."], 126, marks=pytest.mark.extended),
    ],
)
async def test_slot_passes_on_the_exit_code(site: Site, argv: list[str], expected: int) -> None:
    async with site.session() as (worktree, session_socket):
        assert (await site.run(SandboxKind.OFF, worktree, session_socket, ["council", "slot", "--", *argv]))[
            0
        ] == expected
    assert [command for _, command, _ in site.session_service.asked] == ["hold_slot"]


@pytest.mark.extended_variants
async def test_killed_command_releases_its_slot(site: Site, kind: SandboxKind) -> None:
    """The next session waits for it, and gets it while the first session still runs."""
    slots, ended = site.session_service.slots, list[int | None]()
    wait = "while ! test -e {}; do sleep 0.02; done"
    hold = "council slot -- sh -c 'echo made > held; exec sleep 600' &"
    script = f"{hold} {wait.format('kill')}; kill -9 $!; {wait.format('end')}"

    async def run_second(worktree: Worktree, session_socket: SessionSocket) -> None:
        code, _ = await site.run(kind, worktree, session_socket, ["council", "slot", "--", "true"])
        ended.append(code)

    async with (
        site.session() as (first, first_socket),
        site.session("api", 2) as (second, second_socket),
        anyio.create_task_group() as group,
    ):
        group.start_soon(site.run, kind, first, first_socket, ["sh", "-c", script])
        while not (first.tree / "held").exists():
            await anyio.sleep(0.01)
        group.start_soon(run_second, second, second_socket)
        while not slots.statistics().tasks_waiting:
            await anyio.sleep(0.01)
        assert ended == []
        (first.tree / "kill").touch()
        while not ended:
            await anyio.sleep(0.01)
        (first.tree / "end").touch()
    assert ended == [0]
    assert slots.borrowed_tokens == 0


async def test_session_is_found_without_a_variable(site: Site, kind: SandboxKind) -> None:
    """A CLI may not pass its variables to its tools, or may set them to a subfolder."""
    async with site.session() as (worktree, session_socket):
        argv = [sys.executable, "-P", "-m", "orchestrator", "lock", "a.py"]
        code, said = await site.run(
            kind, worktree, session_socket, argv, env={"PATH": os.defpath}, cwd=worktree.tree / "src"
        )
    assert (code, said) == (0, "locked: src/a.py\n")


@pytest.mark.extended
async def test_user_command_in_a_session_is_refused_with_those_of_sessions(site: Site) -> None:
    """The error for users would send an agent to another folder."""
    async with site.session() as (worktree, session_socket):
        code, said = await site.run(SandboxKind.OFF, worktree, session_socket, ["council", "status", "--json"])
    assert code == 2
    assert json.loads(said.splitlines()[-1])["error"] == "sessions have no access to the state of runs"


async def test_file_owned_by_another_is_rejected_with_its_owner(site: Site) -> None:
    """The exit code distinguishes a rejection from a mistake."""
    async with site.session() as (first, _), site.session("api", 2) as (second, session_socket):
        async with site.session("docs", 3) as (third, thirds):
            assert (await site.run(SandboxKind.OFF, third, thirds, ["council", "lock", "a.py"]))[0] == 0
            code, said = await site.run(SandboxKind.OFF, second, session_socket, ["council", "lock", "a.py", "--json"])
        assert first.socket_folder.is_dir()
    assert code == 1
    reported = json.loads(said)
    assert reported["status"] == "refused"
    assert "run-1/docs.1" in reported["error"]
    assert reported["exit"] == 1


INTRUDE = """
import json, socket, sys
folder, token = sys.argv[1:]
try:
    found = open(folder + "/session.json").read()
except OSError as error:
    found = ""
try:
    import os
    there = os.open(folder, os.O_PATH)
    one = socket.socket(socket.AF_UNIX)
    one.settimeout(10)
    one.connect(f"/proc/self/fd/{there}/socket")
    one.sendall(json.dumps({"token": token, "command": "peers", "arguments": {}}).encode() + b"\\n")
    said = one.makefile().readline()
except OSError as error:
    said = ""
print(json.dumps({"card": bool(found), "said": said}))
"""


async def test_socket_of_another_session_is_unusable(site: Site, kind: SandboxKind) -> None:
    """A sandbox hides it; where it can be reached, the token of another session is rejected."""
    async with site.session() as (first, session_socket), site.session("api", 2) as (second, _):
        token = json.loads((first.socket_folder / "session.json").read_text())["token"]
        argv = [sys.executable, "-I", "-S", "-c", INTRUDE, str(second.socket_folder), token]
        code, said = await site.run(kind, first, session_socket, argv)
    assert code == 0, said
    found = json.loads(said)
    assert found["card"] is (kind is SandboxKind.OFF)
    if kind is SandboxKind.BUBBLEWRAP:
        assert found["said"] == ""
    else:
        assert "not from this session" in json.loads(found["said"])["error"]
    assert site.session_service.asked == []


@asynccontextmanager
async def busy(site: Site, kind: SandboxKind, worktree: Worktree, session_socket: SessionSocket) -> AsyncIterator[None]:
    """Run a program in a session during the body."""
    (worktree.tree / "end").unlink(missing_ok=True)
    source = "import os, time\nopen('begun', 'w')\nwhile not os.path.exists('end'): time.sleep(0.01)"
    argv = [sys.executable, "-I", "-S", "-c", source]
    async with anyio.create_task_group() as group:
        group.start_soon(site.run, kind, worktree, session_socket, argv)
        with anyio.fail_after(20):
            while not (worktree.tree / "begun").exists():
                await anyio.sleep(0.01)
        yield
        (worktree.tree / "end").touch()


@pytest.mark.extended_variants
async def test_stolen_token_is_unusable_for_another_session(site: Site, kind: SandboxKind) -> None:
    """The kernel names the connecting process, which is no descendant of the supervisor of the token's session."""
    async with site.session() as (first, session_socket), site.session("api", 2) as (second, others):
        stolen = json.loads((second.socket_folder / "session.json").read_text())["token"]
        async with busy(site, kind, second, others):
            argv = [sys.executable, "-I", "-S", "-c", INTRUDE, str(second.socket_folder), stolen]
            code, said = await site.run(kind, first, session_socket, argv)
            assert code == 0, said
            found = json.loads(said)
            if kind is SandboxKind.BUBBLEWRAP:
                assert found["said"] == ""
            else:
                assert "not from this session" in json.loads(found["said"])["error"]
            # Nor for a process of the user that no session started.
            done = await anyio.to_thread.run_sync(lambda: subprocess.run(argv, capture_output=True, check=True))
            assert "not from this session" in json.loads(json.loads(done.stdout)["said"])["error"]
    assert site.session_service.asked == []


DAEMON = """
import os, subprocess, sys, time
if os.fork() == 0:
    first = os.getpid()
    os.setsid()
    if os.fork() == 0:
        while os.getppid() == first:
            time.sleep(0.01)
        done = subprocess.run(["council", "lock", "a.py"], capture_output=True, text=True)
        with open("aside", "w") as file:
            file.write(done.stdout + done.stderr)
        os.rename("aside", "told")
        os._exit(0)
    os._exit(0)
os.wait()
end = time.monotonic() + 20
while not os.path.exists("told") and time.monotonic() < end:
    time.sleep(0.01)
"""


async def test_daemon_requests_as_the_session(site: Site, kind: SandboxKind) -> None:
    """Its parents have ended; its parent is the supervisor, or the init process in bubblewrap."""
    async with site.session() as (worktree, session_socket):
        code, said = await site.run(kind, worktree, session_socket, [sys.executable, "-I", "-S", "-c", DAEMON])
        assert (code, said) == (0, "")
        assert (worktree.tree / "told").read_text() == "locked: a.py\n"


async def test_strangers_take_no_slot_of_the_session(site: Site) -> None:
    """However many connect and send nothing, with another session's token or without."""
    async with site.session() as (worktree, session_socket):
        strangers: list[socket.socket] = []
        try:
            for _ in range(100):
                one = socket.socket(socket.AF_UNIX)
                one.setblocking(False)
                strangers.append(one)
                there = os.open(worktree.socket_folder, os.O_RDONLY)
                with suppress(BlockingIOError):
                    one.connect(f"/proc/self/fd/{there}/socket")
                os.close(there)
            start = time.monotonic()
            argv = ["council", "lock", "a.py"]
            assert await site.run(SandboxKind.OFF, worktree, session_socket, argv) == (0, "locked: a.py\n")
            assert time.monotonic() - start < 4
        finally:
            for one in strangers:
                one.close()


@pytest.mark.extended_variants
async def test_token_of_an_ended_attempt_is_rejected(site: Site, kind: SandboxKind) -> None:
    """By the socket of the next attempt and of another task; its own socket is gone."""
    async with site.session() as (over, _):
        token = json.loads((over.socket_folder / "session.json").read_text())["token"]
    async with site.session(number=2, attempt=2) as (again, session_socket), site.session("api", 3) as (other, _):
        said = {}
        for one in (again, other, over):
            argv = [sys.executable, "-I", "-S", "-c", INTRUDE, str(one.socket_folder), token]
            code, reported = await site.run(kind, again, session_socket, argv)
            assert code == 0, reported
            said[one.name] = json.loads(reported)["said"]
    assert "not from this session" in said[again.name]
    assert said[other.name] == "" if kind is SandboxKind.BUBBLEWRAP else "not from this session" in said[other.name]
    assert said[over.name] == ""
    assert site.session_service.asked == []


async def test_edit_hook_works_in_each_sandbox(site: Site, kind: SandboxKind) -> None:
    """As the CLI starts it there; if a sandbox blocked its request, every edit would be allowed."""
    site.session_service.foreign_owners["src/theirs.py"] = "run-0/other.1"
    async with site.session() as (worktree, session_socket):
        tool = {"file_path": "src/theirs.py"}
        reported = {"hook_event_name": "PreToolUse", "cwd": str(worktree.tree), "tool_input": tool}
        worktree.prompt_file.write_text(json.dumps(reported))
        code, said = await site.run(
            kind, worktree, session_socket, list(session_socket.hook("pre-edit")), stdin=worktree.prompt_file
        )
    assert (code, json.loads(said)["hookSpecificOutput"]["permissionDecision"]) == (0, "deny")


async def test_end_of_a_session_closes_its_socket(site: Site) -> None:
    """Later requests get an error, and an exception of the body is raised unchanged."""
    with pytest.raises(KeyError, match="as it is"):
        async with site.session() as (worktree, session_socket):
            raise KeyError("as it is")
    assert not worktree.socket_folder.exists()
    argv = [sys.executable, "-P", "-m", "orchestrator", "peers"]
    code, said = await site.run(SandboxKind.OFF, worktree, session_socket, argv)
    assert code == 2
    assert "not in the worktree of an active session" in said


def test_command_outside_of_a_session_has_a_remedy(tmp_path: Path) -> None:
    argv = [sys.executable, "-P", "-m", "orchestrator", "peers"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not in the worktree of an active session" in done.stderr
    reported = subprocess.run([*argv, "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert json.loads(reported.stdout)["exit"] == 2


# Any input


class Caller:
    """A client that bypasses ours; its process holds the session lock like a supervisor."""

    def __init__(self, worktree: Worktree) -> None:
        self.folder = worktree.socket_folder
        lock = os.open(worktree.lock, os.O_RDWR | os.O_CREAT)
        weakref.finalize(self, os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(lock, json.dumps({"pid": os.getpid()}).encode())
        self.token = json.loads((self.folder / "session.json").read_text())["token"]

    def connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(20)
        there = os.open(self.folder, os.O_RDONLY)
        try:
            made.connect(f"/proc/self/fd/{there}/socket")
        finally:
            os.close(there)
        return made

    def line(self, command: Any, **arguments: Any) -> bytes:
        return json.dumps({"token": self.token, "command": command, "arguments": arguments}).encode() + b"\n"

    def say(self, data: bytes) -> dict[str, Any]:
        with self.connect() as one, one.makefile() as answers:
            one.sendall(data)
            answer: dict[str, Any] = json.loads(answers.readline())
            return answer


ODD = [
    b"\n",
    b"hello\n",
    b"null\n",
    b"[]\n",
    b"{}\n",
    b"\xff\xfe\n",
    b"[" * 50_000 + b"\n",
    b'{"token": null, "command": "peers", "arguments": {}}\n',
    b'{"token": "\xc3\xa9", "command": "peers", "arguments": {}}\n',
    b'{"command": "peers", "arguments": {}}\n',
]
REFUSED: list[tuple[Any, dict[str, Any]]] = [
    ("shutdown", {}),
    (["peers"], {}),
    ("peers", {"session": "run-1/api.1"}),
    ("lock", {}),
    ("lock", {"paths": "src"}),
    ("lock", {"paths": []}),
    ("lock", {"paths": [1]}),
    ("lock", {"paths": ["../other"]}),
    ("lock", {"paths": ["/etc/passwd"]}),
    ("lock", {"paths": ["."]}),
    ("lock", {"paths": ["a\0b"]}),
    ("lock", {"paths": ["\ud800"]}),
    ("lock", {"paths": ["x" * 5000]}),
    ("lock", {"paths": ["a"], "wait": -1}),
    ("lock", {"paths": ["a"], "wait": True}),
    ("lock", {"paths": ["a"], "wait": float("nan")}),
    ("lock", {"paths": ["a"], "wait": 1e9}),
    ("lock", {"paths": ["a"], "wait": 10**400}),
    ("report", {"status": "asleep"}),
    ("note", {"text": " "}),
    ("share_put", {"key": "k"}),
    ("share_put", {"key": "k", "value": float("inf")}),
    ("share_put", {"key": "k", "value": ["\ud800"]}),
    ("share_put", {"key": "k", "value": {"a\0": 1}}),
    ("share_put", {"key": "k", "value": 1, "if_version": -1}),
    ("share_put", {"key": "k", "value": 1, "if_version": 1.0}),
    ("share_wait", {"key": "k", "after": True}),
    ("share_wait", {"key": "k", "timeout": 601}),
    ("submit_handoff", {"data": None}),
    ("submit_handoff", {"data": [1]}),
    ("submit_handoff", {"data": "[1]"}),
    ("submit_handoff", {"data": '{"a": NaN}'}),
    ("submit_handoff", {"data": {"a": float("nan")}}),
]


async def test_invalid_requests_are_rejected(site: Site) -> None:
    """Each gets an answer with the remedy, and so does the next request."""
    async with site.session() as (worktree, session_socket):
        caller = Caller(worktree)
        for data in ODD:
            answer = await anyio.to_thread.run_sync(caller.say, data)
            assert (answer["ok"], bool(answer["remedy"])) == (False, True), data
        for command, arguments in REFUSED:
            answer = await anyio.to_thread.run_sync(caller.say, caller.line(command, **arguments))
            assert (answer["ok"], bool(answer["remedy"])) == (False, True), (command, arguments)
        assert site.session_service.asked == []
        inside = caller.line("lock", paths=[str(worktree.tree / "src" / "a.py")])
        assert await anyio.to_thread.run_sync(caller.say, inside) == {"ok": True, "result": {"locked": ["src/a.py"]}}
    assert session_socket.faults == []


async def test_largest_handoff_fits_into_a_request(site: Site) -> None:
    """Whatever its characters; an object that a model wrote as text is also accepted."""
    largest = {"a": "ä" * (MAX_HANDOFF_BYTES // 2 - 4)}
    async with site.session() as (worktree, _):
        caller = Caller(worktree)
        session = SessionConnection(str(worktree.socket_folder), caller.token, str(worktree.tree))
        assert await anyio.to_thread.run_sync(session.ask, "submit_handoff", {"data": largest}) == {"size": 2}
        await anyio.to_thread.run_sync(session.ask, "submit_handoff", {"data": '{"b": [null]}'})
        await anyio.to_thread.run_sync(session.ask, "share_put", {"key": "k", "value": None})
    assert site.session_service.handed_over == [largest, {"b": [None]}]
    assert site.session_service.shared == {"k": None}


async def test_oversized_request_is_rejected(site: Site) -> None:
    """Without reading all of it."""
    async with site.session() as (worktree, _):
        caller = Caller(worktree)
        answer = await anyio.to_thread.run_sync(caller.say, b"x" * (MAX_REQUEST_BYTES + 1))
        assert "larger than" in answer["error"]
        assert (await anyio.to_thread.run_sync(caller.say, caller.line("peers")))["ok"] is True


async def test_too_long_arguments_are_rejected(site: Site) -> None:
    """And not reported as a missing answer; JSON escapes make arguments longer."""
    async with site.session() as (worktree, session_socket):
        argv = ["council", "lock", *(f"{number}{'x' * 2000}" for number in range(600))]
        code, said = await site.run(SandboxKind.OFF, worktree, session_socket, argv)
    assert (code, f"exceeds the limit of {MAX_REQUEST_BYTES}: send a smaller request" in said) == (1, True), said


async def test_error_of_the_session_api_is_reported_and_logged(site: Site) -> None:
    async with site.session() as (worktree, session_socket):
        caller = Caller(worktree)
        answer = await anyio.to_thread.run_sync(caller.say, caller.line("lock", paths=["fault"]))
        assert (answer["ok"], "internal error" in answer["error"]) == (False, True)
        assert (await anyio.to_thread.run_sync(caller.say, caller.line("peers")))["ok"] is True
    assert session_socket.faults == ["ZeroDivisionError: an error of the session API"]


async def test_disconnected_client_gets_no_response(site: Site) -> None:
    async with site.session() as (worktree, _):
        caller = Caller(worktree)
        with caller.connect() as one:
            one.sendall(caller.line("lock", paths=["never"]))
            with anyio.fail_after(10):
                while not site.session_service.asked:
                    await anyio.sleep(0)
        with anyio.fail_after(10):
            while not site.session_service.left:
                await anyio.sleep(0)


async def test_thousand_silent_clients_do_no_harm(site: Site) -> None:
    """Requests are answered at once in this and other sessions; only a few silent connections are kept."""
    async with site.session() as (worktree, _), site.session("api", 2) as (other, _):
        caller, neighbour = Caller(worktree), Caller(other)
        idle: list[socket.socket] = []
        try:
            for _number in range(1000):
                one = socket.socket(socket.AF_UNIX)
                one.setblocking(False)
                idle.append(one)
                there = os.open(caller.folder, os.O_RDONLY)
                with suppress(BlockingIOError):  # the kernel's backlog is full
                    one.connect(f"/proc/self/fd/{there}/socket")
                    one.send(b"{")
                os.close(there)
            for asking in (neighbour, caller):
                start = time.monotonic()
                ours = SessionConnection(str(asking.folder), asking.token, "/")
                assert (await anyio.to_thread.run_sync(ours.ask, "peers", {}))["peers"]
                assert time.monotonic() - start < 10
        finally:
            for one in idle:
                one.close()


async def test_clients_above_the_limit_are_asked_to_retry(site: Site) -> None:
    async with site.session() as (worktree, _):
        caller = Caller(worktree)
        waiting = []
        try:
            for number in range(32):
                waiting.append(caller.connect())
                waiting[-1].sendall(caller.line("lock", paths=["never"]))
                with anyio.fail_after(10):
                    while len(site.session_service.asked) <= number:
                        await anyio.sleep(0)
            answer = await anyio.to_thread.run_sync(caller.say, caller.line("peers"))
            assert "32 requests of this session" in answer["error"]
        finally:
            for one in waiting:
                one.close()


@pytest.mark.extended
async def test_incomplete_line_is_ignored(site: Site) -> None:
    """The connection is closed after a while, without an answer."""
    async with site.session() as (worktree, _):
        caller = Caller(worktree)

        def wait() -> bytes:
            with caller.connect() as one:
                one.sendall(caller.line("peers")[:-1])
                return one.recv(100)

        assert await anyio.to_thread.run_sync(wait) == b""
    assert site.session_service.asked == []


# The hook before an edit

CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("PreToolUse", {"file_path": "{tree}/src/theirs.py", "content": "x"}, "Claude Code's Write"),
    ("PreToolUse", {"notebook_path": "{tree}/src/theirs.py"}, "Claude Code's NotebookEdit"),
    ("BeforeTool", {"file_path": "src/theirs.py", "old_string": "a"}, "Gemini CLI's replace"),
    ("PreToolUse", {"command": "*** Begin Patch\n*** Update File: src/theirs.py\n@@\n*** End Patch"}, "a patch"),
    ("PreToolUse", {"filePath": "{tree}/src/theirs.py"}, "opencode's write"),
    ("PreToolUse", {"patchText": "*** Begin Patch\n*** Delete File: src/theirs.py\n*** End Patch"}, "opencode's patch"),
    ("PreToolUse", {"file_path": "{tree}/src/link.py"}, "through a link"),
]


@pytest.mark.parametrize(("event", "given", "what"), CALLS, ids=[what for _, _, what in CALLS])
async def test_edit_of_a_file_locked_by_another_session_is_denied(
    site: Site, event: str, given: dict[str, Any], what: str
) -> None:
    """In the format of the CLI, with the owner; other files may be edited, with the pending warning."""
    site.session_service.foreign_owners["src/theirs.py"] = "run-0/other.1"
    async with site.session() as (worktree, session_socket):
        (worktree.tree / "src" / "link.py").symlink_to("theirs.py")

        async def call(given: dict[str, Any]) -> str:
            put = {key: value.replace("{tree}", str(worktree.tree)) for key, value in given.items()}
            reported = {"hook_event_name": event, "cwd": str(worktree.tree), "tool_name": "Write", "tool_input": put}
            worktree.prompt_file.write_text(json.dumps(reported))
            code, said = await site.run(
                SandboxKind.OFF,
                worktree,
                session_socket,
                list(session_socket.hook("pre-edit")),
                stdin=worktree.prompt_file,
            )
            assert code == 0
            return said

        denied = json.loads(await call(given))
        assert await call({"file_path": "src/ours.py"}) == ""
        assert await call({"file_path": "/etc/passwd"}) == ""
        site.session_service.warning = "conflict ahead"
        warned = await call({"file_path": "src/ours.py"})
    if event == "BeforeTool":
        assert denied["decision"] == "deny"
        reason = denied["reason"]
        assert warned == "", "this CLI has no warnings"
    else:
        assert json.loads(warned) == {
            "hookSpecificOutput": {"hookEventName": "PreToolUse", "additionalContext": "conflict ahead"}
        }
        assert denied["hookSpecificOutput"]["permissionDecision"] == "deny"
        assert denied["hookSpecificOutput"]["hookEventName"] == "PreToolUse"
        reason = denied["hookSpecificOutput"]["permissionDecisionReason"]
    assert "src/theirs.py belongs to run-0/other.1" in reason


async def test_hook_after_a_tool_call_returns_an_announced_message(site: Site, kind: SandboxKind) -> None:
    """Without an announcement, and for a subagent, it makes no request."""
    site.session_service.message = "be quick"
    async with site.session() as (worktree, session_socket):

        async def call(**fields: Any) -> str:
            reported = {"hook_event_name": "PostToolUse", "cwd": str(worktree.tree), "tool_name": "Bash", **fields}
            worktree.prompt_file.write_text(json.dumps(reported))
            argv = list(session_socket.hook("post-tool"))
            code, said = await site.run(kind, worktree, session_socket, argv, stdin=worktree.prompt_file)
            assert code == 0
            return said

        assert await call() == ""
        worktree.message_file.touch()
        assert await call(agent_id="a1") == ""
        assert site.session_service.asked == []
        answer = json.loads(await call())
    assert answer == {"hookSpecificOutput": {"hookEventName": "PostToolUse", "additionalContext": "be quick"}}


async def test_hook_without_an_orchestrator_allows(site: Site) -> None:
    """The landing checks again; other commands report the missing answer."""
    site.session_service.foreign_owners["src/theirs.py"] = "run-0/other.1"
    async with site.session() as (worktree, session_socket):
        (worktree.socket_folder / "socket").unlink()
        tool = {"file_path": "src/theirs.py"}
        reported = {"hook_event_name": "PreToolUse", "cwd": str(worktree.tree), "tool_input": tool}
        worktree.prompt_file.write_text(json.dumps(reported))
        ended = await site.run(
            SandboxKind.OFF, worktree, session_socket, list(session_socket.hook("pre-edit")), stdin=worktree.prompt_file
        )
        assert ended == (0, "")
        code, said = await site.run(SandboxKind.OFF, worktree, session_socket, ["council", "peers"])
    assert (code, "does not answer" in said) == (2, True)


async def test_request_without_descriptors_waits(site: Site) -> None:
    """Sessions that use up our descriptors end neither this process nor other sessions; it answers later."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = "import socket,sys; s=socket.socket(socket.AF_UNIX); sys.stdin.readline(); s.connect(sys.argv[1])\n"
    code += "s.sendall(sys.argv[2].encode()); print('sent', flush=True); print(s.makefile().readline(), flush=True)"
    async with site.session() as (worktree, _):
        caller = Caller(worktree)
        argv = [sys.executable, "-c", code, "socket", caller.line("peers").decode()]
        async with await anyio.open_process(argv, cwd=caller.folder) as asking:
            assert asking.stdin is not None
            assert asking.stdout is not None
            said = BufferedByteReceiveStream(asking.stdout)
            full = list[int]()
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 64, hard))  # noqa: PTH208  names
                with suppress(OSError):
                    while True:
                        full.append(os.open(os.devnull, os.O_RDONLY))
                await asking.stdin.send(b"\n")
                assert await said.receive_until(b"\n", 100) == b"sent"
                await anyio.wait_all_tasks_blocked()
            finally:
                for descriptor in full:
                    os.close(descriptor)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            answer = json.loads(await said.receive_until(b"\n", 10_000))
    assert answer["ok"] is True


def test_lock_takes_no_last_descriptor(tmp_path: Path) -> None:
    """A reserve is kept for everything else."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def lock() -> None:
        await FileLocks(tmp_path / "locks", SystemClock()).acquire(
            SessionName("r", "t", 1), [f"{n}" for n in range(40)]
        )

    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 64, hard))  # noqa: PTH208  names
        with pytest.raises(RefusedError, match="can't take 40 more locks"):
            anyio.run(lock)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
