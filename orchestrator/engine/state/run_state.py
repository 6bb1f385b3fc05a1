"""The run document, as seen by one orchestrator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestrator.domain.events.base import RunEvent
from orchestrator.domain.events.runs import (
    BaseFailureAllowed,
    RunBudgetChanged,
    RunFinished,
    RunHalted,
)
from orchestrator.domain.events.tasks import TaskBumped, TaskHeld, TaskReleased
from orchestrator.domain.runs.model import HaltCause, RunDocument
from orchestrator.engine.state.records import run_key
from orchestrator.engine.state.writer import RunWriter
from orchestrator.errors import RefusedError, VersionConflict
from orchestrator.protocols import Commit, Write
from orchestrator.system.failpoints import failpoint


class RunState:
    """The document of a run, with the tasks that are loaded."""

    def __init__(self, writer: RunWriter, document: RunDocument) -> None:
        self.document, self._writer = document, writer
        self.loaded = set(document.tasks)
        """The tasks whose documents are loaded."""

    async def read(self) -> tuple[int, RunDocument]:
        """Return the stored document with its version."""
        stored = await self._writer.store.get(run_key(self._writer.run))
        if stored is None:
            raise RefusedError(f"run {self._writer.run} was removed", "start a new run")
        return stored.version, RunDocument.model_validate_json(stored.encoded)

    def adopt(self, document: RunDocument) -> None:
        """Adopt a stored document, except for tasks that are not loaded yet.

        No task is removed.
        """
        tasks = tuple(task for task in document.tasks if task in self.loaded)
        self.document = document.model_copy(update={"tasks": max(tasks, self.document.tasks, key=len)})

    async def update(self, event: RunEvent, **changes: Any) -> None:
        """Change the document, and record the event that reports it."""
        await self._change([event], lambda _: changes)

    async def _change(self, events: Sequence[RunEvent], decide: Callable[[RunDocument], Mapping[str, Any]]) -> None:
        """Record the changes that `decide` derives from the stored document, and the events that report them."""
        while True:
            version, before = await self.read()
            amended = before.model_copy(update=decide(before))
            write = Write(run_key(amended.id), version, amended.model_dump(mode="json"))
            try:
                await self._writer.commit(Commit([write], [self._writer.event(event) for event in events]))
            except VersionConflict:  # subtasks were added
                continue
            break
        self.adopt(amended)

    async def finish(self, status: str) -> None:
        """Record that the run has no work left; it may still be resumed."""
        await self.update(RunFinished(status=status), ended=self._writer.clock.now())
        failpoint("run.finished")

    async def halt(self, cause: HaltCause, reason: str) -> None:
        """Record the cause of an early stop and the reason for it; the run can be resumed."""
        await self.update(RunHalted(cause=cause, reason=reason), halted=reason, halt_cause=cause)

    async def allow_failing_base(self) -> None:
        """Record that sessions may start although checks fail on the base."""
        await self.update(BaseFailureAllowed(), allow_failing_base=True)

    async def hold(self, task: str, reason: str | None) -> None:
        """Record that a task does not land until it is released; without a new reason, an earlier one stays."""
        released = tuple(name for name in self.document.released if name != task)
        held = {**self.document.held, task: reason or self.document.held.get(task, "")}
        if (held, released) != (self.document.held, self.document.released):
            await self.update(TaskHeld(task=task, reason=reason), held=held, released=released)

    async def release(self, task: str) -> None:
        """Record that a task may land, although a user held it or a conflict is predicted."""
        held = {name: reason for name, reason in self.document.held.items() if name != task}
        released = tuple(dict.fromkeys((*self.document.released, task)))
        if (held, released) != (self.document.held, self.document.released):
            await self.update(TaskReleased(task=task), held=held, released=released)

    async def record_predictions(self, conflicts: Mapping[tuple[str, str], bool]) -> None:
        """Record which pairs of tasks have predicted conflicts now, for the holds that follow from them."""
        added = {pair for pair, is_predicted in conflicts.items() if is_predicted}
        await self._change(
            (),
            lambda run: {"predicted_conflicts": tuple(sorted({*run.predicted_conflicts} - conflicts.keys() | added))},
        )

    async def bump(self, task: str) -> None:
        """Record that a task lands before all others."""
        others = [name for name in self.document.bumped if name != task]
        await self.update(TaskBumped(task=task), bumped=(task, *others))

    async def set_budget(self, limits: Mapping[str, float]) -> None:
        """Record new limits of the run's budget, by key."""
        overrides = tuple(dict.fromkeys((*self.document.overrides, "budget")))
        budget = self.document.budget.model_copy(update=limits)
        await self.update(RunBudgetChanged(limits=limits), budget=budget, overrides=overrides)
