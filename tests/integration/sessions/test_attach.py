"""A user attaches to the conversation of a task from a terminal (`council attach`)."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from orchestrator.sessions.sandbox.policy import SandboxKind
from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.fakes.claude import SESSION
from tests.fakes.script import ROOT
from tests.sandboxes import SANDBOX_PARAMS, WORKING_SANDBOXES
from tests.terminal import Terminal
from tests.waiting import wait_for

#: Failpoints that the process of an attaching user reaches before the CLI runs.
BEFORE_CONVERSATION = {"attachment.recorded", "attempt.recorded", "worktree.created", "session.spawned"}


def configured(claude: Repository, prompt: str, task: Mapping[str, Any] = MappingProxyType({}), **more: Any) -> Path:
    """Write a file with one task for the fake `claude`."""
    return claude.configure(
        [{"id": "one", "prompt": prompt, "attempts": 2, **task}],
        adapters={"claude": {"use": "claude-code"}},
        readable=[str(claude.top.parent / "bin"), sys.prefix, str(ROOT / "tests")],
        **{"sandbox": "off", **more},
    )


@contextmanager
def waiting_session(claude: Repository, prompt: str, **more: Any) -> Iterator[StartedCommand]:
    """Start a run whose first session writes a file, then waits until it is stopped."""
    started = claude.top / ".council/logs"
    path = configured(claude, f"write first.txt 1\nattempt 1 hang\n{prompt}", **more)
    with claude.start("run", str(path), "--json") as child:
        wait_for(lambda: any("first.txt" in log.read_text() for log in started.glob("*/one.1.stdout")), 60)
        yield child


@pytest.fixture
def attach(claude: Repository) -> Iterator[Callable[..., Terminal]]:
    """Return a function that attaches to the task, and waits for its conversation."""
    terminals = list[Terminal]()

    def start(*options: str) -> Terminal:
        terminal = Terminal(["attach", "one", *options], claude.top, claude.environ)
        terminals.append(terminal)
        wait_for(lambda: f"resumed {SESSION}" in terminal.text or not terminal.is_running, 60)
        assert terminal.is_running, terminal.text
        return terminal

    yield start
    for terminal in terminals:
        terminal.close()


def sessions(claude: Repository) -> list[dict[str, Any]]:
    """Return the sessions of the task."""
    found: list[dict[str, Any]] = claude.council("show", "one", "--json").result["sessions"]
    return found


def outcomes(claude: Repository) -> list[tuple[str, bool, bool]]:
    """Return the outcome of each attempt, whether it continued a conversation, and whether a user had it."""
    return [(one["outcome"], one["resumed"], one["attached"]) for one in sessions(claude)]


def run_command(terminal: Terminal, line: str) -> int:
    """Run a shell command in the session of the user; return its exit code."""
    say(terminal, f"run {line}")
    return int(re.findall(r"^exit (\d+)", terminal.text, re.MULTILINE)[-1])


def say(terminal: Terminal, line: str) -> None:
    """Type a line, and wait for the end of the turn."""
    before = terminal.text.count("ready")
    terminal.type(f"{line}\r")
    wait_for(lambda: terminal.text.count("ready") > before, 60)


@pytest.mark.parametrize("sandbox", SANDBOX_PARAMS)
async def test_user_finishes_the_work_of_a_running_session(
    claude: Repository, attach: Callable[..., Terminal], sandbox: str
) -> None:
    """It is stopped; the user continues its conversation in its worktree and sandbox, and the work lands."""
    with waiting_session(claude, "", sandbox=sandbox) as child:
        terminal = attach()
        say(terminal, "write second.txt 2")
        terminal.resize(90, 20)
        say(terminal, "size")
        assert "size 90 20" in terminal.text
        terminal.type("leave\r")
        wait_for(lambda: "Is task one complete?" in terminal.text, 60)
        terminal.type("y\r")
        assert terminal.wait() == 0, terminal.text
        assert child.wait(60) == 0
    assert claude.git("show", "main:first.txt", "main:second.txt") == "1\n2"
    assert outcomes(claude) == [("paused", False, False), ("built", True, True)]
    first, second = sessions(claude)
    assert first["session"] == second["session"] == SESSION
    await claude.assert_invariants()


@pytest.mark.extended_rest
@pytest.mark.parametrize("sandbox", [kind for kind in WORKING_SANDBOXES if kind is not SandboxKind.OFF])
async def test_attached_session_has_the_sandbox_of_other_sessions(
    claude: Repository, attach: Callable[..., Terminal], sandbox: str
) -> None:
    """The user's CLI can neither change the checkout nor read the state; it can change its worktree."""
    evil, log = claude.top / "evil.txt", claude.top / ".git/config"
    with waiting_session(claude, "", sandbox=sandbox) as child:
        terminal = attach("--then", "land")
        say(terminal, f"run echo x > {evil}")
        assert run_command(terminal, f"cat {log}") != 0
        assert run_command(terminal, f"git push {claude.top} HEAD:refs/heads/evil") != 0
        assert run_command(terminal, "echo 2 > second.txt") == 0
        terminal.type("leave\r")
        assert terminal.wait() == 0, terminal.text
        assert child.wait(60) == 0
    assert not evil.exists()
    assert claude.git("branch", "--list", "evil") == ""
    assert claude.git("show", "main:second.txt") == "2"
    await claude.assert_invariants()


@pytest.mark.extended_rest
async def test_attached_work_is_checked_like_that_of_other_sessions(
    claude: Repository, attach: Callable[..., Terminal]
) -> None:
    """Although the user says that the task is complete."""
    with waiting_session(claude, "", task={"checks": ["test ! -e second.txt"]}) as child:
        terminal = attach("--then", "land")
        say(terminal, "write second.txt 2")
        terminal.type("leave\r")
        terminal.wait()
        child.wait(60)
    assert "second.txt" not in claude.git("ls-tree", "--name-only", "main")
    assert "exit code 1" in sessions(claude)[1]["reason"]
    await claude.assert_invariants()


@pytest.mark.extended_rest
@pytest.mark.parametrize(
    "name",
    [
        "attachment.recorded",
        "attempt.recorded",
        "worktree.created",
        "session.spawned",
        "session.ended",
        "work.recorded",
    ],
)
async def test_attach_killed_at_a_failpoint_loses_nothing(claude: Repository, name: str) -> None:
    """The run continues the task, with the work of the session that was stopped for the user."""
    # Without a session that was stopped for the user, the first one continues, up to its limit.
    limit = {"timeout": "20s"} if name == "attachment.recorded" else {}
    with waiting_session(claude, "attempt 2 write first.txt 1", task=limit) as child:
        environ = {**claude.environ, "COUNCIL_FAILPOINTS": f"{name}=kill"}
        terminal = Terminal(["attach", "one", "--then", "land"], claude.top, environ)
        if name not in BEFORE_CONVERSATION:
            wait_for(lambda: f"resumed {SESSION}" in terminal.text, 60)
            terminal.type("write second.txt 2\rleave\r")
        assert terminal.wait() == -signal.SIGKILL, terminal.text
        terminal.close()
        assert child.wait(60) == 0
    assert claude.git("show", "main:first.txt") == "1"
    if name not in BEFORE_CONVERSATION:
        assert claude.git("show", "main:second.txt") == "2"
    await claude.assert_invariants()


@pytest.mark.extended_rest
async def test_next_session_continues_the_work_of_the_user(claude: Repository, attach: Callable[..., Terminal]) -> None:
    """And the conversation."""
    with waiting_session(claude, "") as child:
        terminal = attach("--then", "continue")
        say(terminal, "write second.txt 2")
        terminal.type("leave\r")
        assert terminal.wait() == 0, terminal.text
        assert child.wait(60) == 0
    assert claude.git("show", "main:first.txt", "main:second.txt") == "1\n2"
    assert outcomes(claude) == [("paused", False, False), ("paused", True, True), ("built", True, False)]
    await claude.assert_invariants()


@pytest.mark.extended_rest
@pytest.mark.parametrize("end", ["hang up", "kill council", "kill the CLI", "leave 3"])
async def test_interrupted_conversation_loses_nothing(
    claude: Repository, attach: Callable[..., Terminal], end: str
) -> None:
    """However it ends, the task continues with the work of the user."""
    with waiting_session(claude, "") as child:
        terminal = attach()
        say(terminal, "write second.txt 2")
        if end == "hang up":
            terminal.hang_up()
        elif end == "kill council":
            terminal.send_signal(signal.SIGKILL)
        elif end == "kill the CLI":
            os.kill(interactive_process(claude), signal.SIGKILL)
        else:
            terminal.type(f"{end}\r")
        terminal.wait()
        assert child.wait(60) == 0
    assert claude.git("show", "main:first.txt", "main:second.txt") == "1\n2"
    assert [outcome for outcome, _, _ in outcomes(claude)] == ["paused", "paused", "built"]
    await claude.assert_invariants()


def interactive_process(claude: Repository) -> int:
    """Return the process of the fake CLI that a user is attached to."""
    (pid,) = (
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdecimal()
        and b"tests.fakes.claude" in (line := read(folder / "cmdline"))
        and b"\0-p\0" not in line
        and str(claude.top.parent).encode() in read(folder / "environ")
    )
    return pid


def read(file: Path) -> bytes:
    """Return a file of another process; empty if it has ended."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


@pytest.mark.extended_rest
async def test_user_attaches_to_an_interrupted_run(claude: Repository, attach: Callable[..., Terminal]) -> None:
    """No process is active in it; `council resume` continues it."""
    with waiting_session(claude, "") as child:
        child.send_signal(signal.SIGKILL)
        child.wait(60)
    terminal = attach("--then", "continue")
    say(terminal, "write second.txt 2")
    terminal.type("leave\r")
    assert terminal.wait() == 0, terminal.text
    assert claude.council("resume", "--json").states == {"one": "landed"}
    assert claude.git("show", "main:second.txt") == "2"
    await claude.assert_invariants()


@pytest.mark.extended_rest
async def test_message_reaches_the_attached_conversation(claude: Repository, attach: Callable[..., Terminal]) -> None:
    """At the end of a turn."""
    with waiting_session(claude, "") as child:
        terminal = attach("--then", "land")
        assert claude.council("tell", "one", "be quick", "--json").result["receiver"] == "session"
        say(terminal, "write second.txt 2")
        assert "be quick" in terminal.text
        terminal.type("leave\r")
        assert terminal.wait() == 0, terminal.text
        assert child.wait(60) == 0
    (message,) = claude.council("show", "one", "--json").result["messages"]
    assert message["attempts"] == [2]


@pytest.mark.extended_rest
async def test_only_one_user_is_attached(claude: Repository, attach: Callable[..., Terminal]) -> None:
    with waiting_session(claude, "") as child:
        terminal = attach("--then", "land")
        other = Terminal(["attach", "one"], claude.top, claude.environ, columns=200)
        assert other.wait() == 2
        assert "already attached" in other.text
        other.close()
        terminal.type("leave\r")
        assert terminal.wait() == 0, terminal.text
        assert child.wait(60) == 0


@pytest.mark.extended_rest
def test_conversation_that_cannot_be_opened_is_refused(repository: Repository) -> None:
    """With what to do instead."""
    path = repository.configure([{"id": "one", "prompt": "write a.txt 1"}])
    assert repository.council("run", str(path), failpoints="session.ended=kill").code != 0
    piped = repository.council("attach", "one")
    assert (piped.code, "needs a terminal" in piped.stderr) == (2, True), piped
    terminal = Terminal(["attach", "one"], repository.top, repository.environ, columns=250)
    assert terminal.wait() == 2
    assert "has no conversation" in terminal.text
    terminal.close()
    assert repository.council("resume").code == 0
    terminal = Terminal(["attach", "one"], repository.top, repository.environ, columns=250)
    assert terminal.wait() == 2
    assert "is landed" in terminal.text
    terminal.close()
    (finished,) = repository.council("runs", "--json").result["runs"]
    assert finished["status"] == "landed"


@pytest.mark.extended_rest
def test_adapter_without_a_conversation_on_a_terminal_is_refused(repository: Repository) -> None:
    go = repository.top.parent / "go"
    path = repository.configure([{"id": "one", "prompt": f"await {go}"}], sandbox="off")
    with repository.start("run", str(path), "--json") as child:
        wait_for(lambda: list((repository.top / ".council/logs").glob("*/one.1.stdout")), 60)
        terminal = Terminal(["attach", "one"], repository.top, repository.environ, columns=250)
        assert terminal.wait() == 2
        assert "can't open a conversation in a terminal" in terminal.text
        assert "council tell one" in terminal.text
        terminal.close()
        go.touch()
        child.wait(60)
