"""The live activity of a run's sessions: transcripts and sizes of changes.

All data comes from files, so any process can read it; the run's leader is not involved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import anyio
import anyio.to_thread

from orchestrator.api.topics.changes import TaskChanges
from orchestrator.api.topics.reports import RunReports
from orchestrator.engine.reports.report import RunRecord
from orchestrator.errors import CouncilError
from orchestrator.protocols import Adapter, SessionEvent, ToolCall
from orchestrator.repo.git.change_counts import Changes
from orchestrator.sessions.output.follow import OutputFollower
from orchestrator.sessions.output.log_files import log_path
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, Transcript

#: The minimum seconds between two reads of transcripts, and of changes.
TRANSCRIPT_INTERVAL, CHANGES_INTERVAL = 0.5, 1.0
#: The pause after a read, as a multiple of its duration, which keeps the load negligible.
IDLE_FACTOR = 20
#: The number of commits that are counted at once.
_BATCH = 50


class ObservedSession(NamedTuple):
    """An attempt with a running session."""

    task: str
    attempt: int
    adapter: str


class ActivityObserver(Protocol):
    """A selector of sessions and commits to observe, and receiver of their data."""

    def working(self) -> Sequence[ObservedSession]:
        """Return the attempts with a running session."""

    def built(self) -> Sequence[ObservedSession]:
        """Return ended attempts whose final changes have neither landed nor been read."""

    def uncounted_commits(self, most: int) -> Mapping[str, str]:
        """Return up to `most` commits of landed tasks without change counts, by task."""

    def on_transcript(self, session: ObservedSession, transcript: Transcript) -> None:
        """Receive the transcript of a session.

        If there was a lot of output between two reads, it covers only the last 64 KiB.
        """

    def on_changes(self, session: ObservedSession, changes: Changes) -> None:
        """Receive the size of a session's changes, so far or in total."""

    def count(self, task: str, changes: Changes) -> None:
        """Receive the size of the changes that a task landed."""


@dataclass(frozen=True, slots=True)
class RunActivity:
    """A run at log position `position`, and the live activity of its sessions."""

    record: RunRecord
    position: int
    attempts: Mapping[str, int]
    """The number of attempts that each task may have."""
    reports: RunReports
    changes: TaskChanges
    adapters: Mapping[str, Adapter]
    logs: Path

    async def show(self, observer: ActivityObserver) -> None:
        """Send all activity to an observer until cancelled.

        Uses a few percent of one core at most.
        """
        async with anyio.create_task_group() as group:
            group.start_soon(self._listen, observer)
            group.start_soon(self._watch, observer)

    async def _listen(self, observer: ActivityObserver) -> None:
        readers: dict[ObservedSession, _TranscriptReader] = {}
        while True:
            began = anyio.current_time()
            working = observer.working()
            readers = {
                one: readers.get(one)
                or _TranscriptReader(self.adapters[one.adapter], log_path(self.logs, *one[:2], "stdout"))
                for one in working
            }
            for one in await anyio.to_thread.run_sync(_listen, readers, abandon_on_cancel=True):
                observer.on_transcript(one, readers[one].transcript)
            await anyio.sleep(max(TRANSCRIPT_INTERVAL, IDLE_FACTOR * (anyio.current_time() - began)))

    async def _watch(self, observer: ActivityObserver) -> None:
        """Observe the changes of one session at a time, in rotation, and of landed tasks."""
        rotation: deque[ObservedSession] = deque()
        while True:
            began = anyio.current_time()
            working = [*observer.working(), *observer.built()]
            rotation = deque(one for one in rotation if one in working)
            rotation.extend(one for one in working if one not in rotation)
            if commits := observer.uncounted_commits(_BATCH):
                await self._count(commits, observer)
            elif rotation:
                rotation.rotate(-1)
                await self._look(rotation[-1], observer)
            await anyio.sleep(max(CHANGES_INTERVAL, IDLE_FACTOR * (anyio.current_time() - began)))

    async def _count(self, commits: Mapping[str, str], observer: ActivityObserver) -> None:
        try:
            counted = await self.reports.landed_changes(self.record.run.id, commits)
        except (CouncilError, OSError):  # missing in council's repository: they can no longer be counted
            counted = {}
        for task in commits:
            observer.count(task, counted.get(task, Changes()))

    async def _look(self, session: ObservedSession, observer: ActivityObserver) -> None:
        try:
            changes = await self.changes.size(session.task, self.record.run.id)
        except (CouncilError, OSError):  # its worktree is being created, or was removed
            return
        observer.on_changes(session, changes)


class _TranscriptReader:
    """An incremental reader of a session's transcript."""

    def __init__(self, adapter: Adapter, file: Path) -> None:
        self.transcript = EMPTY_TRANSCRIPT
        self._follower = OutputFollower(adapter, file, newest_only=True)

    def listen(self) -> bool:
        """Read new output; return True if there was any. Blocks."""
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


def _listen(readers: Mapping[ObservedSession, _TranscriptReader]) -> list[ObservedSession]:
    return [session for session, reader in readers.items() if reader.listen()]
