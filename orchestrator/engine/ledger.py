"""The run's documents as their owner sees them; every change is one commit under the owner's epoch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from orchestrator.clock import Clock
from orchestrator.config.model import TaskSpec
from orchestrator.domain.lifecycle import Trigger, advance
from orchestrator.domain.model import RunDocument, TaskDocument, TaskStatus
from orchestrator.errors import RefusedError
from orchestrator.failpoints import failpoint
from orchestrator.protocols import Commit, Document, Event, Guard, JsonObject, Key, Store, Write

#: The event that each change of a task is recorded with.
TASK_EVENTS: Mapping[Trigger, str] = {
    Trigger.START: "task.started",
    Trigger.RETRY: "task.retrying",
    Trigger.INTERRUPT: "task.interrupted",
    Trigger.FAIL: "task.failed",
    Trigger.IDLE: "task.no_change",
    Trigger.BUILD: "task.queued",
    Trigger.INTEND: "task.landing",
    Trigger.UNDO: "task.landing_undone",
    Trigger.DEFER: "task.deferred",
    Trigger.CONFLICT: "task.conflict",
    Trigger.ADOPT: "task.landed",
    Trigger.LAND: "task.landed",
    Trigger.LOSE: "task.failed",
    Trigger.DISTRUST: "task.failed",
}


def run_key(run: str) -> Key:
    """Return the key of a run's document."""
    return Key("run", run)


def task_key(run: str, task: str) -> Key:
    """Return the key of a task's state."""
    return Key("task", f"{run}/{task}")


def spec_key(run: str, task: str) -> Key:
    """Return the key of what a task was asked to do; written once."""
    return Key("spec", f"{run}/{task}")


def _lease_key(run: str) -> Key:
    return Key("lease", f"run/{run}")


async def seed(store: Store, run: RunDocument, specs: Mapping[str, TaskSpec]) -> None:
    """Record a new run with all of its tasks, at once."""
    writes = [Write(run_key(run.id), 0, run.model_dump(mode="json"))]
    for task, spec in specs.items():
        writes.append(Write(spec_key(run.id, task), 0, spec.model_dump(mode="json")))
        writes.append(Write(task_key(run.id, task), 0, TaskDocument().model_dump(mode="json")))
    created = Event("run.created", {"run": run.id, "tasks": len(specs), "target": run.target})
    await store.commit(Commit(writes, [created]))
    failpoint("run.seeded")


async def read_run(store: Store, run: str) -> RunDocument:
    """Return a run's document; RefusedError if there is none or it is damaged."""
    found = await store.get(run_key(run))
    if found is None:
        raise RefusedError(f"there is no run {run!r}", "`council status` names the newest")
    return RunDocument.model_validate(_trusted(store, found))


async def read_tasks(store: Store, run: str) -> dict[str, Document]:
    """Return the state documents of a run's tasks by task id."""
    return {found.key.id.partition("/")[2]: found for found in await store.list("task", f"{run}/")}


async def read_needs(store: Store, run: RunDocument) -> dict[str, tuple[str, ...]]:
    """Return what each task needs, in the order of the file."""
    found = {item.key.id.partition("/")[2]: item for item in await store.list("spec", f"{run.id}/")}
    return {task: tuple(_trusted(store, found[task])["needs"]) for task in run.tasks}


def _trusted(store: Store, found: Document) -> JsonObject:
    if found.damaged:
        places = ", ".join(f"{one.path} at byte {one.offset}" for one in store.damage)
        raise RefusedError(
            f"the record of {found.key} is damaged in the state log ({places})",
            "start a new run; what has landed stays landed, and the branches of this run are kept",
        )
    return found.value


class Ledger:
    """A run under one owner. The caller holds the run's file lock; the epoch is what the store checks."""

    def __init__(self, store: Store, clock: Clock, run: RunDocument, tasks: Mapping[str, Document]) -> None:
        """Take the documents as read."""
        self.run = run
        self.damaged = frozenset(task for task, found in tasks.items() if found.damaged)
        self._store, self._clock = store, clock
        self._tasks = {task: TaskDocument.model_validate(tasks[task].value) for task in run.tasks}
        self._versions = {task: tasks[task].version for task in run.tasks}
        self._guards: tuple[Guard, ...] = ()

    @classmethod
    async def take(cls, store: Store, clock: Clock, run: str) -> Ledger:
        """Load a run and become its owner under the next epoch."""
        ledger = cls(store, clock, await read_run(store, run), await read_tasks(store, run))
        lease = await store.get(_lease_key(run))
        # Each owner writes the lease once: its version is the epoch, and known even where its bytes are damaged.
        epoch = 1 + (lease.version if lease else 0)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": clock.now(), "epoch": epoch}
        write = Write(_lease_key(run), lease.version if lease else 0, owner)
        await store.commit(Commit([write], [Event("run.claimed", {"run": run, "epoch": epoch, "pid": os.getpid()})]))
        ledger._guards = (Guard(_lease_key(run), epoch),)
        failpoint("run.claimed")
        return ledger

    def task(self, task: str) -> TaskDocument:
        """Return a task's current state."""
        return self._tasks[task]

    def statuses(self) -> dict[str, TaskStatus]:
        """Return the status of every task, in the order of the file."""
        return {task: self._tasks[task].status for task in self.run.tasks}

    async def spec(self, task: str) -> TaskSpec:
        """Return what a task was asked to do."""
        found = await self._store.get(spec_key(self.run.id, task))
        if found is None:
            raise RefusedError(f"the record of task {task!r} is missing", "start a new run")
        return TaskSpec.model_validate(_trusted(self._store, found))

    async def change(self, task: str, trigger: Trigger, details: JsonObject | None = None, **changes: Any) -> None:
        """Move a task along its lifecycle and record it, with an event that carries `details`."""
        before = self._tasks[task]
        after = advance(f"task {task!r}", before, trigger, **changes)
        attempt = {"attempt": after.attempt.number} if after.attempts else {}
        event = Event(TASK_EVENTS[trigger], {"run": self.run.id, "task": task, **attempt, **(details or {})})
        write = Write(task_key(self.run.id, task), self._versions[task], after.model_dump(mode="json"))
        await self._store.commit(Commit([write], [event], self._guards))
        self._tasks[task] = after
        self._versions[task] += 1

    async def note(self, event: str, details: JsonObject) -> None:
        """Record something that happened to the run and changes no document."""
        await self._store.commit(Commit([], [Event(event, {"run": self.run.id, **details})], self._guards))

    async def finish(self, status: str) -> None:
        """Record that nothing is left to do in this run, or that it was interrupted; resuming may follow."""
        found = await self._store.get(run_key(self.run.id))
        ended = self.run.model_copy(update={"ended": self._clock.now()})
        write = Write(run_key(self.run.id), found.version if found else 0, ended.model_dump(mode="json"))
        event = Event("run.finished", {"run": self.run.id, "status": status})
        await self._store.commit(Commit([write], [event], self._guards))
        self.run = ended
        failpoint("run.finished")
