"""How programs are stopped: those that clean up on interrupt, and those behind wrappers."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from orchestrator.domain.runs.outcome import ProcessExit
from orchestrator.sessions.sandbox.policy import SandboxKind, sandbox_command
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand, run_supervised
from tests.conftest import Repository
from tests.integration.security.test_sandbox import Folders, wait_until
from tests.processes import child_processes
from tests.sandboxes import require_sandbox

pytestmark = [
    pytest.mark.extended_rest,
    pytest.mark.sandbox,
    pytest.mark.skipif(sys.platform != "linux", reason="there is a sandbox on Linux only"),
]

#: Each program gets the test's folder as its first argument. Each process notes its signals.
NOTES = """
import os, signal, sys, time
INT, TERM = signal.SIGINT, signal.SIGTERM

def note(text):
    with open("notes", "a") as file:
        file.write(text + "\\n")

def hear(name, does):
    def heard(number, _):
        note(f"{name} {signal.Signals(number).name}")
        if number in does: does[number]()
    for number in (INT, TERM): signal.signal(number, heard)

def wait():  # Python sees a signal that comes just before a sleep only after it
    while True: time.sleep(0.02)

def ready():
    open("ready", "w").close()

def fork():  # returns when both processes run: Python drops a signal that reaches a child before that
    started, starts = os.pipe()
    child = os.fork()
    if child: os.read(started, 1)
    else: os.write(starts, b"x")
    return child

def save():
    time.sleep(0.2)
    open("last-word", "w").close()
    sys.exit(0)
"""


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Folders]:
    """Yield folders to work in; programs run there must be gone afterwards."""
    yield Folders(tmp_path)
    left = [one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in (one.info["cmdline"] or ())]
    for process in left:
        process.kill()
    assert not left


#: With Landlock a stop equals one without a sandbox.
@pytest.fixture(
    params=[SandboxKind.BUBBLEWRAP, SandboxKind.OFF, pytest.param(SandboxKind.LANDLOCK, marks=pytest.mark.slow)]
)
def kind(request: pytest.FixtureRequest) -> SandboxKind:
    return require_sandbox(request.param)


Run = Callable[..., SupervisedCommand]


@pytest.fixture
def program(folders: Folders, kind: SandboxKind) -> Run:
    """Return the command that runs a Python program in a sandbox of this kind."""

    def make(source: str, **changes: Any) -> SupervisedCommand:
        argv = [sys.executable, "-I", "-S", "-c", NOTES + source, str(folders.home.parent)]
        return sandbox_command(kind, folders.command(argv, **changes), folders.policy())

    return make


def heard(folders: Folders) -> list[tuple[str, str]]:
    """Return which process got which signal, in order."""
    file = folders.tree / "work" / "notes"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(name, number) for name, number in map(str.split, lines)]


async def stopped(folders: Folders, command: SupervisedCommand) -> tuple[ProcessExit, float]:
    """Run the command, stop it through its supervisor once it is ready, and return the seconds until its end."""
    asked: list[float] = []

    async def stop() -> None:
        await wait_until((folders.tree / "work" / "ready").exists)
        (supervisor,) = child_processes()
        asked.append(time.monotonic())
        supervisor.send_signal(signal.SIGTERM)

    async with anyio.create_task_group() as group:
        group.start_soon(stop)
        ended = await run_supervised(command)
    return ended, time.monotonic() - asked[0]


# A program that cleans up

#: Has a tool in its process group, and on interrupt prints more than a pipe buffer.
TIDIES = """
def tidy():
    time.sleep(0.2)
    lived = os.waitpid(tool, os.WNOHANG) == (0, 0)
    os.kill(tool, signal.SIGKILL)
    os.waitpid(tool, 0)
    print("x" * 1_000_000)
    print("ended its tool" if lived else "its tool was gone", flush=True)
    sys.exit(3)

hear("tool", {INT: sys.exit, TERM: sys.exit})
tool = fork()
if tool:
    hear("cli", {INT: tidy, TERM: sys.exit})
    ready()
wait()
"""


async def test_interrupted_program_can_clean_up(folders: Folders, program: Run) -> None:
    """It alone gets SIGINT and ends its tool itself; all its output is read, and the wait ends with it."""
    ended, took = await stopped(folders, program(TIDIES, interrupt=True, grace=60))
    assert heard(folders) == [("cli", "SIGINT")]
    assert (folders.home.parent / "stdout").read_text() == "x" * 1_000_000 + "\nended its tool\n"
    assert (ended.exit, ended.signal, ended.ended_by, ended.killed) == (3, None, "stop", 0)
    assert took < 30


async def test_program_without_interrupt_support_is_not_interrupted(folders: Folders, program: Run) -> None:
    ended, _ = await stopped(folders, program(TIDIES, interrupt=False))
    assert sorted(heard(folders)) == [("cli", "SIGTERM"), ("tool", "SIGTERM")]
    assert (ended.exit, ended.ended_by, ended.stdout_bytes) == (0, "stop", 0)


@pytest.mark.extended_variants
@pytest.mark.parametrize("why", ["timeout", "idle_timeout"])
async def test_program_over_its_limit_is_interrupted(folders: Folders, program: Run, why: str) -> None:
    """Whatever stops it, it can clean up."""
    ended = await run_supervised(program(TIDIES, interrupt=True, **{why: 2.0}))
    assert (ended.exit, ended.ended_by) == (3, why)
    assert heard(folders) == [("cli", "SIGINT")]


async def test_cancelled_program_is_interrupted(folders: Folders, program: Run) -> None:
    """The cancellation continues after the cleanup."""
    async with anyio.create_task_group() as group:
        group.start_soon(run_supervised, program(TIDIES, interrupt=True, grace=60))
        await wait_until((folders.tree / "work" / "ready").exists)
        group.cancel_scope.cancel()
    assert (folders.home.parent / "stdout").read_text().endswith("ended its tool\n")


@pytest.mark.extended_variants
async def test_leftover_process_is_not_mistaken_for_the_program(folders: Folders, program: Run) -> None:
    """An orphan process, regardless of its new parent, gets SIGTERM when the program has ended."""
    source = """
hear("cli", {INT: sys.exit})
if os.fork() == 0:
    if os.fork() == 0:
        hear("left", {TERM: save})
        parent = os.getppid()
        note(f"began {parent}")
        while os.getppid() == parent: time.sleep(0.01)
        ready()
        wait()
    while not os.path.exists("notes"): time.sleep(0.01)
    os._exit(0)
wait()
"""
    ended, took = await stopped(folders, program(source, interrupt=True))
    assert heard(folders)[1:] == [("cli", "SIGINT"), ("left", "SIGTERM")]
    assert (folders.tree / "work" / "last-word").exists()
    assert (ended.exit, ended.killed) == (0, 0)
    assert took < 10


# Programs that continue


@pytest.mark.extended_variants
async def test_continuing_program_is_terminated_after_half_of_the_grace_period(folders: Folders, program: Run) -> None:
    """It and its tool get SIGTERM, and the rest of the grace period."""
    source = """
hear("cli", {TERM: sys.exit})
if fork() == 0:
    hear("tool", {TERM: save})
    ready()
wait()
"""
    ended, took = await stopped(folders, program(source, interrupt=True, grace=6))
    assert heard(folders)[0] == ("cli", "SIGINT")
    assert sorted(heard(folders)[1:]) == [("cli", "SIGTERM"), ("tool", "SIGTERM")]
    assert (folders.tree / "work" / "last-word").exists()
    assert (ended.exit, ended.killed) == (0, 0)
    assert 3.2 <= took < 6  # half of the grace period, and the 0.2 s in which the tool saves


@pytest.mark.extended_variants
async def test_program_that_ignores_signals_is_killed_after_the_grace_period(folders: Folders, program: Run) -> None:
    source = "hear('cli', {})\nready()\nwait()"
    ended, took = await stopped(folders, program(source, interrupt=True, grace=1))
    assert heard(folders) == [("cli", "SIGINT"), ("cli", "SIGTERM")]
    assert (ended.exit, ended.signal) == (None, signal.SIGKILL)
    assert 1 <= took < 5


# Wrappers

#: A program in its own session that needs a moment to save on SIGTERM.
BEHIND = """
if fork() == 0:
    os.setsid()
    hear("program", {TERM: save})
    ready()
wait()
"""
DIES = "for number in (INT, TERM): signal.signal(number, signal.SIG_DFL)"
IGNORES = "for number in (INT, TERM): signal.signal(number, signal.SIG_IGN)"
MODES = pytest.mark.parametrize("interrupt", [False, True], ids=["terminated", "interrupted"])


@pytest.mark.extended_variants
@MODES
async def test_dying_wrapper_leaves_its_program_the_grace_period(
    folders: Folders, program: Run, interrupt: bool
) -> None:
    """Whatever signal kills the wrapper, its program gets SIGTERM at once, and can save."""
    ended, took = await stopped(folders, program(DIES + BEHIND, interrupt=interrupt))
    assert heard(folders) == [("program", "SIGTERM")]
    assert (folders.tree / "work" / "last-word").exists()
    assert (ended.exit, ended.signal, ended.killed) == (None, signal.SIGINT if interrupt else signal.SIGTERM, 0)
    assert took < 10


@pytest.mark.extended_variants
@MODES
async def test_wrapper_that_forwards_nothing_is_bypassed(folders: Folders, program: Run, interrupt: bool) -> None:
    """Its program gets SIGTERM directly, and can save; the wrapper is killed."""
    ended, took = await stopped(folders, program(IGNORES + BEHIND, interrupt=interrupt, grace=3))
    assert heard(folders) == [("program", "SIGTERM")]
    assert (folders.tree / "work" / "last-word").exists()
    assert (ended.exit, ended.signal) == (None, signal.SIGKILL)
    assert 3 <= took < 30


@pytest.mark.extended_variants
@MODES
async def test_program_that_ignores_signals_does_not_outlive_its_wrapper(
    folders: Folders, program: Run, interrupt: bool
) -> None:
    """The wrapper's end does not count as its program's end; that is killed after the grace period."""
    source = DIES + BEHIND.replace("save", "ready")
    ended, took = await stopped(folders, program(source, interrupt=interrupt, grace=1))
    assert heard(folders) == [("program", "SIGTERM")]
    assert ended.killed == 1
    assert 1 <= took < 5


@pytest.mark.extended_variants
async def test_program_gets_one_interrupt_through_its_wrapper(folders: Folders, program: Run) -> None:
    """A second interrupt in addition to the forwarded one would make many programs exit at once."""
    source = """
hear("program", {INT: save})
behind = fork()
if behind == 0: wait()
hear("wrapper", {INT: lambda: os.kill(behind, INT)})
ready()
os.waitpid(behind, 0)
"""
    ended, took = await stopped(folders, program(source, interrupt=True))
    assert heard(folders) == [("wrapper", "SIGINT"), ("program", "SIGINT")]
    assert (folders.tree / "work" / "last-word").exists()
    assert (ended.exit, ended.killed) == (0, 0)
    assert took < 10


@pytest.mark.extended_rest
async def test_pending_task_of_an_interrupted_run_has_a_reason(repository: Repository) -> None:
    """It waits for a command, as the task that was running."""
    tasks = [{"id": f"t{number}", "prompt": f"write {number} x"} for number in range(2)]
    config = repository.configure(tasks, capacity=1)
    assert repository.council("run", str(config), failpoints="work.recorded=kill").code == -signal.SIGKILL
    last = repository.council("status", "--json").result["tasks"][1]
    assert (last["status"], "council resume" in str(last["reason"])) == ("pending", True), last
    done = repository.council("resume", "--json")
    assert [task["reason"] for task in done.result["tasks"]] == [None, None]
