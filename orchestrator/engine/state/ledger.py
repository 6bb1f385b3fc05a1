"""The run's documents as their owner sees them; every change is one commit under the owner's epoch."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from orchestrator.domain.runs.lifecycle import TRANSITIONS, Trigger
from orchestrator.domain.runs.model import (
    CLAIMED_STATUSES,
    AdapterDocument,
    CheckpointOrigin,
    HaltCause,
    RunDocument,
    RunRequest,
    TaskDocument,
    TaskStatus,
)
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.domain.scheduling.path_ownership import OwnershipConflict as OwnedBy
from orchestrator.domain.workflow.handoffs import Handoff
from orchestrator.domain.workflow.routing import Phase, Workflow
from orchestrator.engine.state.leader import find_other_leader, prepare_lease
from orchestrator.engine.state.records import (
    adapter_key,
    handoff_key,
    new_task_writes,
    parse_entry,
    read_handoffs,
    read_requests,
    read_run,
    read_spec,
    read_tasks,
    request_key,
    run_key,
    spec_key,
    task_documents,
    task_key,
)
from orchestrator.engine.state.sanitize import sanitize
from orchestrator.engine.state.transitions import CLAIM_RELEASES, TaskUpdate, Transition, build_transition
from orchestrator.errors import ClaimLost, HistoryCompacted, LeaseLost, RefusedError, RunActive, VersionConflict
from orchestrator.locking.claims import ClaimHolder, Claims
from orchestrator.locking.orchestrators import RunMembership
from orchestrator.locking.ownership import OwnershipRegistry
from orchestrator.protocols import Commit, CommitRecord, Document, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

if TYPE_CHECKING:
    from orchestrator.config.model import TaskSpec
    from orchestrator.domain.security.secrets import Redactor

#: How many of the checkpoints stay that a run makes by the clock.
MAX_CLOCK_CHECKPOINTS = 12

#: How many bases a run keeps on record that have passed their checks.
MAX_PROVEN_BASES = 32

#: What a commit that starts an attempt must also write, or who is in the way.
ClaimPlan = Awaitable["Sequence[Write] | OwnedBy | OutdatedBase"]


class AdapterUpdate(NamedTuple):
    """What a run now knows about an adapter, and the event that tells it."""

    document: AdapterDocument
    event: str
    details: JsonObject


class OutdatedBase(NamedTuple):
    """An attempt was to start from what is not the newest any more."""


class TaskMoved(NamedTuple):
    """A task that somebody else has moved meanwhile."""

    status: TaskStatus


class ExternalChange(NamedTuple):
    """What another orchestrator or a person did to a run."""

    task: str | None = None
    """Where a task is now is in the ledger."""
    before: TaskDocument | None = None
    """Where it was."""
    retry_in: float | None = None
    """After how many seconds it may be tried again, where it waits for that."""
    adapter: str | None = None
    """The adapter of which something was learned."""
    request: RunRequest | None = None
    halted: tuple[HaltCause, str] | None = None
    """What stopped the run before its end, and why."""
    has_new_tasks: bool = False
    """Whether plans have become tasks; they are in the ledger."""


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
        orchestrators: RunMembership,
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
        self.became_leader = anyio.Event()
        """Set once this orchestrator is the coordinator."""
        self._in_flight: dict[str, anyio.Event] = {}
        """Tasks that are being changed by this orchestrator, each with what is set when that is over."""
        self._unreported: dict[str, TaskDocument] = {}
        """Where tasks were before it was looked where they are now; `changes` has yet to tell of their moves."""
        self.damaged = frozenset(task for task, found in tasks.items() if found.damaged)
        self.added: dict[str, DispatchEntry] = {}
        """The tasks that plans have become since this was made, and what decisions need of each."""
        self._store, self._clock = store, clock
        self._tasks = task_documents(tasks, run.tasks)
        self._versions = {task: tasks[task].version for task in run.tasks}
        self._planners = {part: task for task, one in self._tasks.items() for part in one.expanded}
        """By what a plan became, the task whose plan it was."""
        self._guards: tuple[Guard, ...] = (orchestrators.guard,)
        self._slowest = 0.0
        self._workflows: dict[str, Workflow] = {}

    @classmethod
    async def take(
        cls,
        store: Store,
        clock: Clock,
        redactor: Redactor,
        orchestrators: RunMembership,
        facts: JsonObject,
        *,
        is_shared: bool = True,
    ) -> Ledger:
        """Load a run and become its coordinator under the next epoch; `facts` are recorded with that.

        RunAtWork where somebody else who lives is.
        """
        while True:
            try:
                return await cls._take(store, clock, redactor, orchestrators, facts, is_shared=is_shared)
            except VersionConflict:
                if await orchestrators.find(orchestrators.me.id) is not None:  # else somebody was quicker
                    raise

    @classmethod
    async def _take(
        cls,
        store: Store,
        clock: Clock,
        redactor: Redactor,
        orchestrators: RunMembership,
        facts: JsonObject,
        *,
        is_shared: bool,
    ) -> Ledger:
        run = orchestrators.run
        document = await read_run(store, run)  # first: it may grow by tasks meanwhile
        tasks = await read_tasks(store, run)
        ledger = cls(store, document, tasks, redactor, orchestrators, clock, is_shared=is_shared)
        lease = await prepare_lease(store, clock, run, orchestrators.me)
        if (holder := await find_other_leader(store, orchestrators)) is not None:
            raise RunActive(run, holder.pid, holder.host)
        amended = []
        if (ledger.run.ended, ledger.run.halted) != (None, None):
            version, found = await ledger._newest_run()
            again = found.model_copy(update={"ended": None, "halted": None, "halted_by": None})
            amended.append(Write(run_key(run), version, again.model_dump(mode="json")))
            ledger._set_run(again)
        await ledger._lead(lease, [orchestrators.join_write(), *amended], facts)
        orchestrators.mark_joined()
        return await ledger._newest()

    @classmethod
    async def join(
        cls, store: Store, clock: Clock, redactor: Redactor, orchestrators: RunMembership, facts: JsonObject
    ) -> Ledger:
        """Load a run and become one of those who are at work in it; `facts` are recorded with that."""
        run = orchestrators.run
        document = await read_run(store, run)
        tasks = await read_tasks(store, run)
        ledger = cls(store, document, tasks, redactor, orchestrators, clock)
        me = orchestrators.me
        joined = Event("run.joined", {"run": run, "orchestrator": me.id, "host": me.host, "pid": me.pid, **facts})
        await store.commit(Commit([orchestrators.join_write()], [joined]))
        orchestrators.mark_joined()
        return await ledger._newest()

    async def _newest(self) -> Ledger:
        """Return one with the documents as they are now: while this one took its part a checkpoint may be restored."""
        document, tasks = await read_run(self._store, self.run.id), await read_tasks(self._store, self.run.id)
        if document == self.run and all(tasks[name].version == one for name, one in self._versions.items()):
            return self
        is_shared = self.claims is not None
        newest = Ledger(
            self._store, document, tasks, self._redactor, self.orchestrators, self._clock, is_shared=is_shared
        )
        newest._guards = self._guards
        if self.became_leader.is_set():
            newest.became_leader.set()
        return newest

    async def _lead(self, lease: tuple[Write, Guard], writes: Sequence[Write], facts: JsonObject) -> None:
        write, guard = lease
        facts = {"run": self.run.id, "epoch": guard.epoch, "pid": self.orchestrators.me.pid, **facts}
        await self._store.commit(Commit([write, *writes], [Event("run.leader_elected", facts)]))
        self._guards = (self.orchestrators.guard, guard)
        self.became_leader.set()
        failpoint("run.leader_elected")

    async def try_to_lead(self) -> bool:
        """Become the coordinator if nobody who lives is and the run goes on; whether that is so from now.

        A worker leaves that to a process that was made a coordinator, if one is alive.
        """
        if self.became_leader.is_set():
            return False
        lease = await prepare_lease(self._store, self._clock, self.run.id, self.orchestrators.me)
        if await find_other_leader(self._store, self.orchestrators) is not None:
            return False
        if await self.orchestrators.is_outranked():
            return False
        if (await read_run(self._store, self.run.id)).ended is not None:  # who was it has left nothing to do
            return False
        with suppress(VersionConflict):  # another was quicker
            await self._lead(lease, [], {})
            self.orchestrators.promote()
        return self.became_leader.is_set()

    def task(self, task: str) -> TaskDocument:
        """Return a task's current state."""
        return self._tasks[task]

    def __contains__(self, task: str) -> bool:
        """Whether a task is known: what plans have become elsewhere is only once it was looked."""
        return task in self._versions

    def parts(self, task: str) -> tuple[str, ...]:
        """Return what is known of the tasks that the plan of a task became."""
        return tuple(one for one in self._tasks[task].expanded if one in self._versions)

    def planner(self, task: str) -> str | None:
        """Return the task whose plan a task is of; None where it is of none."""
        return self._planners.get(task)

    def family(self, task: str) -> list[str]:
        """Return a task with all that are of one plan with it, or of a plan of those: alone where there is none."""
        while task in self._planners:
            task = self._planners[task]
        found = [task]
        for one in found:
            found += self.parts(one)
        return found

    def documents(self) -> Mapping[str, TaskDocument]:
        """Return the current state of every task."""
        return self._tasks

    async def intended(self, commit: str) -> bool:
        """Whether a task of this run, or of another in the same store, was about to land by a commit."""
        if any(commit in one.intended for one in self._tasks.values()):
            return True
        found = [one for one in await self._store.list("task") if commit.encode() in one.encoded]
        return any(commit in one.value.get("intended", ()) for one in found if not one.damaged)

    def statuses(self) -> dict[str, TaskStatus]:
        """Return the status of every task, in the order of the file."""
        return {task: self._tasks[task].status for task in self.run.tasks}

    def has_moved_target(self) -> bool:
        """Return whether a commit of the run has landed: then the target has existed."""
        return any(self._tasks[task].landed not in {None, self.run.start} for task in self.run.tasks)

    async def spec(self, task: str) -> TaskSpec:
        """Return what a task was asked to do; it may fail as often as `max_retries` lets it, if that is less."""
        spec = await read_spec(self._store, self.run.id, task)
        most = self.orchestrators.timing.max_retries + 1
        return spec if spec.attempts <= most else spec.model_copy(update={"attempts": most})

    def workflow(self, name: str | None) -> Workflow:
        """Return the workflow of a name, and for None what a task without one does."""
        if name is None:
            return Workflow()
        if name not in self._workflows:
            self._workflows[name] = Workflow(tuple(map(Phase.model_validate, self.run.workflows[name])))
        return self._workflows[name]

    async def handoffs(self, task: str) -> dict[str, tuple[int, Handoff]]:
        """Return what the phases of a task have handed over, by id, with the versions of the documents."""
        return await read_handoffs(self._store, self.run.id, task)

    def handed_over(self, handoff: Handoff, version: int = 0) -> Write:
        """Return the write that records a handoff, or what became of it."""
        return Write(handoff_key(handoff.id), version, handoff.model_dump(mode="json"))

    def redact(self, value: JsonObject) -> JsonObject:
        """Return what agents said without the secrets in it."""
        found: JsonObject = self._redactor.json(value)
        return found

    async def change(self, task: str, trigger: Trigger, details: JsonObject | None = None, **changes: Any) -> None:
        """Move a task along its lifecycle and record it, with an event that carries `details`."""
        await self.change_all(trigger, {task: TaskUpdate(details or {}, changes)})

    async def change_all(
        self, trigger: Trigger, updates: Mapping[str, TaskUpdate], permits: Sequence[Guard] = ()
    ) -> None:
        """Move tasks along their lifecycles and record it as `change` does, all of them or none; `permits` must hold.

        ClaimLost where another has taken one of them over.
        """
        writes, guards, steps = list[Write](), list(permits), dict[str, Transition]()
        for task, update in updates.items():
            if self.is_claimed_elsewhere(task) or (self._tasks[task].status, trigger) not in TRANSITIONS:
                await self.hold(task)
            steps[task] = step = self._step(task, trigger, update)
            writes += step.writes
            if self.claims is not None and (guard := self.claims.guard(task)) is not None:
                guards.append(guard)
                if (status := step.after.status) not in CLAIMED_STATUSES:
                    counts = trigger in {Trigger.RETRY, Trigger.BOUNCE}
                    ending = self.claims.ending(
                        task,
                        CLAIM_RELEASES[status],
                        step.after.reason,
                        counts=counts,
                        afresh=trigger in {Trigger.ADVANCE, Trigger.EXPAND},
                    )
                    writes.append(ending)
        if trigger is Trigger.REVIVE and self.claims is not None:
            for task in updates:
                writes += await self.claims.afresh(task)
        events = [event for step in steps.values() for event in step.events]
        with self._changing(updates):
            try:
                if any(update.tasks for update in updates.values()):
                    await self._grow(updates, Commit(writes, events, [*self._guards, *guards]))
                else:
                    await self._commit(Commit(writes, events, [*self._guards, *guards]))
            except (LeaseLost, VersionConflict):
                await self._raise_if_claim_lost(updates)
                raise
            for task, step in steps.items():
                self._moved(task, step.after)

    async def _grow(self, updates: Mapping[str, TaskUpdate], commit: Commit) -> None:
        """Record changes with the tasks that plans became; others may change the run's own document meanwhile."""
        new = {task: spec for update in updates.values() for task, spec in update.tasks.items()}
        while True:
            version, before = await self._newest_run()
            tasks = list(before.tasks)
            for task, update in updates.items():
                place = 1 + max(tasks.index(one) for one in (task, *self._tasks[task].expanded) if one in tasks)
                tasks[place:place] = update.tasks
            after = before.model_copy(update={"tasks": tuple(tasks)})
            grown = [Write(run_key(after.id), version, after.model_dump(mode="json")), *new_task_writes(after, new)]
            try:
                await self._commit(replace(commit, writes=[*commit.writes, *grown]))
            except VersionConflict:
                if (await self._newest_run())[0] == version:
                    raise
                continue
            break
        failpoint("plan.expanded")
        for task, spec in new.items():
            if task in self._versions:  # it was seen at once in the log
                continue
            self._add_task(task, 1, TaskDocument(), parse_entry(spec.model_dump(mode="json")))
        self._set_run(after)

    def _add_task(self, task: str, version: int, document: TaskDocument, entry: DispatchEntry) -> None:
        self._tasks[task], self._versions[task] = document, version
        self._planners |= dict.fromkeys(document.expanded, task)
        self.added[task] = entry

    def _set_run(self, document: RunDocument) -> None:
        """Take the run's own document, but for tasks of which nothing else is known yet; none go."""
        tasks = tuple(one for one in document.tasks if one in self._versions)
        self.run = document.model_copy(update={"tasks": max(tasks, self.run.tasks, key=len)})

    async def _newest_run(self) -> tuple[int, RunDocument]:
        found = await self._store.get(run_key(self.run.id))
        if found is None:
            raise RefusedError(f"run {self.run.id} was removed", "start a new run")
        return found.version, RunDocument.model_validate_json(found.encoded)

    async def learn_tasks(self) -> bool:
        """Take in the tasks that plans have become in other processes; whether there are any."""
        _, document = await self._newest_run()
        is_grown = False
        for task in document.tasks:
            if task not in self._versions:
                found = await self._store.get(task_key(self.run.id, task))
                spec = await self._store.get(spec_key(self.run.id, task))
                if found is None or spec is None or task in self._versions:
                    continue
                self._add_task(
                    task, found.version, TaskDocument.model_validate_json(found.encoded), parse_entry(spec.value)
                )
                if found.version > 1:
                    self._unreported[task] = TaskDocument()
                is_grown = True
        self._set_run(document)
        return is_grown

    async def start(
        self,
        task: str,
        update: TaskUpdate,
        also: Callable[[Guard], ClaimPlan] | None = None,
        *,
        trigger: Trigger = Trigger.START,
    ) -> ClaimHolder | OwnedBy | OutdatedBase | TaskMoved | None:
        """Claim a task and record its next attempt, in one commit; return who was quicker, if somebody was.

        `also` plans, by the guard of the claim, what else is to be had with it: the writes, or who is in the way. With
        another trigger something else begins.
        """
        if self.claims is None:
            await self.change_all(trigger, {task: update})
            return None
        with self._changing([task]):
            return await self._start(self.claims, task, trigger, update, also)

    async def _start(
        self,
        claims: Claims,
        task: str,
        trigger: Trigger,
        update: TaskUpdate,
        also: Callable[[Guard], ClaimPlan] | None,
    ) -> ClaimHolder | OwnedBy | OutdatedBase | TaskMoved | None:
        key, version = task_key(self.run.id, task), self._versions[task]
        while True:
            taking = await claims.plan(task, override=True)  # nothing of it has begun: a worker loses nothing
            if isinstance(taking, ClaimHolder):
                await self.refresh(task)
                return taking
            more = [] if also is None else await also(taking.guard)
            if isinstance(more, OwnedBy | OutdatedBase):
                return more
            status = self._tasks[task].status
            if self._versions[task] != version or status is not TaskStatus.PENDING:
                return TaskMoved(status)  # what is to be recorded was made of what it was before
            step = self._step(task, trigger, update)
            try:
                await self._commit(Commit([*step.writes, *more, taking.write], step.events, self._guards))
            except VersionConflict:
                self.orchestrators.count(conflicts=1)
                if await self._store.get(key) is None:
                    raise RefusedError(f"run {self.run.id} was removed", "start a new run") from None
                await self.refresh(task)
                continue
            claims.mark_claimed(task, taking)
            self._moved(task, step.after)
            return None

    async def claim(self, task: str, *, is_asked: bool = False) -> bool:
        """Claim a task where it stands, such as one that waits to land and is nobody's; whether it is ours now.

        Where a person wants that (`is_asked`), it may be anybody's; one that is being landed stays with who began that.
        """
        if self.claims is None:
            return True
        with self._changing([task]):
            if task not in self.claims:
                await self.refresh(task)
                status = self._tasks[task].status
                if status not in CLAIMED_STATUSES or (is_asked and status is TaskStatus.LANDING):
                    return False  # nothing is left to be claimed for, or will be
                if isinstance(await self.claims.claim(task, is_asked=is_asked), ClaimHolder):
                    return False
            await self.refresh(task, released=False)
            if (status := self._tasks[task].status) in CLAIMED_STATUSES:
                self._unreported.pop(task, None)
                return True
            await self.claims.release(task, CLAIM_RELEASES[status])  # it was over before
            return False

    async def release(self, task: str) -> None:
        """Release the claim on a task that is nobody's where it stands: a checkpoint may have brought it back there."""
        document = self._tasks[task]
        if self.claims is not None and task in self.claims and document.status not in CLAIMED_STATUSES:
            await self.claims.release(task, CLAIM_RELEASES[document.status], document.reason)

    def is_claimed_elsewhere(self, task: str) -> bool:
        """Whether a task is at work, or waits to land, by another orchestrator."""
        return self.claims is not None and self._tasks[task].status in CLAIMED_STATUSES and task not in self.claims

    async def hold(self, task: str) -> None:
        """Make sure that this orchestrator has the claim on a task; ClaimLost where another has taken it over."""
        if self.claims is not None and task not in self.claims:
            await self.refresh(task)
            await self._raise_if_claim_lost([task])

    async def confirm(self, task: str) -> None:
        """Look in the store whether this orchestrator has the claim on a task still; ClaimLost where it has not."""
        await self._raise_if_claim_lost([task])

    async def refresh(self, task: str, *, released: bool = True) -> bool:
        """Look where a task is now; whether that is another place than was known.

        Unless `released`, a claim on it stays though it may be over.
        """
        found = await self._store.get(task_key(self.run.id, task))
        if found is None or found.version <= self._versions[task]:
            return False
        self._unreported.setdefault(task, self._tasks[task])
        after = TaskDocument.model_validate_json(found.encoded)
        if released:
            self._apply_document(task, found.version, after)
        else:
            self._tasks[task], self._versions[task] = after, found.version
            self._planners |= dict.fromkeys(after.expanded, task)
        return True

    @contextmanager
    def _changing(self, tasks: Iterable[str]) -> Iterator[None]:
        """Have it wait until the body is over whether what is seen of tasks is of this orchestrator's own doing."""
        over = anyio.Event()
        names = list(tasks)
        self._in_flight.update(dict.fromkeys(names, over))
        try:
            yield
        finally:
            for name in names:
                if self._in_flight.get(name) is over:
                    del self._in_flight[name]
            over.set()

    async def _wait_settled(self, task: str) -> None:
        while (over := self._in_flight.get(task)) is not None:
            await over.wait()

    def _moved(self, task: str, after: TaskDocument) -> None:
        """This orchestrator has moved a task."""
        self._unreported.pop(task, None)
        self._apply_document(task, self._versions[task] + 1, after)

    def _apply_document(self, task: str, version: int, after: TaskDocument) -> None:
        if version > self._versions[task]:
            self._tasks[task], self._versions[task] = after, version
            self._planners |= dict.fromkeys(after.expanded, task)
        if self.claims is not None and after.status not in CLAIMED_STATUSES:
            self.claims.released(task)

    def _step(self, task: str, trigger: Trigger, update: TaskUpdate) -> Transition:
        key = task_key(self.run.id, task)
        return build_transition(
            key, self._tasks[task], self._versions[task], trigger, update, self._clock.now(), self._redactor
        )

    async def _raise_if_claim_lost(self, tasks: Iterable[str]) -> None:
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

    async def prune_ownership(self, registry: OwnershipRegistry) -> None:
        """Forget who owned which paths under claims that are over."""
        with suppress(VersionConflict):  # whoever takes paths does so, too
            if writes := await registry.sweep():
                await self._commit(Commit(writes, guards=self._guards, durable=False))

    async def adapter(self, adapter: str) -> AdapterDocument:
        """Return what the run has learned about an adapter."""
        found = await self._store.get(adapter_key(self.run.id, adapter))
        return AdapterDocument() if found is None else AdapterDocument.model_validate(found.value)

    async def update_adapter(
        self, adapter: str, judge: Callable[[AdapterDocument], AdapterUpdate | None]
    ) -> tuple[AdapterDocument, bool]:
        """Record what follows from what the run knows about an adapter; return what it knows then, and if that is new.

        `judge` is asked anew where another orchestrator has learned something meanwhile.
        """
        key = adapter_key(self.run.id, adapter)
        while True:
            found = await self._store.get(key)
            known = AdapterDocument() if found is None else AdapterDocument.model_validate(found.value)
            if (learned := judge(known)) is None:
                return known, False
            value = self._redacted(learned.document.model_dump(mode="json"))
            event = self._event(learned.event, {"adapter": adapter, **learned.details})
            with suppress(VersionConflict):
                await self._commit(Commit([Write(key, found.version if found else 0, value)], [event], self._guards))
                return learned.document, True

    async def enable_adapter(self, adapter: str) -> AdapterDocument:
        """Enable an adapter that was disabled or in cooldown; return its new document."""
        enabled = AdapterUpdate(AdapterDocument(enabled_at=self._clock.now()), "adapter.enabled", {})
        known, _ = await self.update_adapter(
            adapter, lambda known: enabled if known.disabled_reason or known.cooldown_until else None
        )
        return known

    async def checkpoint(self) -> None:
        """Make the checkpoint that is due by the clock; of those before it the newest stay."""
        # Late: whoever only looks at a run makes none.
        from orchestrator.state.documents.checkpoints import create_checkpoint, prune_checkpoints

        await create_checkpoint(
            self._store, self.run.id, "a run at work", maker=CheckpointOrigin.CLOCK, guards=self._guards
        )
        await prune_checkpoints(self._store, self.run.id, MAX_CLOCK_CHECKPOINTS, self._guards)

    async def requests(self) -> list[RunRequest]:
        """Return what was asked of the run's owner and is not done yet, the oldest first."""
        return await read_requests(self._store, self.run.id)

    async def changes(self) -> AsyncGenerator[ExternalChange]:
        """Yield what was asked of the run and is not done yet, then whatever others do to it or ask, as it comes."""
        while True:
            position = await self._store.position()
            if await self.learn_tasks():
                yield ExternalChange(has_new_tasks=True)
            found = await read_tasks(self._store, self.run.id)  # of what comes later, the log tells
            for task in self.run.tasks:
                await self._wait_settled(task)
                if task in found and found[task].version > self._versions[task]:
                    await self.refresh(task)
                if (before := self._unreported.pop(task, None)) is not None:
                    yield ExternalChange(task, before)
            for request in await self.requests():
                yield ExternalChange(request=request)
            with suppress(HistoryCompacted):  # who was stopped for long looks anew
                async for record in self._store.watch(position):
                    async for change in self._changes_in(record):
                        yield change

    async def _changes_in(self, record: CommitRecord) -> AsyncGenerator[ExternalChange]:
        if run_key(self.run.id) in record.documents and await self.learn_tasks():
            yield ExternalChange(has_new_tasks=True)
        for key, (version, value) in record.documents.items():
            if value is not None and f"{key.id}/".startswith(f"{self.run.id}/"):
                if key.kind == "task":
                    await self._wait_settled(key.id.partition("/")[2])
                for change in self._seen(record, key, version, value):
                    yield change

    def _seen(self, record: CommitRecord, key: Key, version: int, value: JsonObject) -> Iterable[ExternalChange]:
        name = key.id.partition("/")[2]
        if key == run_key(self.run.id):
            if value["halted"] is not None:
                yield ExternalChange(halted=(HaltCause(value.get("halted_by") or HaltCause.BUDGET), value["halted"]))
        elif key.kind == "request":
            yield ExternalChange(request=RunRequest.model_validate(value))
        elif key.kind == "adapter":
            yield ExternalChange(adapter=name)
        elif key.kind == "task" and (version > self._versions.get(name, version) or self._is_unreported(name, version)):
            before = self._unreported.pop(name, self._tasks[name])
            if version > self._versions[name]:
                if self.claims is not None:
                    self.claims.released(name)
                self._apply_document(name, version, TaskDocument.model_validate(value))
            elif self.claims is not None and name in self.claims:
                return  # it was looked at when it was taken over, and whoever did that knows
            delays = [one.data.get("retry_in") for one in record.events if one.data.get("task") == name]
            yield ExternalChange(name, before, next(filter(None, delays), None))

    def _is_unreported(self, task: str, version: int) -> bool:
        return task in self._unreported and version == self._versions[task]

    async def earlier_specs(self, task: str) -> dict[str, JsonObject]:
        """Return what was ever recorded to be done by tasks whose names begin as those that a plan of this one has."""
        found = await self._store.list("spec", f"{self.run.id}/{task}")
        return {one.key.id.partition("/")[2]: one.value for one in found if not one.damaged}

    async def have_any_existed(self, names: Iterable[str]) -> bool:
        """Return whether any of these was ever the name of a task, of one that was deleted since, too."""
        for name in names:
            if await self._store.history(Key("spec", f"{self.run.id}/{name}"), 1):
                return True
        return False

    async def answer(self, request: RunRequest) -> None:
        """Record that a request was dealt with."""
        key = request_key(self.run.id, request.id)
        found = await self._store.get(key)
        if found is not None:
            event = self._event("request.completed", {"request": request.id})
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
            if (fenced := await self.orchestrators.find_fencing_error()) is not None:
                self.orchestrators.count(refused=1)
                raise fenced from None
            raise
        self._slowest = max(self._slowest, self._clock.monotonic() - began)

    def _event(self, event: str, details: JsonObject) -> Event:
        return Event(event, self._redacted({"run": self.run.id, **details}))

    def _redacted(self, value: JsonObject) -> JsonObject:
        return sanitize(value, self._redactor)

    async def finish(self, status: str) -> None:
        """Record that nothing is left to do in this run; resuming may follow."""
        await self._amend("run.finished", {"status": status}, ended=self._clock.now())
        failpoint("run.finished")

    async def halt(self, by: HaltCause, reason: str) -> None:
        """Record what stopped this run before its end, and why; resuming may follow."""
        await self._amend("run.halted", {"by": by, "reason": reason}, halted=reason, halted_by=by)

    async def proven_bases(self) -> tuple[str, ...]:
        """Return the bases that have passed their checks, in whichever process of the run."""
        return (await self._newest_run())[1].proven_bases

    async def record_passed_base(self, key: str, facts: JsonObject) -> None:
        """Record that a base has passed its checks, with the facts about them."""
        bases = (*await self.proven_bases(), key)[-MAX_PROVEN_BASES:]
        await self._amend("base.passed", facts, proven_bases=bases)

    async def allow_failing_base(self) -> None:
        """Record that sessions start though checks fail on the base."""
        await self._amend("base.failure_allowed", {}, allow_failing_base=True)

    async def allow(self, limits: JsonObject) -> None:
        """Record other limits of the run's budget, by their keys."""
        given = tuple(dict.fromkeys((*self.run.given, "budget")))
        await self._amend("run.budget_changed", limits, budget={**self.run.budget, **limits}, given=given)

    async def _amend(self, event: str, facts: JsonObject, **changes: Any) -> None:
        while True:
            version, before = await self._newest_run()
            amended = before.model_copy(update=changes)
            write = Write(run_key(self.run.id), version, amended.model_dump(mode="json"))
            try:
                await self._commit(Commit([write], [self._event(event, facts)], self._guards))
            except VersionConflict:  # a plan has become tasks
                continue
            break
        self._set_run(amended)
