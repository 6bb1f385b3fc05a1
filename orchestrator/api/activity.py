"""What the sessions of a run are doing: what they say, and how much they have changed. For views in any process.

All of it comes from files; nothing is asked of the run's owner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import anyio
import anyio.to_thread

from orchestrator.api.archive import Archive
from orchestrator.api.runs import ProjectRuns
from orchestrator.engine.reports.report import RunRecord
from orchestrator.errors import CouncilError
from orchestrator.protocols import Adapter, SessionEvent, ToolCall
from orchestrator.repo.git.change_counts import Changes
from orchestrator.sessions.output.follow import OutputFollower
from orchestrator.sessions.output.log_files import log_path
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, Transcript

#: Seconds between two looks at what is said, and at what is changed, at least.
TRANSCRIPT_INTERVAL, CHANGES_INTERVAL = 0.5, 1.0
#: How many times as long as a look took is waited before the next: looking must cost next to nothing.
IDLE_FACTOR = 20
#: How many commits are counted in one look.
_BATCH = 50


class ObservedSession(NamedTuple):
    """An attempt whose session is at work."""

    task: str
    attempt: int
    adapter: str


class ActivityObserver(Protocol):
    """Whoever looks: says what at, and takes what is seen."""

    def working(self) -> Sequence[ObservedSession]:
        """Return the attempts whose sessions are at work."""

    def built(self) -> Sequence[ObservedSession]:
        """Return the attempts that are over, whose work was not seen since and has not landed."""

    def uncounted_commits(self, most: int) -> Mapping[str, str]:
        """Return the commits of landed tasks, by task, of which it is not known what they change; at most so many."""

    def on_transcript(self, session: ObservedSession, said: Transcript) -> None:
        """Take what a session has said and done; where much came between two looks, of its last 64 KiB."""

    def on_changes(self, session: ObservedSession, changes: Changes) -> None:
        """Take how much a session has changed, so far or in all."""

    def count(self, task: str, changes: Changes) -> None:
        """Take how much a task has changed by landing."""


@dataclass(frozen=True, slots=True)
class RunActivity:
    """A run as it stood at the log's position `position`, and from then on what its sessions do."""

    record: RunRecord
    position: int
    attempts: Mapping[str, int]
    """How many attempts each task has."""
    runs: ProjectRuns
    archive: Archive
    adapters: Mapping[str, Adapter]
    logs: Path

    async def show(self, viewer: ActivityObserver) -> None:
        """Tell a viewer what there is, as it comes, until cancelled. Costs a few percent of one core at most."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._listen, viewer)
            group.start_soon(self._watch, viewer)

    async def _listen(self, viewer: ActivityObserver) -> None:
        heard: dict[ObservedSession, _TranscriptReader] = {}
        while True:
            began = anyio.current_time()
            working = viewer.working()
            heard = {
                one: heard.get(one)
                or _TranscriptReader(self.adapters[one.adapter], log_path(self.logs, *one[:2], "stdout"))
                for one in working
            }
            for one in await anyio.to_thread.run_sync(_listen, heard, abandon_on_cancel=True):
                viewer.on_transcript(one, heard[one].transcript)
            await anyio.sleep(max(TRANSCRIPT_INTERVAL, IDLE_FACTOR * (anyio.current_time() - began)))

    async def _watch(self, viewer: ActivityObserver) -> None:
        """Look at one task at a time, whose turn it is, and at what has landed since."""
        turns: deque[ObservedSession] = deque()
        while True:
            began = anyio.current_time()
            working = [*viewer.working(), *viewer.built()]
            turns = deque(one for one in turns if one in working)
            turns.extend(one for one in working if one not in turns)
            if commits := viewer.uncounted_commits(_BATCH):
                await self._count(commits, viewer)
            elif turns:
                turns.rotate(-1)
                await self._look(turns[-1], viewer)
            await anyio.sleep(max(CHANGES_INTERVAL, IDLE_FACTOR * (anyio.current_time() - began)))

    async def _count(self, commits: Mapping[str, str], viewer: ActivityObserver) -> None:
        try:
            counted = await self.runs.landed(self.record.run.id, commits)
        except (CouncilError, OSError):  # gone from our repository: nobody can say any more
            counted = {}
        for task in commits:
            viewer.count(task, counted.get(task, Changes()))

    async def _look(self, session: ObservedSession, viewer: ActivityObserver) -> None:
        try:
            changes = await self.archive.changes(self.record.run.id, session.task)
        except (CouncilError, OSError):  # its worktree is being made, or is gone by now
            return
        viewer.on_changes(session, changes)


class _TranscriptReader:
    """What a session has said and done, up to a line of it."""

    def __init__(self, adapter: Adapter, file: Path) -> None:
        self.transcript = EMPTY_TRANSCRIPT
        self._follower = OutputFollower(adapter, file, newest_only=True)

    def listen(self) -> bool:
        """Take what came since the last look; whether any did. Blocks."""
        events = self._follower.read()
        for event in events or ():
            self._take(event)
        return events is not None

    def _take(self, event: SessionEvent) -> None:
        match event:
            case ToolCall(name, detail):
                self.transcript = replace(self.transcript.after(event), last_message=f"{name} {detail}".strip())
            case _:
                self.transcript = self.transcript.after(event)


def _listen(heard: Mapping[ObservedSession, _TranscriptReader]) -> list[ObservedSession]:
    return [session for session, one in heard.items() if one.listen()]
