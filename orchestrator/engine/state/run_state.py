"""The run document and the adapter states, as seen by one orchestrator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from orchestrator.domain.events.base import RunEvent
from orchestrator.domain.events.runs import (
    AdapterCooldown,
    AdapterDisabled,
    AdapterEnabled,
    AdapterEvent,
    BaseFailureAllowed,
    RunBudgetChanged,
    RunFinished,
    RunHalted,
)
from orchestrator.domain.events.tasks import TaskBumped, TaskHeld, TaskReleased
from orchestrator.domain.runs.model import AdapterDocument, HaltCause, RunDocument, TaskDocument
from orchestrator.domain.runs.retry import compute_cooldown_end
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.engine.state.records import adapter_key, run_key, task_key
from orchestrator.engine.state.writer import RunWriter
from orchestrator.errors import RefusedError, VersionConflict
from orchestrator.protocols import Commit, Write
from orchestrator.system.failpoints import failpoint

#: The minimum change of a cooldown's end to record it again, in seconds: programs report whole seconds.
_MIN_EXTENSION = 1.0


class AdapterUpdate(NamedTuple):
    """A new adapter document and its event, to which `RunState` adds the adapter's name."""

    document: AdapterDocument
    event: AdapterEvent


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
        while True:
            version, before = await self.read()
            amended = before.model_copy(update=changes)
            write = Write(run_key(amended.id), version, amended.model_dump(mode="json"))
            try:
                await self._writer.commit(Commit([write], [self._writer.event(event)]))
            except VersionConflict:  # subtasks were added
                continue
            break
        self.adopt(amended)

    async def finish(self, status: str) -> None:
        """Record that the run has no work left; it may still be resumed."""
        await self.update(RunFinished(status=status), ended=self._writer.clock.now())
        failpoint("run.finished")

    async def halt(self, cause: HaltCause, reason: str) -> None:
        """Record the cause and the reason of an early stop; the run can be resumed."""
        await self.update(RunHalted(cause=cause, reason=reason), halted=reason, halt_cause=cause)

    async def allow_failing_base(self) -> None:
        """Record that sessions may start although checks fail on the base."""
        await self.update(BaseFailureAllowed(), allow_failing_base=True)

    async def hold(self, task: str, reason: str | None) -> None:
        """Record that a task does not land until it is released."""
        await self.update(TaskHeld(task=task, reason=reason), held={**self.document.held, task: reason or ""})

    async def release(self, task: str) -> None:
        """Record that a held task may land."""
        if task in self.document.held:
            held = {name: reason for name, reason in self.document.held.items() if name != task}
            await self.update(TaskReleased(task=task), held=held)

    async def bump(self, task: str) -> None:
        """Record that a task lands before all others."""
        others = [name for name in self.document.bumped if name != task]
        await self.update(TaskBumped(task=task), bumped=(task, *others))

    async def set_budget(self, limits: Mapping[str, float]) -> None:
        """Record new limits of the run's budget, by key."""
        overrides = tuple(dict.fromkeys((*self.document.overrides, "budget")))
        budget = self.document.budget.model_copy(update=limits)
        await self.update(RunBudgetChanged(limits=limits), budget=budget, overrides=overrides)


class AdapterStates:
    """The states of a run's adapters: cooldowns, and whether they are disabled."""

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer

    async def read(self, adapter: str) -> AdapterDocument:
        """Return the state of an adapter in this run, with its probe only while that session runs."""
        return (await self._read_probed(adapter))[1]

    async def update(
        self, adapter: str, decide: Callable[[AdapterDocument], AdapterUpdate | None]
    ) -> tuple[AdapterDocument, bool]:
        """Record the update that `decide` derives from an adapter's state.

        Return the state and whether it changed. `decide` is called again if another orchestrator updates the adapter
        concurrently.
        """
        writer, key = self._writer, adapter_key(self._writer.run, adapter)
        while True:
            version, known = await self._read(adapter)
            if (update := decide(known)) is None:
                return known, False
            value = writer.sanitize(update.document.model_dump(mode="json"))
            event = writer.event(update.event.within(adapter=adapter))
            with suppress(VersionConflict):
                await writer.commit(Commit([Write(key, version, value)], [event]))
                return update.document, True

    async def enable(self, adapter: str) -> AdapterDocument:
        """Enable an adapter that is cooling down or disabled; return its state."""
        enabled = AdapterUpdate(AdapterDocument(enabled_at=self._writer.clock.now()), AdapterEnabled())
        known, _ = await self.update(
            adapter, lambda known: enabled if known.disabled_reason or known.cooldown_until else None
        )
        return known

    async def start_cooldown(self, adapter: str, until: float | None, reason: str) -> AdapterDocument:
        """Record an adapter's cooldown until the reported time, if known; return its state."""
        now = self._writer.clock.now()

        def decide(known: AdapterDocument) -> AdapterUpdate | None:
            # Concurrent sessions that reach the same limit count as one cooldown.
            known_end = known.cooldown_until if known.is_cooling_down(now) else None
            cooldowns = known.cooldowns + (known_end is None)
            end = compute_cooldown_end(now, until, cooldowns)
            if known_end is not None and (until is None or end - known_end < _MIN_EXTENSION):
                return None
            cooling = AdapterDocument(cooldown_until=end, cooldown_since=now, cooldowns=cooldowns)
            return AdapterUpdate(cooling, AdapterCooldown(until=end, reason=reason))

        known, is_new = await self.update(adapter, decide)
        if is_new:
            failpoint("adapter.cooling_down")
        return known

    async def disable(self, adapter: str, reason: str, started: float) -> AdapterDocument:
        """Disable an adapter unless it was enabled after `started`; return its state."""
        disabled = AdapterUpdate(AdapterDocument(disabled_reason=reason), AdapterDisabled(reason=reason))

        def decide(known: AdapterDocument) -> AdapterUpdate | None:
            return disabled if known.disabled_reason is None and started >= (known.enabled_at or 0.0) else None

        return (await self.update(adapter, decide))[0]

    async def plan_probe(self, adapter: str, task: str) -> Sequence[Write] | None:
        """Return the writes that let a task's session probe an adapter after a cooldown.

        None if another session does, or if it is unavailable. Empty if it needs no probe.
        """
        version, known = await self._read_probed(adapter)
        if known.probe or known.disabled_reason is not None or known.is_cooling_down(self._writer.clock.now()):
            return None
        if not known.cooldowns:
            return []
        probed = known.model_copy(update={"probe": task})
        return [Write(adapter_key(self._writer.run, adapter), version, probed.model_dump(mode="json"))]

    async def clear_cooldown(self, adapter: str) -> None:
        """Forget the cooldowns of an adapter, because a later session had a response."""
        enabled, now = AdapterUpdate(AdapterDocument(), AdapterEnabled()), self._writer.clock.now()
        await self.update(
            adapter, lambda known: enabled if known.cooldowns and not known.is_cooling_down(now) else None
        )

    async def _read_probed(self, adapter: str) -> tuple[int, AdapterDocument]:
        version, known = await self._read(adapter)
        if known.probe is not None:
            # Read from the store, because its start may not have reached this process.
            stored = await self._writer.store.get(task_key(self._writer.run, known.probe))
            task = TaskDocument() if stored is None else TaskDocument.model_validate_json(stored.encoded)
            if task.status is not TaskStatus.RUNNING or task.attempt.adapter != adapter:
                known = known.model_copy(update={"probe": None})
        return version, known

    async def _read(self, adapter: str) -> tuple[int, AdapterDocument]:
        stored = await self._writer.store.get(adapter_key(self._writer.run, adapter))
        if stored is None:
            return 0, AdapterDocument()
        return stored.version, AdapterDocument.model_validate(stored.value)
