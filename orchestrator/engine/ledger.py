"""The run's documents as their owner sees them; every change is one commit under the owner's epoch."""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
from pydantic import TypeAdapter, ValidationError

from orchestrator.clock import Clock
from orchestrator.domain.claims import Owner, Release, Standing
from orchestrator.domain.dispatch import Entry
from orchestrator.domain.holdings import HeldBy as OwnedBy
from orchestrator.domain.lifecycle import TRANSITIONS, Trigger, advance
from orchestrator.domain.model import CLAIMED, AdapterDocument, Request, RunDocument, TaskDocument, TaskStatus
from orchestrator.errors import ClaimLost, HistoryGone, LeaseLost, RefusedError, VersionConflict
from orchestrator.failpoints import failpoint
from orchestrator.locking.claims import Claims, HeldBy
from orchestrator.locking.orchestrators import Orchestrators
from orchestrator.protocols import Commit, Document, Event, Guard, JsonObject, Key, Record, Store, Write

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


#: What each status in which a task is nobody's makes of the claim on it.
_RELEASES: Mapping[TaskStatus, Release] = {
    TaskStatus.PENDING: Release.ABANDONED,
    TaskStatus.CANCELLED: Release.ABANDONED,
    TaskStatus.LANDED: Release.COMPLETE,
    TaskStatus.NO_CHANGE: Release.COMPLETE,
    TaskStatus.CONFLICT: Release.FAILED,
    TaskStatus.FAILED: Release.FAILED,
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


async def _next_lease(store: Store, clock: Clock, run: str, owner: Owner) -> tuple[Write, int]:
    """Return the write that makes an orchestrator a run's coordinator, and the epoch under which it is."""
    lease = await store.get(_lease_key(run))
    version = lease.version if lease else 0
    # Each owner writes the lease once: its version is the epoch, and known even where its bytes are damaged.
    value = {"orchestrator": owner.id, "host": owner.host, "pid": owner.pid, "since": clock.now(), "epoch": version + 1}
    return Write(_lease_key(run), version, value), version + 1


async def seize(store: Store, clock: Clock, run: str, owner: Owner) -> Guard:
    """Become a run's owner under the next epoch without working in it; whoever was can write nothing any more."""
    write, epoch = await _next_lease(store, clock, run, owner)
    ended = {"ended": clock.now(), "reason": "a checkpoint of the run was restored"}
    fences = [
        Write(one.key, one.version, {**one.value, **ended, "epoch": one.value["epoch"] + 1})
        for one in await store.list("orchestrator", f"{run}/")
        if one.value["ended"] is None
    ]
    seized = Event("run.seized", {"run": run, "epoch": epoch, "pid": owner.pid})
    await store.commit(Commit([write, *fences], [seized]))
    failpoint("run.seized")
    return Guard(_lease_key(run), epoch)


#: What a commit that starts an attempt must also write, or who is in the way.
Plan = Awaitable[Sequence[Write] | OwnedBy]


class Update(NamedTuple):
    """What an event says of a task, and which fields of its document change."""

    details: JsonObject
    changes: Mapping[str, Any]


class Change(NamedTuple):
    """What another orchestrator or a person did to a run."""

    task: str | None = None
    """Where a task is now is in the ledger."""
    before: TaskDocument | None = None
    """Where it was."""
    retry_in: float | None = None
    """After how many seconds it may be tried again, where it waits for that."""
    adapter: tuple[str, AdapterDocument] | None = None
    """What was learned about an adapter, by its name."""
    request: Request | None = None
    is_lost: bool = False
    """Whether the task had been claimed by this orchestrator."""
    halted: str | None = None
    """Why the run was stopped before its end."""


class Ledger:
    """A run as one of its orchestrators has it: what it changes is refused once another has taken over.

    One of them coordinates: it holds the run's lease and does what is to be done once. Each holds a claim on every task
    that it is at, from its start until it is over or waits to be tried again.
    """

    def __init__(
        self,
        store: Store,
        run: RunDocument,
        tasks: Mapping[str, Document],
        redactor: Redactor,
        orchestrators: Orchestrators,
        clock: Clock,
        *,
        is_shared: bool = True,
    ) -> None:
        """Take the documents as read; `redactor` takes secrets out of all that is recorded.

        Unless it `is_shared`, there are no claims: nobody but the coordinator can be at work in the run.
        """
        self.run, self._redactor = run, redactor
        self.orchestrators = orchestrators
        self.claims = Claims(store, clock, orchestrators) if is_shared else None
        self.coordinates = anyio.Event()
        """Set once this orchestrator is the coordinator."""
        self._under_way: set[str] = set()
        """Tasks that are being changed by this orchestrator."""
        self._read: list[Change] = []
        self.damaged = frozenset(task for task, found in tasks.items() if found.damaged)
        self._store, self._clock = store, clock
        self._tasks = task_documents(tasks, run.tasks)
        self._versions = {task: tasks[task].version for task in run.tasks}
        self._guards: tuple[Guard, ...] = (orchestrators.guard,)
        self._slowest = 0.0

    @classmethod
    async def take(
        cls,
        store: Store,
        clock: Clock,
        redactor: Redactor,
        orchestrators: Orchestrators,
        facts: JsonObject,
        *,
        is_shared: bool = True,
    ) -> Ledger:
        """Load a run and become its coordinator under the next epoch; `facts` are recorded with that.

        RefusedError where somebody else who lives is.
        """
        run = orchestrators.run
        tasks = await read_tasks(store, run)
        document = await read_run(store, run)
        ledger = cls(store, document, tasks, redactor, orchestrators, clock, is_shared=is_shared)
        if (holder := await ledger._coordinator()) is not None:
            what = f"run {run} is at work under process {holder.pid} on {holder.host}"
            raise RefusedError(what, "wait for it, stop it with SIGINT, or join it by `council work`")
        found = await store.get(run_key(run))
        amended = []
        if found is not None and (ledger.run.ended, ledger.run.halted) != (None, None):
            ledger.run = ledger.run.model_copy(update={"ended": None, "halted": None})
            amended.append(Write(run_key(run), found.version, ledger.run.model_dump(mode="json")))
        await ledger._lead([orchestrators.joining(), *amended], facts)
        orchestrators.joined()
        return ledger

    @classmethod
    async def join(
        cls, store: Store, clock: Clock, redactor: Redactor, orchestrators: Orchestrators, facts: JsonObject
    ) -> Ledger:
        """Load a run and become one of those who are at work in it; `facts` are recorded with that."""
        run = orchestrators.run
        tasks = await read_tasks(store, run)
        ledger = cls(store, await read_run(store, run), tasks, redactor, orchestrators, clock)
        me = orchestrators.me
        joined = Event("run.joined", {"run": run, "orchestrator": me.id, "host": me.host, "pid": me.pid, **facts})
        await store.commit(Commit([orchestrators.joining()], [joined]))
        orchestrators.joined()
        return ledger

    async def _coordinator(self) -> Owner | None:
        """Return who coordinates the run, if somebody else does who lives."""
        lease = await self._store.get(_lease_key(self.run.id))
        found = None if lease is None or lease.damaged else lease.value.get("orchestrator")
        if found in {None, self.orchestrators.me.id}:
            return None
        holder = await self.orchestrators.find(found)
        if holder is None or await self.orchestrators.standing(holder) is not Standing.ALIVE:
            return None
        return holder.owner

    async def _lead(self, writes: Sequence[Write], facts: JsonObject) -> None:
        me, run = self.orchestrators.me, self.run.id
        lease, epoch = await _next_lease(self._store, self._clock, run, me)
        claimed = Event("run.claimed", {"run": run, "epoch": epoch, "pid": me.pid, **facts})
        await self._store.commit(Commit([lease, *writes], [claimed]))
        self._guards = (self.orchestrators.guard, Guard(_lease_key(run), epoch))
        self.coordinates.set()
        failpoint("run.claimed")

    async def campaign(self) -> bool:
        """Become the coordinator if nobody who lives is; whether this orchestrator has become it now."""
        if self.coordinates.is_set() or await self._coordinator() is not None:
            return False
        with suppress(VersionConflict):  # another was quicker
            await self._lead([], {})
            self.orchestrators.promote()
        return self.coordinates.is_set()

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

    async def change_all(self, trigger: Trigger, updates: Mapping[str, Update], permits: Sequence[Guard] = ()) -> None:
        """Move tasks along their lifecycles and record it as `change` does, all of them or none; `permits` must hold.

        ClaimLost where another has taken one of them over.
        """
        writes, events, moved = [], [], {}
        guards: list[Guard] = list(permits)
        for task, update in updates.items():
            if self.is_elsewhere(task) or (self._tasks[task].status, trigger) not in TRANSITIONS:
                await self.hold(task)
            moved[task] = after = self._after(task, trigger, update)
            events.append(self._task_event(task, trigger, after, update))
            writes.append(Write(task_key(self.run.id, task), self._versions[task], after.model_dump(mode="json")))
            if self.claims is not None and (guard := self.claims.guard(task)) is not None:
                guards.append(guard)
                if after.status not in CLAIMED:
                    counts = trigger in {Trigger.RETRY, Trigger.BOUNCE}
                    writes.append(self.claims.ending(task, _RELEASES[after.status], after.reason, counts=counts))
        if trigger is Trigger.REVIVE and self.claims is not None:
            for task in updates:
                writes += await self.claims.afresh(task)
        self._under_way.update(updates)
        try:
            await self._commit(Commit(writes, events, [*self._guards, *guards]))
        except (LeaseLost, VersionConflict):
            await self._tell_lost(updates)
            raise
        finally:
            self._under_way.difference_update(updates)
        for task, after in moved.items():
            self._take_in(task, self._versions[task] + 1, after)

    async def start(
        self, task: str, details: JsonObject, also: Callable[[Guard], Plan] | None = None, **changes: Any
    ) -> HeldBy | OwnedBy | None:
        """Claim a task and record its next attempt, in one commit; return who was quicker, if somebody was.

        `also` plans, by the guard of the claim, what else is to be had with it: the writes, or who is in the way.
        """
        self._under_way.add(task)
        try:
            return await self._start(task, Update(details, changes), also)
        finally:
            self._under_way.discard(task)

    async def _start(self, task: str, update: Update, also: Callable[[Guard], Plan] | None) -> HeldBy | OwnedBy | None:
        key = task_key(self.run.id, task)
        while True:
            taking = None if self.claims is None else await self.claims.plan(task)
            if isinstance(taking, HeldBy):
                await self.refresh(task)
                return taking
            more = [] if taking is None or also is None else await also(taking.guard)
            if isinstance(more, OwnedBy):
                return more
            after = self._after(task, Trigger.START, update)
            event = self._task_event(task, Trigger.START, after, update)
            writes = [Write(key, self._versions[task], after.model_dump(mode="json")), *more]
            try:
                await self._commit(
                    Commit([*writes, *([taking.write] if taking is not None else [])], [event], self._guards)
                )
            except VersionConflict:
                self.orchestrators.count(conflicts=1)
                if await self.refresh(task) and self._tasks[task].status is not TaskStatus.PENDING:
                    claim = None if self.claims is None else await self.claims.read(task)
                    if claim is None:
                        raise
                    return HeldBy(claim, None)
                continue
            if taking is not None and self.claims is not None:
                self.claims.took(task, taking)
            self._take_in(task, self._versions[task] + 1, after)
            return None

    async def claim(self, task: str, *, override: bool = False) -> bool:
        """Claim a task where it stands, such as one that waits to land and is nobody's; whether it is ours now."""
        if self.claims is None:
            return True
        self._under_way.add(task)  # what another did to it before is read here, and is no loss of this claim
        try:
            if task not in self.claims and isinstance(await self.claims.claim(task, override=override), HeldBy):
                return False
            before = self._tasks[task]
            if await self.refresh(task, released=False):
                self._read.append(Change(task, before))
            if (status := self._tasks[task].status) in CLAIMED:
                return True
            await self.claims.release(task, _RELEASES[status])  # it was over before
            return False
        finally:
            self._under_way.discard(task)

    def read_by_claiming(self) -> Sequence[Change]:
        """Return once what others had done to tasks and was read when these were claimed: `changes` won't tell it."""
        read, self._read = self._read, []
        return read

    async def let_go(self, task: str) -> None:
        """Release the claim on a task that is nobody's where it stands: a checkpoint may have brought it back there."""
        document = self._tasks[task]
        if self.claims is not None and task in self.claims and document.status not in CLAIMED:
            await self.claims.release(task, _RELEASES[document.status], document.reason)

    def is_elsewhere(self, task: str) -> bool:
        """Whether a task is at work, or waits to land, by another orchestrator."""
        return self.claims is not None and self._tasks[task].status in CLAIMED and task not in self.claims

    async def hold(self, task: str) -> None:
        """Make sure that this orchestrator has the claim on a task; ClaimLost where another has taken it over."""
        if self.claims is not None and task not in self.claims:
            await self.refresh(task)
            await self._tell_lost([task])

    async def refresh(self, task: str, *, released: bool = True) -> bool:
        """Look where a task is now; whether that is another place than was known.

        Unless `released`, a claim on it stays though it may be over.
        """
        found = await self._store.get(task_key(self.run.id, task))
        if found is None or found.version <= self._versions[task]:
            return False
        after = TaskDocument.model_validate_json(found.encoded)
        if released:
            self._take_in(task, found.version, after)
        else:
            self._tasks[task], self._versions[task] = after, found.version
        return True

    def _take_in(self, task: str, version: int, after: TaskDocument) -> None:
        if version > self._versions[task]:
            self._tasks[task], self._versions[task] = after, version
        if self.claims is not None and after.status not in CLAIMED:
            self.claims.released(task)

    def _after(self, task: str, trigger: Trigger, update: Update) -> TaskDocument:
        after = advance(f"task {task!r}", self._tasks[task], trigger, **update.changes)
        return TaskDocument.model_validate(self._redacted(after.model_dump(mode="json")))

    def _task_event(self, task: str, trigger: Trigger, after: TaskDocument, update: Update) -> Event:
        attempt = {"attempt": after.attempt.number} if after.attempts else {}
        return self._event(TASK_EVENTS[trigger], {"task": task, **attempt, **update.details})

    async def _tell_lost(self, tasks: Iterable[str]) -> None:
        """Raise the error that says by whom tasks were taken over, if they were."""
        if self.claims is None:
            return
        for task in tasks:
            guard, claim = self.claims.guard(task), await self.claims.read(task)
            if claim is not None and (guard is None or claim.epoch != guard.epoch):
                self.claims.lost(task)
                raise ClaimLost(task, 0 if guard is None else guard.epoch, claim.epoch, claim.owner.id)

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

    async def changes(self) -> AsyncGenerator[Change]:
        """Yield what was asked of the run and is not done yet, then whatever others do to it or ask, as it comes."""
        while True:
            position = await self._store.position()
            for task in self.run.tasks:
                before = self._tasks[task]
                if task not in self._under_way and await self.refresh(task):
                    yield Change(task, before)
            for request in await self.requests():
                yield Change(request=request)
            with suppress(HistoryGone):  # who was stopped for long looks anew
                async for record in self._store.watch(position):
                    for key, (version, value) in record.documents.items():
                        if value is not None and f"{key.id}/".startswith(f"{self.run.id}/"):
                            for change in self._seen(record, key, version, value):
                                yield change

    def _seen(self, record: Record, key: Key, version: int, value: JsonObject) -> Iterable[Change]:
        name = key.id.partition("/")[2]
        if key == run_key(self.run.id):
            self.run = RunDocument.model_validate(value)
            if self.run.halted is not None:
                yield Change(halted=self.run.halted)
        elif key.kind == "request":
            yield Change(request=Request.model_validate(value))
        elif key.kind == "adapter":
            yield Change(adapter=(name, AdapterDocument.model_validate(value)))
        elif key.kind == "task" and version > self._versions[name] and name not in self._under_way:
            is_lost = self.claims is not None and name in self.claims
            if is_lost and self.claims is not None:
                self.claims.released(name)
            before = self._tasks[name]
            self._take_in(name, version, TaskDocument.model_validate(value))
            delays = [one.data.get("retry_in") for one in record.events if one.data.get("task") == name]
            yield Change(name, before, next(filter(None, delays), None), is_lost=is_lost)

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
        try:
            await self._store.commit(commit)
        except LeaseLost:
            if (fenced := await self.orchestrators.fenced()) is not None:
                self.orchestrators.count(refused=1)
                raise fenced from None
            raise
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
