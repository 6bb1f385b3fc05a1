"""Add the new tasks of trackers to an active run (`council run --follow`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from orchestrator.domain.events.runs import TrackerTaskRefused, TrackerTasksAdded
from orchestrator.domain.runs.model import RunDocument
from orchestrator.engine.run_context import NewTasks
from orchestrator.engine.scheduler.local_work import LocalWork
from orchestrator.engine.state.forge_changes import ForgeChanges
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import CouncilError, VersionConflict
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint


class NewTaskFollower:
    """Looks for new tasks regularly, in the process that leads the run."""

    def __init__(
        self, ledger: Ledger, find: Callable[[RunDocument], Awaitable[NewTasks]], local: LocalWork, clock: Clock
    ) -> None:
        self._ledger, self._find, self._local = ledger, find, local
        self._interval = min(tracker.sync_interval for tracker in ledger.run.trackers.values())
        self._changes = ForgeChanges(ledger.writer.store, ledger.run.id, clock)
        self._refused = dict[tuple[str, str], str]()

    async def run(self) -> None:
        """Look for new tasks every `sync_interval` until cancelled."""
        await self._ledger.writer.became_leader.wait()
        async with anyio.create_task_group() as group:
            group.start_soon(self._changes.watch)
            await self._repeat()

    async def _repeat(self) -> None:
        while True:
            await self._changes.wait(self._interval)
            try:
                await self._look()
            except (CouncilError, OSError):  # the synchronization with the tracker reports it
                continue

    async def _look(self) -> None:
        found = await self._find(self._ledger.run)
        for (tracker, task), reason in found.refused.items():
            if self._refused.get((tracker, task)) != reason:
                self._refused[tracker, task] = reason
                await self._ledger.note(TrackerTaskRefused(tracker=tracker, task=task, reason=reason))
        if not found.specs:
            return
        # A partial change would leave the board and the documents inconsistent.
        with anyio.CancelScope(shield=True):
            try:
                await self._ledger.add_tasks(found.specs, TrackerTasksAdded(tasks=list(found.specs)))
            except VersionConflict:  # another process has added them
                return
            failpoint("run.extended")
            self._local.add_planned_tasks()
            self._local.wake()
