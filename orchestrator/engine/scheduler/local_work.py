"""The work of this process in a run: attempts, landings and the dispatch board.

The scheduler acts on it; `engine.scheduler.peers` applies changes of other orchestrators to it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import anyio

from orchestrator.domain.events.runs import AdapterEnabled
from orchestrator.domain.runs.model import AdapterDocument
from orchestrator.domain.runs.statuses import (
    CLAIMED_STATUSES,
    LANDING_STATUSES,
    STARTABLE_STATUSES,
    SUCCESS_STATUSES,
    USER_STATUSES,
    TaskStatus,
)
from orchestrator.domain.scheduling.dispatch import DispatchBoard
from orchestrator.domain.workflow.routing import current_adapters, has_built_work, prefer_account
from orchestrator.engine.landing.merge_queue import MergeQueue
from orchestrator.engine.scheduler.active_attempts import ActiveAttempt
from orchestrator.engine.state.adapter_states import AdapterUpdate
from orchestrator.engine.state.ledger import Ledger
from orchestrator.system.clock import Clock

#: The head start in seconds of the orchestrator that released a task, to claim it again.
_PEER_RETRY_DELAY = 0.5


class LocalWork:
    """Active attempts, landings and known task states of this process.

    Times are monotonic seconds.
    """

    def __init__(
        self,
        ledger: Ledger,
        board: DispatchBoard,
        merge_queue: MergeQueue,
        clock: Clock,
        unavailable_adapters: Collection[str],
    ) -> None:
        """Create the work from a board that reflects the documents.

        `unavailable_adapters` are the adapters that this process can't run, regardless of their recorded state.
        """
        self._unavailable_adapters = unavailable_adapters
        self._ledger, self.board, self.merge_queue, self._clock = ledger, board, merge_queue, clock
        self.active_attempts: dict[str, ActiveAttempt] = {}
        """The attempts that run in this process, by task."""
        self.attached: set[str] = set()
        """The tasks to which a user is attached in another process: no session of them starts here."""
        self._woken = anyio.Event()
        for task in ledger.run.tasks:
            if ledger.task(task).status in STARTABLE_STATUSES | USER_STATUSES:
                self._place(task)

    def _place(self, task: str) -> None:
        """Queue a task for the adapters of its phase, if the phase defines any."""
        adapters, keeps = self._phase_adapters(task)
        if adapters is not None:
            self.board.set_adapters(task, adapters, keeps_paths=keeps)

    def add_planned_tasks(self) -> None:
        """Add subtasks of expanded plans to the board, at their positions in the file."""
        new = [task for task in self._ledger.tasks.added if task not in self.board.entries]
        if not new:
            return
        self.board.add({task: self._ledger.tasks.added[task] for task in new}, self._ledger.run.tasks)
        for task in new:
            if self._ledger.task(task).status is TaskStatus.PENDING:
                self.board.set_subtasks(task, self._ledger.tasks.subtasks(task))
                self._place(task)
            else:
                self.sync_task(task)

    def tasks_elsewhere(self) -> list[str]:
        """Return the tasks that other orchestrators have claimed."""
        return [task for task in self._ledger.run.tasks if self._ledger.is_claimed_elsewhere(task)]

    def has_open_subtasks(self, task: str) -> bool:
        """Return True if any recorded subtask has neither landed nor is done."""
        return any(
            subtask not in self._ledger.tasks or self._ledger.task(subtask).status not in SUCCESS_STATUSES
            for subtask in self._ledger.task(task).subtasks
        )

    def wake(self) -> None:
        """Wake the scheduler."""
        self._woken.set()

    async def pause(self, until: float | None) -> None:
        """Wait until woken, or until a time."""
        await self._clock.wait(self._woken, until)
        self._woken = anyio.Event()

    def stop_sessions(self) -> None:
        """Stop all sessions, preserving their work."""
        for work in self.active_attempts.values():
            work.stop()
        self.wake()

    def update_adapter(self, adapter: str, document: AdapterDocument) -> None:
        """Apply the recorded state of an adapter."""
        if document.disabled_reason is not None:
            self.board.adapters.disable(adapter, document.disabled_reason)
        elif document.cooldown_until is not None and document.is_cooling_down(now := self._clock.now()):
            until = self._clock.monotonic() + document.cooldown_until - now
            self.board.adapters.start_cooldown(adapter, until)
        elif adapter in self._unavailable_adapters:
            return
        elif document.cooldowns:
            self.board.adapters.expect_probe(
                adapter, None if document.probe in self.active_attempts else document.probe
            )
        else:
            self.board.adapters.enable(adapter)

    async def restore_adapters(self, documents: Mapping[str, AdapterDocument]) -> None:
        """Restore the adapter cooldowns of an earlier leader and of other runs.

        Adapters that the leader disabled are enabled.
        """
        enabled = AdapterUpdate(AdapterDocument(), AdapterEnabled())
        for adapter, document in documents.items():
            if document.disabled_reason is not None:
                await self._ledger.adapters.update(
                    adapter, lambda current: None if current.disabled_reason is None else enabled
                )
            else:
                self.update_adapter(adapter, await self._ledger.adapters.read(adapter))
        for adapter in self._ledger.run.adapters:
            if await self._ledger.adapters.adopt_cooldown(adapter):
                self.update_adapter(adapter, await self._ledger.adapters.read(adapter))

    def awaiting_user(self) -> dict[str, int]:
        """Map each task that waits for a user to the number of its phase visits."""
        statuses = self._ledger.statuses().items()
        return {task: len(self._ledger.task(task).phases) for task, status in statuses if status in USER_STATUSES}

    def is_waiting_for_peers(self) -> bool:
        """Return True if tasks of other orchestrators may still create work.

        Return False if all their tasks and our tasks wait for the target.
        """
        statuses = self._ledger.statuses()
        elsewhere = self.tasks_elsewhere()
        are_built = all(statuses[task] in LANDING_STATUSES for task in elsewhere)
        return bool(elsewhere) and not (self.merge_queue.tasks.deferred and are_built)

    def show(self, task: str, retry_in: float = 0.0) -> None:
        """Update a task on the board; a retry starts after `retry_in` seconds."""
        self.add_planned_tasks()
        self.board.set_subtasks(task, self._ledger.tasks.subtasks(task))
        status, until = self._ledger.task(task).status, self._clock.monotonic() + retry_in
        if status is not TaskStatus.RUNNING:
            self.board.adapters.end_probe(task)
        adapters, keeps = self._phase_adapters(task)
        self.board.sync_task(task, status, until, adapters, keeps_paths=keeps)
        if task in self.attached and status in STARTABLE_STATUSES:
            self.board.pause(task, keeps_paths=keeps, adapters=adapters)

    def attach(self, task: str) -> None:
        """Stop the session of a task, if it runs here, and start no other one until `detach`."""
        self.attached.add(task)
        if task in self.active_attempts:
            self.active_attempts[task].pause()
        else:
            self.show(task)

    def detach(self, task: str) -> None:
        """Continue a task to which a user was attached."""
        self.attached.discard(task)
        if task in self.active_attempts:
            return
        self.show(task)
        if self._ledger.task(task).status in STARTABLE_STATUSES:
            adapters, keeps = self._phase_adapters(task)
            self.board.wait(task, self._clock.monotonic(), adapters, keeps_paths=keeps)

    def resume(self, task: str) -> None:
        """Continue a task that a user has retried, approved or rejected.

        If its session is still ending, the task continues by itself.
        """
        if task not in self.active_attempts:
            self.show(task)

    def _phase_adapters(self, task: str) -> tuple[tuple[str, ...] | None, bool]:
        """Return the adapters of a task's phase, and whether it keeps its paths.

        The adapters are None if it has no workflow and only one adapter.
        """
        entry, document = self.board.entries[task], self._ledger.task(task)
        if entry.workflow is None:
            return prefer_account(document, entry.adapters) if entry.fallback else None, False
        workflow = self._ledger.definitions.workflow(entry.workflow)
        return current_adapters(workflow, document, entry.adapter, entry.fallback), has_built_work(document)

    def sync_task(self, task: str, retry_in: float | None = None) -> None:
        """Apply the state of a task that another orchestrator or a user has changed."""
        if task in self.active_attempts:
            self.active_attempts[task].stop()  # the board is updated when the attempt ends
            return
        self.merge_queue.remove(task)
        if self._ledger.is_claimed_elsewhere(task) or self._ledger.task(task).status not in CLAIMED_STATUSES:
            self.show(task, _PEER_RETRY_DELAY if retry_in is None else retry_in)

    def take_over(self, task: str) -> None:
        """Continue a task of another orchestrator from its current state.

        If the scheduler has already started its session here, the task continues after that session.
        """
        if task in self.active_attempts:
            return
        self.show(task)
        if self._ledger.task(task).status in {TaskStatus.QUEUED, TaskStatus.LANDING}:
            self.merge_queue.add(task)

    def drop(self, task: str) -> None:
        """Stop tracking a task that has ended or will end."""
        self.merge_queue.remove(task)
        self.board.ended(task)
