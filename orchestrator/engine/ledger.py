"""The run's documents as their owner sees them; every change is one commit under the owner's epoch."""

from __future__ import annotations

import math
import os
import secrets
import socket
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from orchestrator.clock import Clock
from orchestrator.domain.dispatch import Entry
from orchestrator.domain.lifecycle import Trigger, advance
from orchestrator.domain.model import AdapterDocument, Request, RunDocument, TaskDocument, TaskStatus
from orchestrator.errors import HistoryGone, RefusedError
from orchestrator.failpoints import failpoint
from orchestrator.protocols import Commit, Document, Event, Guard, JsonObject, Key, Store, Write

if TYPE_CHECKING:
    from orchestrator.config.model import TaskSpec
    from orchestrator.domain.secrets import Redactor

#: The event that each change of a task is recorded with.
TASK_EVENTS: Mapping[Trigger, str] = {
    Trigger.START: "task.started",
    Trigger.RETRY: "task.retrying",
    Trigger.HOLD: "task.held",
    Trigger.INTERRUPT: "task.interrupted",
    Trigger.FAIL: "task.failed",
    Trigger.IDLE: "task.no_change",
    Trigger.BUILD: "task.queued",
    Trigger.CHECK: "task.checking",
    Trigger.REQUEUE: "task.requeued",
    Trigger.BOUNCE: "task.retrying",
    Trigger.REJECT: "task.failed",
    Trigger.INTEND: "task.landing",
    Trigger.UNDO: "task.landing_undone",
    Trigger.DEFER: "task.deferred",
    Trigger.CONFLICT: "task.conflict",
    Trigger.ADOPT: "task.landed",
    Trigger.LAND: "task.landed",
    Trigger.LOSE: "task.failed",
    Trigger.DISTRUST: "task.failed",
    Trigger.CANCEL: "task.cancelled",
    Trigger.IGNORE: "task.ignored",
    Trigger.REVIVE: "task.revived",
}


#: How many of the checkpoints stay that a run makes by the clock.
KEPT_CHECKPOINTS = 12

#: Thousands of documents are validated in one go: one call for each would cost several times as much.
_TASKS = cache(lambda: TypeAdapter(list[TaskDocument]))
_ENTRIES = cache(lambda: TypeAdapter(list[Entry]))

#: The fields of documents and events whose text is not our own.
_SAID = frozenset({"reason", "feedback", "paths", "closed", "changes", "worktree", "words"})


def new_run_id(now: float) -> str:
    """Return a run id that sorts by time: date, time (UTC) and a few random characters."""
    return f"{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def run_key(run: str) -> Key:
    """Return the key of a run's document."""
    return Key("run", run)


def task_key(run: str, task: str) -> Key:
    """Return the key of a task's state."""
    return Key("task", f"{run}/{task}")


def spec_key(run: str, task: str) -> Key:
    """Return the key of what a task was asked to do; written once."""
    return Key("spec", f"{run}/{task}")


def request_key(run: str, request: str) -> Key:
    """Return the key of what was asked of a run's owner; deleted when it is done."""
    return Key("request", f"{run}/{request}")


def cursor_key(run: str, kind: str, name: str) -> Key:
    """Return the key of how far a run's events have been delivered, to a `sink` or a `tracker`."""
    return Key("cursor", f"{run}/{kind}/{name}")


def _adapter_key(run: str, adapter: str) -> Key:
    return Key("adapter", f"{run}/{adapter}")


def _lease_key(run: str) -> Key:
    return Key("lease", f"run/{run}")


async def seed(store: Store, run: RunDocument, specs: Mapping[str, TaskSpec]) -> None:
    """Record a new run with all of its tasks, at once."""
    writes = [Write(run_key(run.id), 0, run.model_dump(mode="json"))]
    for task, spec in specs.items():
        writes.append(Write(spec_key(run.id, task), 0, spec.model_dump(mode="json")))
        writes.append(Write(task_key(run.id, task), 0, TaskDocument().model_dump(mode="json")))
    begin = {"position": await store.position()}
    for kind, names in (("sink", run.sinks), ("tracker", run.trackers)):
        writes += [Write(cursor_key(run.id, kind, name), 0, begin) for name in names]
    created = Event("run.created", {"run": run.id, "tasks": len(specs), "target": run.target})
    await store.commit(Commit(writes, [created]))
    failpoint("run.seeded")


async def read_run(store: Store, run: str) -> RunDocument:
    """Return a run's document; RefusedError if there is none, it is damaged, or of a version that says other things."""
    found = await store.get(run_key(run))
    if found is None:
        raise RefusedError(f"there is no run {run!r}", "`council runs` lists them")
    try:
        return RunDocument.model_validate_json(_trusted(store, found))
    except ValidationError:
        what = f"the record of run {run} is none that this version of council can read"
        raise RefusedError(what, "use the version that wrote it, or name another run") from None


async def read_task(store: Store, run: str, task: str) -> TaskDocument:
    """Return where one task is."""
    found = await store.get(task_key(run, task))
    if found is None:
        raise RefusedError(f"run {run} has no task {task!r}", "`council status` names them")
    return TaskDocument.model_validate_json(found.encoded)


async def read_spec(store: Store, run: str, task: str) -> TaskSpec:
    """Return what a task was asked to do; RefusedError if that is missing or damaged."""
    # Late: its models take as long to make as all of what shows a run takes to read.
    from orchestrator.config.model import TaskSpec  # noqa: PLC0415

    found = await store.get(spec_key(run, task))
    if found is None:
        raise RefusedError(f"the record of task {task!r} is missing", "start a new run")
    return TaskSpec.model_validate_json(_trusted(store, found))


async def read_tasks(store: Store, run: str) -> dict[str, Document]:
    """Return the state documents of a run's tasks by task id."""
    return await _named(store, "task", run)


def task_documents(found: Mapping[str, Document], tasks: Sequence[str]) -> dict[str, TaskDocument]:
    """Return the state of each of the tasks from their documents, in the order of `tasks`."""
    for task in tasks:
        if task not in found:
            what = f"nothing is recorded any more of how task {task} stands"
            raise RefusedError(what, "go back to a checkpoint (`council checkpoint list`), or start a new run")
    encoded = [found[task].encoded for task in tasks]
    # Those that have not begun are all the same, and none can be changed.
    distinct = dict.fromkeys(encoded)
    read = dict(zip(distinct, _TASKS().validate_json(_joined(distinct)), strict=True))
    return {task: read[one] for task, one in zip(tasks, encoded, strict=True)}


async def read_entries(store: Store, run: RunDocument, blank: Collection[str] = ()) -> dict[str, Entry]:
    """Return what decisions need of each task, in the order of the file; of those that are `blank`, nothing."""
    found = await _named(store, "spec", run.id)
    for item in found.values():
        if item.damaged:
            raise _damaged(store, item)
    wanted = [task for task in run.tasks if task not in blank]
    read = _ENTRIES().validate_json(_joined(found[task].encoded for task in wanted))
    return {**dict.fromkeys(run.tasks, Entry()), **dict(zip(wanted, read, strict=True))}


async def read_adapters(store: Store, run: RunDocument) -> dict[str, AdapterDocument]:
    """Return what a run has learned about its adapters, by name."""
    found = await _named(store, "adapter", run.id)
    return {name: AdapterDocument.model_validate(item.value) for name, item in found.items()}


async def read_requests(store: Store, run: str) -> list[Request]:
    """Return what was asked of a run's owner and is not done yet, the oldest first."""
    found = sorted(await store.list("request", f"{run}/"), key=lambda one: one.position)
    return [Request.model_validate(one.value) for one in found]


def _joined(values: Iterable[bytes]) -> bytes:
    return b"[" + b",".join(values) + b"]"


def _trusted(store: Store, found: Document) -> bytes:
    if found.damaged:
        raise _damaged(store, found)
    return found.encoded


def _damaged(store: Store, found: Document) -> RefusedError:
    places = ", ".join(dict.fromkeys(f"{one.path} at byte {one.offset}" for one in store.damage))
    return RefusedError(
        f"the record of {found.key} is damaged in the state log ({places})",
        "`council state verify --repair` settles for what can be read, and `council resume` goes on from there; or "
        "start a new run: what has landed stays landed, and the branches of this run are kept",
    )


async def _named(store: Store, kind: str, run: str) -> dict[str, Document]:
    """Return the documents of a kind that a run has, each by the rest of its id."""
    prefix = f"{run}/"
    return {found.key.id[len(prefix) :]: found for found in await store.list(kind, prefix)}


async def _next_lease(store: Store, clock: Clock, run: str) -> tuple[Write, int]:
    """Return the write that makes this process a run's owner, and the epoch under which it is."""
    lease = await store.get(_lease_key(run))
    version = lease.version if lease else 0
    # Each owner writes the lease once: its version is the epoch, and known even where its bytes are damaged.
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": clock.now(), "epoch": version + 1}
    return Write(_lease_key(run), version, owner), version + 1


async def seize(store: Store, clock: Clock, run: str) -> Guard:
    """Become a run's owner under the next epoch without working in it; whoever was can write nothing any more."""
    write, epoch = await _next_lease(store, clock, run)
    seized = Event("run.seized", {"run": run, "epoch": epoch, "pid": os.getpid()})
    await store.commit(Commit([write], [seized]))
    failpoint("run.seized")
    return Guard(_lease_key(run), epoch)


class Update(NamedTuple):
    """What an event says of a task, and which fields of its document change."""

    details: JsonObject
    changes: Mapping[str, Any]


class Ledger:
    """A run under one owner. The caller holds the run's file lock; the epoch is what the store checks."""

    def __init__(
        self, store: Store, clock: Clock, run: RunDocument, tasks: Mapping[str, Document], redactor: Redactor
    ) -> None:
        """Take the documents as read; `redactor` takes secrets out of all that is recorded."""
        self.run, self._redactor = run, redactor
        self.damaged = frozenset(task for task, found in tasks.items() if found.damaged)
        self._store, self._clock = store, clock
        self._tasks = task_documents(tasks, run.tasks)
        self._versions = {task: tasks[task].version for task in run.tasks}
        self._guards: tuple[Guard, ...] = ()
        self._slowest = 0.0

    @classmethod
    async def take(cls, store: Store, clock: Clock, run: str, redactor: Redactor, facts: JsonObject) -> Ledger:
        """Load a run and become its owner under the next epoch; `facts` are recorded with that."""
        ledger = cls(store, clock, await read_run(store, run), await read_tasks(store, run), redactor)
        lease, epoch = await _next_lease(store, clock, run)
        writes = [lease]
        found = await store.get(run_key(run))
        if found is not None and (ledger.run.ended, ledger.run.halted) != (None, None):
            ledger.run = ledger.run.model_copy(update={"ended": None, "halted": None})
            writes.append(Write(run_key(run), found.version, ledger.run.model_dump(mode="json")))
        claimed = Event("run.claimed", {"run": run, "epoch": epoch, "pid": os.getpid(), **facts})
        await store.commit(Commit(writes, [claimed]))
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
        return await read_spec(self._store, self.run.id, task)

    async def change(self, task: str, trigger: Trigger, details: JsonObject | None = None, **changes: Any) -> None:
        """Move a task along its lifecycle and record it, with an event that carries `details`."""
        await self.change_all(trigger, {task: Update(details or {}, changes)})

    async def change_all(self, trigger: Trigger, updates: Mapping[str, Update]) -> None:
        """Move tasks along their lifecycles and record it as `change` does, all of them or none."""
        writes, events, moved = [], [], {}
        for task, update in updates.items():
            after = advance(f"task {task!r}", self._tasks[task], trigger, **update.changes)
            moved[task] = after = TaskDocument.model_validate(self._redacted(after.model_dump(mode="json")))
            attempt = {"attempt": after.attempt.number} if after.attempts else {}
            events.append(self._event(TASK_EVENTS[trigger], {"task": task, **attempt, **update.details}))
            writes.append(Write(task_key(self.run.id, task), self._versions[task], after.model_dump(mode="json")))
        await self._commit(Commit(writes, events, self._guards))
        self._tasks |= moved
        for task in moved:
            self._versions[task] += 1

    async def note(self, event: str, details: JsonObject) -> None:
        """Record something that happened to the run and changes no document."""
        await self._commit(Commit([], [self._event(event, details)], self._guards))

    async def adapter(self, adapter: str) -> AdapterDocument:
        """Return what the run has learned about an adapter."""
        found = await self._store.get(_adapter_key(self.run.id, adapter))
        return AdapterDocument() if found is None else AdapterDocument.model_validate(found.value)

    async def learn(self, adapter: str, learned: AdapterDocument, event: str, details: JsonObject) -> None:
        """Record what the run now knows about an adapter."""
        key = _adapter_key(self.run.id, adapter)
        found = await self._store.get(key)
        value = self._redacted(learned.model_dump(mode="json"))
        recorded = self._event(event, {"adapter": adapter, **details})
        await self._commit(Commit([Write(key, found.version if found else 0, value)], [recorded], self._guards))

    async def checkpoint(self) -> None:
        """Make the checkpoint that is due by the clock; of those before it the newest stay."""
        # Late: whoever only looks at a run makes none.
        from orchestrator.state.checkpoints import Maker, create, prune  # noqa: PLC0415

        await create(self._store, self.run.id, "a run at work", maker=Maker.CLOCK, guards=self._guards)
        await prune(self._store, self.run.id, KEPT_CHECKPOINTS, self._guards)

    async def requests(self) -> list[Request]:
        """Return what was asked of the run's owner and is not done yet, the oldest first."""
        return await read_requests(self._store, self.run.id)

    async def new_requests(self) -> AsyncGenerator[Request]:
        """Yield what was asked and is not done yet, then whatever is asked, as it comes."""
        while True:
            position = await self._store.position()
            for request in await self.requests():
                yield request
            with suppress(HistoryGone):  # who was stopped for long looks anew
                async for record in self._store.watch(position):
                    for key, (_, value) in record.documents.items():
                        if key.kind == "request" and key.id.startswith(f"{self.run.id}/") and value is not None:
                            yield Request.model_validate(value)

    async def answer(self, request: Request) -> None:
        """Record that a request was dealt with."""
        key = request_key(self.run.id, request.id)
        found = await self._store.get(key)
        if found is not None:
            event = self._event("request.answered", {"request": request.id})
            await self._commit(Commit([Write(key, found.version, None)], [event], self._guards))

    def slowest_commit(self) -> float:
        """Return how many seconds the slowest commit took since this was asked for the last time."""
        slowest, self._slowest = self._slowest, 0.0
        return slowest

    async def _commit(self, commit: Commit) -> None:
        began = self._clock.monotonic()
        await self._store.commit(commit)
        self._slowest = max(self._slowest, self._clock.monotonic() - began)

    def _event(self, event: str, details: JsonObject) -> Event:
        return Event(event, self._redacted({"run": self.run.id, **details}))

    def _redacted(self, value: JsonObject) -> JsonObject:
        """Take secrets out of what comes from programs; names and ids of our own stay, whatever they look like."""
        return {key: self._redacted_item(key, item) for key, item in value.items()}

    def _redacted_item(self, key: str, item: Any) -> Any:
        if isinstance(item, str):  # programs that cut text in two leave half a surrogate pair, which no store takes
            item = item.encode(errors="replace").decode()
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if key in _SAID:
            return self._redactor.json(item)
        if isinstance(item, list):
            return [self._redacted(one) if isinstance(one, dict) else one for one in item]
        return item

    async def finish(self, status: str) -> None:
        """Record that nothing is left to do in this run; resuming may follow."""
        await self._amend("run.finished", {"status": status}, ended=self._clock.now())
        failpoint("run.finished")

    async def halt(self, reason: str) -> None:
        """Record why this run was stopped before its end; resuming may follow."""
        await self._amend("run.halted", {"reason": reason}, halted=reason)

    async def allow(self, limits: JsonObject) -> None:
        """Record other limits of the run's budget, by their keys."""
        await self._amend("run.budget_changed", limits, budget={**self.run.budget, **limits})

    async def _amend(self, event: str, facts: JsonObject, **changes: Any) -> None:
        found = await self._store.get(run_key(self.run.id))
        amended = self.run.model_copy(update=changes)
        write = Write(run_key(self.run.id), found.version if found else 0, amended.model_dump(mode="json"))
        await self._commit(Commit([write], [self._event(event, facts)], self._guards))
        self.run = amended
