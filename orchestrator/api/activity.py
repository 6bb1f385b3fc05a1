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
from orchestrator.api.runs import Runs
from orchestrator.engine.reports.report import RunRecord
from orchestrator.errors import CouncilError
from orchestrator.protocols import Adapter, SessionEvent, UsedTool
from orchestrator.repo.git.change_counts import Changes
from orchestrator.sessions.output.files import log_file
from orchestrator.sessions.output.follow import Follower
from orchestrator.sessions.output.transcript import NOTHING_SAID, Transcript

#: Seconds between two looks at what is said, and at what is changed, at least.
WORDS_PAUSE, CHANGES_PAUSE = 0.5, 1.0
#: How many times as long as a look took is waited before the next: looking must cost next to nothing.
RESTRAINT = 20
#: How many commits are counted in one look.
_BATCH = 50


class Working(NamedTuple):
    """An attempt whose session is at work."""

    task: str
    attempt: int
    adapter: str


class Viewer(Protocol):
    """Whoever looks: says what at, and takes what is seen."""

    def working(self) -> Sequence[Working]:
        """Return the attempts whose sessions are at work."""

    def built(self) -> Sequence[Working]:
        """Return the attempts that are over, whose work was not seen since and has not landed."""

    def uncounted(self, most: int) -> Mapping[str, str]:
        """Return the commits of landed tasks, by task, of which it is not known what they change; at most so many."""

    def hear(self, session: Working, said: Transcript) -> None:
        """Take what a session has said and done; where much came between two looks, of its last 64 KiB."""

    def see(self, session: Working, changes: Changes) -> None:
        """Take how much a session has changed, so far or in all."""

    def count(self, task: str, changes: Changes) -> None:
        """Take how much a task has changed by landing."""


@dataclass(frozen=True, slots=True)
class Activity:
    """A run as it stood at the log's position `position`, and from then on what its sessions do."""

    record: RunRecord
    position: int
    attempts: Mapping[str, int]
    """How many attempts each task has."""
    runs: Runs
    archive: Archive
    adapters: Mapping[str, Adapter]
    logs: Path

    async def show(self, viewer: Viewer) -> None:
        """Tell a viewer what there is, as it comes, until cancelled. Costs a few percent of one core at most."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._listen, viewer)
            group.start_soon(self._watch, viewer)

    async def _listen(self, viewer: Viewer) -> None:
        heard: dict[Working, _Heard] = {}
        while True:
            began = anyio.current_time()
            working = viewer.working()
            heard = {
                one: heard.get(one) or _Heard(self.adapters[one.adapter], log_file(self.logs, *one[:2], "stdout"))
                for one in working
            }
            for one in await anyio.to_thread.run_sync(_listen, heard, abandon_on_cancel=True):
                viewer.hear(one, heard[one].transcript)
            await anyio.sleep(max(WORDS_PAUSE, RESTRAINT * (anyio.current_time() - began)))

    async def _watch(self, viewer: Viewer) -> None:
        """Look at one task at a time, whose turn it is, and at what has landed since."""
        turns: deque[Working] = deque()
        while True:
            began = anyio.current_time()
            working = [*viewer.working(), *viewer.built()]
            turns = deque(one for one in turns if one in working)
            turns.extend(one for one in working if one not in turns)
            if commits := viewer.uncounted(_BATCH):
                await self._count(commits, viewer)
            elif turns:
                turns.rotate(-1)
                await self._look(turns[-1], viewer)
            await anyio.sleep(max(CHANGES_PAUSE, RESTRAINT * (anyio.current_time() - began)))

    async def _count(self, commits: Mapping[str, str], viewer: Viewer) -> None:
        try:
            counted = await self.runs.landed(self.record.run.id, commits)
        except (CouncilError, OSError):  # gone from our repository: nobody can say any more
            counted = {}
        for task in commits:
            viewer.count(task, counted.get(task, Changes()))

    async def _look(self, session: Working, viewer: Viewer) -> None:
        try:
            changes = await self.archive.changes(self.record.run.id, session.task)
        except (CouncilError, OSError):  # its worktree is being made, or is gone by now
            return
        viewer.see(session, changes)


class _Heard:
    """What a session has said and done, up to a line of it."""

    def __init__(self, adapter: Adapter, file: Path) -> None:
        self.transcript = NOTHING_SAID
        self._follower = Follower(adapter, file, newest_only=True)

    def listen(self) -> bool:
        """Take what came since the last look; whether any did. Blocks."""
        events = self._follower.read()
        for event in events or ():
            self._take(event)
        return events is not None

    def _take(self, event: SessionEvent) -> None:
        match event:
            case UsedTool(name, detail):
                self.transcript = replace(self.transcript.after(event), words=f"{name} {detail}".strip())
            case _:
                self.transcript = self.transcript.after(event)


def _listen(heard: Mapping[Working, _Heard]) -> list[Working]:
    return [session for session, one in heard.items() if one.listen()]
