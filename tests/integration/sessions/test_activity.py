"""Output and changes of running sessions, read from files by any process at little cost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from orchestrator.api.council import Council
from orchestrator.api.topics.activity import ObservedSession
from orchestrator.protocols import Adapter, AgentMessage, SessionEvent, ToolCall, UsageReport
from orchestrator.repo.git.change_counts import Changes
from orchestrator.sessions.output.transcript import Transcript
from tests.conftest import Repository
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest


@dataclass
class Watcher:
    """Follows runs and collects the views."""

    sessions: Sequence[ObservedSession] = ()
    commits: dict[str, str] = field(default_factory=dict)
    heard: dict[str, Transcript] = field(default_factory=dict)
    seen: dict[str, Changes] = field(default_factory=dict)
    counted: dict[str, Changes] = field(default_factory=dict)

    def working(self) -> Sequence[ObservedSession]:
        return self.sessions

    def built(self) -> Sequence[ObservedSession]:
        return ()

    def uncounted_commits(self, most: int) -> Mapping[str, str]:
        return dict(list(self.commits.items())[:most])

    def on_transcript(self, session: ObservedSession, transcript: Transcript) -> None:
        self.heard[session.task] = transcript

    def on_changes(self, session: ObservedSession, changes: Changes) -> None:
        self.seen[session.task] = changes

    def count(self, task: str, changes: Changes) -> None:
        del self.commits[task]
        self.counted[task] = changes


@dataclass(frozen=True)
class Talker:
    """Parses lines of JSON, and fails on one of them."""

    def parse(self, line: str) -> Sequence[SessionEvent]:
        match json.loads(line):
            case {"say": text}:
                return (AgentMessage(text),)
            case {"tool": name}:
                return (ToolCall(name, "src/app.py"),)
            case {"tokens": count}:
                return (UsageReport(input_tokens=count, cost=0.25),)
        raise ValueError(line)


async def until(condition: object, *, limit: float = 20.0) -> None:
    """Wait on the event loop until the condition is true."""
    assert callable(condition)
    with anyio.fail_after(limit):
        while not condition():
            await anyio.sleep(0.02)


@pytest.fixture
async def run_of_two(repository: Repository) -> Path:
    """A run with two tasks: one landed with two files, one failed."""
    config = repository.configure(
        [
            {"id": "landed", "prompt": "write a.txt 1\nappend a.txt 2\nwrite README.md new"},
            {"id": "failed", "prompt": "write b.txt 1\nexit 1", "attempts": 1},
        ]
    )
    assert repository.council("run", str(config)).code == 1
    return config


async def test_landed_work_is_counted_immediately(repository: Repository, run_of_two: Path) -> None:
    """One git command counts all commits; a commit that no longer exists changes nothing."""
    async with Council.open(repository.top, environ=repository.environ) as council:
        report = await council.runs.status()
        commit = report.tasks[0].landed
        assert commit is not None
        assert await council.reports.landed_changes(report.run, {"landed": commit}) == {"landed": Changes(2, 3, 1)}
        assert await council.reports.landed_changes(report.run, {}) == {}
        assert await council.changes.size("failed", report.run) == Changes(1, 1, 0)
        activity = await council.sessions.activity(report.run)
        watcher = Watcher(commits={"landed": commit, "gone": "f" * 40})
        async with anyio.create_task_group() as group:
            group.start_soon(activity.show, watcher)
            await until(lambda: len(watcher.counted) == 2)
            group.cancel_scope.cancel()
    assert watcher.counted == {"landed": Changes(2, 3, 1), "gone": Changes()}


def test_commits_of_the_user_are_not_counted_as_work_of_a_task(repository: Repository) -> None:
    """A task that starts from the newest base lands the user's commits of the base together with its own."""
    gate = repository.spawns.parent / "gate"
    tasks = [{"id": "first", "prompt": f"await {gate}\nwrite a.txt 1"}, {"id": "second", "prompt": "write b.txt 1"}]
    child = repository.start("run", str(repository.configure(tasks, target="out", capacity=1)))
    wait_for(repository.spawns.exists)
    repository.commit({"mine.txt": "1\n2\n"})
    gate.touch()
    child.communicate(timeout=60)
    assert repository.git("show", "out:mine.txt", "out:b.txt") == "1\n2\n1"
    assert repository.council("status").stdout.count("on out, 1 file +1 -0\n") == 2


async def test_activity_of_a_running_session_is_visible(repository: Repository) -> None:
    """The view reads without changing the session."""
    config = repository.configure(
        [{"id": "t", "prompt": "print Reading\nwrite a.txt 1\nwrite .env SECRET_TOKEN=abcdefghijklmnop\nhang"}]
    )
    child = repository.start("run", str(config))
    try:
        wait_for(repository.spawns.exists)
        async with Council.open(repository.top, environ=repository.environ) as council:
            run = await council.runs.newest()
            activity = await council.sessions.activity(run)
            watcher = Watcher(sessions=[ObservedSession("t", 1, "fake"), ObservedSession("never", 1, "fake")])
            async with anyio.create_task_group() as group:
                group.start_soon(activity.show, watcher)
                await until(lambda: watcher.heard and watcher.seen.get("t") == Changes(1, 1, 0))
                group.cancel_scope.cancel()
            assert watcher.heard["t"].last_message == "Reading"
            assert set(watcher.heard) == {"t"}
    finally:
        child.terminate()
        child.communicate(timeout=30)
    left = Path(repository.environ["COUNCIL_HOME"]).glob("*/indexes/*.live-*")
    assert list(left) == []
    await repository.assert_invariants()


async def test_output_lines_are_read_once_and_completely(
    repository: Repository, run_of_two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partial line waits for its end; only the end of long output is read; an adapter error ends nothing."""
    monkeypatch.setattr("orchestrator.api.topics.activity.TRANSCRIPT_INTERVAL", 0.01)
    async with Council.open(repository.top, environ=repository.environ) as council:
        activity = await council.sessions.activity(await council.runs.newest())
        talker: Adapter = Talker()  # type: ignore[assignment]
        activity = dataclasses.replace(activity, position=0, attempts={}, adapters={"talker": talker})
        file = activity.logs / "x.1.stdout"
        watcher = Watcher(sessions=[ObservedSession("x", 1, "talker")])
        async with anyio.create_task_group() as group:
            group.start_soon(activity.show, watcher)
            file.write_text('{"tokens": 5}\n{"say": "first"}\n{"say": "sec')
            await until(lambda: "x" in watcher.heard)
            assert watcher.heard["x"] == Transcript("first", None, 5, 0, 0.25)
            with file.open("a") as more:
                more.write('ond"}\n{"tokens": 5}\n')
            await until(lambda: watcher.heard["x"] == Transcript("second", None, 10, 0, 0.5))
            with file.open("a") as more:
                more.write('{"bad": 1}\n{"tool": "Edit"}\n')
            await until(lambda: watcher.heard["x"].last_message == "Edit src/app.py")
            group.cancel_scope.cancel()
        with file.open("a") as more:
            more.write('{"tokens": 1}\n' * 20_000 + '{"say": "last"}\n')
        late = Watcher(sessions=watcher.sessions)
        async with anyio.create_task_group() as group:
            group.start_soon(activity.show, late)
            await until(lambda: "x" in late.heard)
            group.cancel_scope.cancel()
        assert late.heard["x"].last_message == "last"
        assert late.heard["x"].input_tokens < 5_000  # of the last 64 KiB


@dataclass
class SlowChanges:
    """Takes a configured time per scan, and counts scans."""

    looks: int = 0

    async def size(self, task: str, run: str) -> Changes:
        self.looks += 1
        await anyio.sleep(0.1)
        return Changes(1, 1, 1)


@pytest.mark.extended
async def test_activity_is_cheap(repository: Repository, run_of_two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow scan delays the next scan; sessions are scanned in turn."""
    monkeypatch.setattr("orchestrator.api.topics.activity.CHANGES_INTERVAL", 0.01)
    async with Council.open(repository.top, environ=repository.environ) as council:
        found = await council.sessions.activity(await council.runs.newest())
    changes = SlowChanges()
    activity = dataclasses.replace(found, changes=changes)  # type: ignore[arg-type]
    watcher = Watcher(sessions=[ObservedSession("a", 1, "fake"), ObservedSession("b", 1, "fake")])
    async with anyio.create_task_group() as group:
        group.start_soon(activity.show, watcher)
        began = anyio.current_time()
        await until(lambda: len(watcher.seen) == 2)
        group.cancel_scope.cancel()
    assert changes.looks == 2
    assert anyio.current_time() - began > 2.0
