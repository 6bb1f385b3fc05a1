"""Run state as seen by one orchestrator.

Every change is one commit fenced by its lease epoch.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from orchestrator.domain.events.base import RunEvent, TaskEvent
from orchestrator.domain.events.runs import (
    AdapterEnabled,
    AdapterEvent,
    BaseFailureAllowed,
    BasePassed,
    RequestCompleted,
    RunBudgetChanged,
    RunFinished,
    RunHalted,
    RunJoined,
    RunLeaderElected,
)
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
from orchestrator.domain.scheduling.path_ownership import OwnershipConflict
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
    read_run_with_tasks,
    read_spec,
    read_tasks,
    request_key,
    run_key,
    spec_key,
    task_documents,
    task_key,
)
from orchestrator.engine.state.transitions import CLAIM_RELEASES, TaskUpdate, build_transition, record_event, sanitize
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

#: Number of periodic checkpoints to keep.
MAX_CLOCK_CHECKPOINTS = 12

#: Number of passed bases to keep on record.
MAX_PROVEN_BASES = 32

#: Additional writes of a commit that starts an attempt, or the obstacle to it.
ClaimPlan = Awaitable["Sequence[Write] | OwnershipConflict | OutdatedBase"]


class AdapterUpdate(NamedTuple):
    """A new adapter document and the event that reports it; the adapter is filled in."""

    document: AdapterDocument
    event: AdapterEvent


class OutdatedBase(NamedTuple):
    """The base of a prepared attempt is no longer the newest commit."""


class TaskMoved(NamedTuple):
    """Another orchestrator or a person has moved the task in the meantime."""

    status: TaskStatus


class ExternalChange(NamedTuple):
    """A change or request by another orchestrator or a person."""

    task: str | None = None
    """The task that moved; its new state is in the ledger."""
    before: TaskDocument | None = None
    """The state of the task before the change."""
    retry_in: float | None = None
    """Seconds until the task may be retried, if it waits for that."""
    adapter: str | None = None
    """The adapter whose document changed."""
    request: RunRequest | None = None
    halted: tuple[HaltCause, str] | None = None
    """The cause and the reason of an early stop of the run."""
    has_new_tasks: bool = False
    """Whether plans were expanded to tasks; these are in the ledger."""


class Ledger:
    """State of a run as seen by one of its orchestrators.

    Its commits fail once another has taken over. One orchestrator leads: it holds the lease of the run and does the
    work that must happen once. Each holds a claim on every task that it works on, from the start of the task until the
    task ends or waits for a retry.
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
        """Create a ledger from documents that were read.

        `redactor` removes secrets from all that is recorded. Unless `is_shared`, there are no claims: only the leader
        can work in the run.
        """
        self.run, self._redactor = run, redactor
        self.orchestrators = orchestrators
        self.claims = Claims(store, clock, orchestrators) if is_shared else None
        self.became_leader = anyio.Event()
        """Set once this orchestrator leads the run."""
        self._in_flight: dict[str, anyio.Event] = {}
        """Tasks that this orchestrator is changing, each with an event that is set afterwards."""
        self._unreported: dict[str, TaskDocument] = {}
        """Earlier states of refreshed tasks whose moves `changes` has yet to report."""
        self.damaged = frozenset(task for task, document in tasks.items() if document.damaged)
        self.added: dict[str, DispatchEntry] = {}
        """Dispatch entries of the subtasks that plans were expanded to since this ledger was created."""
        self._store, self._clock = store, clock
        self._tasks = task_documents(tasks, run.tasks)
        self._versions = {task: tasks[task].version for task in run.tasks}
        self._planners = {part: task for task, document in self._tasks.items() for part in document.expanded}
        """The planning task of each subtask."""
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
        sandbox: str,
        *,
        is_shared: bool = True,
    ) -> Ledger:
        """Load a run and become its leader under the next epoch.

        The event names the kind of the `sandbox`. RunActive if another live orchestrator leads the run.
        """
        while True:
            try:
                return await cls._take(store, clock, redactor, orchestrators, sandbox, is_shared=is_shared)
            except VersionConflict:
                if await orchestrators.find(orchestrators.me.id) is not None:  # else another orchestrator was first
                    raise

    @classmethod
    async def _take(
        cls,
        store: Store,
        clock: Clock,
        redactor: Redactor,
        orchestrators: RunMembership,
        sandbox: str,
        *,
        is_shared: bool,
    ) -> Ledger:
        run = orchestrators.run
        document, tasks = await read_run_with_tasks(store, run)
        ledger = cls(store, document, tasks, redactor, orchestrators, clock, is_shared=is_shared)
        lease = await prepare_lease(store, clock, run, orchestrators.me)
        if (holder := await find_other_leader(store, orchestrators)) is not None:
            raise RunActive(run, holder.pid, holder.host)
        run_writes = []
        if (ledger.run.ended, ledger.run.halted) != (None, None):
            version, current = await ledger._read_run()
            reopened = current.model_copy(update={"ended": None, "halted": None, "halted_by": None})
            run_writes.append(Write(run_key(run), version, reopened.model_dump(mode="json")))
            ledger._set_run(reopened)
        elected = RunLeaderElected(epoch=lease[1].epoch, pid=orchestrators.me.pid, sandbox=sandbox)
        await ledger._lead(lease, [orchestrators.join_write(), *run_writes], elected)
        orchestrators.mark_joined()
        return await ledger._newest()

    @classmethod
    async def join(
        cls, store: Store, clock: Clock, redactor: Redactor, orchestrators: RunMembership, sandbox: str
    ) -> Ledger:
        """Load a run and join it as a worker; the event names the kind of the `sandbox`."""
        run = orchestrators.run
        document, tasks = await read_run_with_tasks(store, run)
        ledger = cls(store, document, tasks, redactor, orchestrators, clock)
        me = orchestrators.me
        joined = RunJoined(run=run, orchestrator=me.id, host=me.host, pid=me.pid, sandbox=sandbox)
        await store.commit(Commit([orchestrators.join_write()], [Event.of(joined)]))
        orchestrators.mark_joined()
        return await ledger._newest()

    async def _newest(self) -> Ledger:
        """Return a ledger with the current documents.

        A checkpoint may be restored while this one joins.
        """
        document, tasks = await read_run_with_tasks(self._store, self.run.id)
        if document == self.run and all(tasks[name].version == version for name, version in self._versions.items()):
            return self
        is_shared = self.claims is not None
        newest = Ledger(
            self._store, document, tasks, self._redactor, self.orchestrators, self._clock, is_shared=is_shared
        )
        newest._guards = self._guards
        if self.became_leader.is_set():
            newest.became_leader.set()
        return newest

    async def _lead(self, lease: tuple[Write, Guard], writes: Sequence[Write], elected: RunLeaderElected) -> None:
        write, guard = lease
        await self._store.commit(Commit([write, *writes], [self._event(elected)]))
        self._guards = (self.orchestrators.guard, guard)
        self.became_leader.set()
        failpoint("run.leader_elected")

    async def try_to_lead(self) -> bool:
        """Become the leader if no live orchestrator leads and the run has not ended.

        Return True if that happened. A worker leaves this to a live process that was started as a leader.
        """
        if self.became_leader.is_set():
            return False
        lease = await prepare_lease(self._store, self._clock, self.run.id, self.orchestrators.me)
        if await find_other_leader(self._store, self.orchestrators) is not None:
            return False
        if await self.orchestrators.is_outranked():
            return False
        if (await read_run(self._store, self.run.id)).ended is not None:  # the previous leader has finished the run
            return False
        with suppress(VersionConflict):  # another orchestrator was first
            await self._lead(lease, [], RunLeaderElected(epoch=lease[1].epoch, pid=self.orchestrators.me.pid))
            self.orchestrators.promote()
        return self.became_leader.is_set()

    def task(self, task: str) -> TaskDocument:
        """Return the current state of a task."""
        return self._tasks[task]

    def __contains__(self, task: str) -> bool:
        """Return True if a task is known.

        Subtasks from other processes are known once they are read.
        """
        return task in self._versions

    def subtasks(self, task: str) -> tuple[str, ...]:
        """Return the known subtasks that the plan of a task was expanded to."""
        return tuple(part for part in self._tasks[task].expanded if part in self._versions)

    def planning_task(self, task: str) -> str | None:
        """Return the task whose plan a subtask belongs to; None if it belongs to none."""
        return self._planners.get(task)

    def plan_members(self, task: str) -> list[str]:
        """Return a task with all tasks of the same plan, nested plans included.

        It is the task alone if it belongs to no plan.
        """
        while task in self._planners:
            task = self._planners[task]
        members = [task]
        for member in members:
            members += self.subtasks(member)
        return members

    def documents(self) -> Mapping[str, TaskDocument]:
        """Return the current state of every task."""
        return self._tasks

    async def is_landing_intent(self, commit: str) -> bool:
        """Return True if a commit is a recorded landing intent of any task in the store."""
        if any(commit in document.intended for document in self._tasks.values()):
            return True
        documents = [document for document in await self._store.list("task") if commit.encode() in document.encoded]
        return any(commit in document.value.get("intended", ()) for document in documents if not document.damaged)

    def statuses(self) -> dict[str, TaskStatus]:
        """Return the status of every task, in file order."""
        return {task: self._tasks[task].status for task in self.run.tasks}

    def has_moved_target(self) -> bool:
        """Return True if a commit of the run has landed: then the target has existed."""
        return any(self._tasks[task].landed not in {None, self.run.start} for task in self.run.tasks)

    async def spec(self, task: str) -> TaskSpec:
        """Return the specification of a task, with `attempts` limited by `max_retries`."""
        spec = await read_spec(self._store, self.run.id, task)
        max_attempts = self.orchestrators.timing.max_retries + 1
        return spec if spec.attempts <= max_attempts else spec.model_copy(update={"attempts": max_attempts})

    def workflow(self, name: str | None) -> Workflow:
        """Return a workflow by name; for None, the default workflow of a task without one."""
        if name is None:
            return Workflow()
        if name not in self._workflows:
            self._workflows[name] = Workflow(tuple(map(Phase.model_validate, self.run.workflows[name])))
        return self._workflows[name]

    async def handoffs(self, task: str) -> dict[str, tuple[int, Handoff]]:
        """Return the handoffs of a task by id, each with the version of its document."""
        return await read_handoffs(self._store, self.run.id, task)

    def handoff_write(self, handoff: Handoff, version: int = 0) -> Write:
        """Return the write that records a handoff."""
        return Write(handoff_key(handoff.id), version, handoff.model_dump(mode="json"))

    def redact(self, value: JsonObject) -> JsonObject:
        """Return agent output without the secrets in it."""
        redacted: JsonObject = self._redactor.json(value)
        return redacted

    async def change(self, task: str, trigger: Trigger, event: TaskEvent, **changes: Any) -> None:
        """Apply a trigger to a task and record it, with the event of the trigger."""
        await self.change_all({task: TaskUpdate(trigger, event, changes)})

    async def change_all(self, updates: Mapping[str, TaskUpdate], permits: Sequence[Guard] = ()) -> None:
        """Change tasks in one commit, as `change` does.

        `permits` are additional guards. ClaimLost if another orchestrator has taken over one of the tasks.
        """
        writes, events, guards, changed = list[Write](), list[Event](), list(permits), dict[str, TaskDocument]()
        for task, update in updates.items():
            if self.is_claimed_elsewhere(task) or (self._tasks[task].status, update.trigger) not in TRANSITIONS:
                await self.require_claim(task)
            changed[task], step = self._build_transition(task, update)
            writes += step.writes
            events += step.events
            if self.claims is not None and (guard := self.claims.guard(task)) is not None:
                guards.append(guard)
                if changed[task].status not in CLAIMED_STATUSES:
                    writes.append(_release_write(self.claims, task, changed[task], update.trigger))
            if update.trigger is Trigger.REVIVE and self.claims is not None:
                writes += await self.claims.reset_retries(task)
        with self._delay_reports(updates):
            try:
                if any(update.tasks for update in updates.values()):
                    await self._commit_with_new_tasks(updates, Commit(writes, events, [*self._guards, *guards]))
                else:
                    await self._commit(Commit(writes, events, [*self._guards, *guards]))
            except (LeaseLost, VersionConflict):
                await self._raise_if_claim_lost(updates)
                raise
            for task, after in changed.items():
                self._apply_own_change(task, after)

    async def _commit_with_new_tasks(self, updates: Mapping[str, TaskUpdate], commit: Commit) -> None:
        """Commit changes together with new subtasks.

        Others may change the run document concurrently.
        """
        specs = {task: spec for update in updates.values() for task, spec in update.tasks.items()}
        while True:
            version, before = await self._read_run()
            tasks = list(before.tasks)
            for task, update in updates.items():
                index = 1 + max(tasks.index(name) for name in (task, *self._tasks[task].expanded) if name in tasks)
                tasks[index:index] = update.tasks
            after = before.model_copy(update={"tasks": tuple(tasks)})
            run_writes = [
                Write(run_key(after.id), version, after.model_dump(mode="json")),
                *new_task_writes(after, specs),
            ]
            try:
                await self._commit(replace(commit, writes=[*commit.writes, *run_writes]))
            except VersionConflict:
                if (await self._read_run())[0] == version:
                    raise
                continue
            break
        failpoint("plan.expanded")
        for task, spec in specs.items():
            if task in self._versions:  # already seen in the log
                continue
            self._add_task(task, 1, TaskDocument(), parse_entry(spec.model_dump(mode="json")))
        self._set_run(after)

    def _add_task(self, task: str, version: int, document: TaskDocument, entry: DispatchEntry) -> None:
        self._tasks[task], self._versions[task] = document, version
        self._planners |= dict.fromkeys(document.expanded, task)
        self.added[task] = entry

    def _set_run(self, document: RunDocument) -> None:
        """Adopt a run document, except for tasks that are not loaded yet.

        No task is dropped.
        """
        tasks = tuple(task for task in document.tasks if task in self._versions)
        self.run = document.model_copy(update={"tasks": max(tasks, self.run.tasks, key=len)})

    async def _read_run(self) -> tuple[int, RunDocument]:
        stored = await self._store.get(run_key(self.run.id))
        if stored is None:
            raise RefusedError(f"run {self.run.id} was removed", "start a new run")
        return stored.version, RunDocument.model_validate_json(stored.encoded)

    async def load_new_tasks(self) -> bool:
        """Load the subtasks that other processes have added; return True if there are any."""
        _, document = await self._read_run()
        has_new = False
        for task in document.tasks:
            if task not in self._versions:
                stored = await self._store.get(task_key(self.run.id, task))
                spec = await self._store.get(spec_key(self.run.id, task))
                if stored is None or spec is None or task in self._versions:
                    continue
                self._add_task(
                    task, stored.version, TaskDocument.model_validate_json(stored.encoded), parse_entry(spec.value)
                )
                if stored.version > 1:
                    self._unreported[task] = TaskDocument()
                has_new = True
        self._set_run(document)
        return has_new

    async def start(
        self,
        task: str,
        update: TaskUpdate,
        also: Callable[[Guard], ClaimPlan] | None = None,
    ) -> ClaimHolder | OwnershipConflict | OutdatedBase | TaskMoved | None:
        """Claim a task and record its next attempt in one commit.

        Return the obstacle if that is impossible. `also` plans, given the guard of the claim, further writes or returns
        what prevents them.
        """
        if self.claims is None:
            await self.change_all({task: update})
            return None
        with self._delay_reports([task]):
            return await self._start(self.claims, task, update, also)

    async def _start(
        self,
        claims: Claims,
        task: str,
        update: TaskUpdate,
        also: Callable[[Guard], ClaimPlan] | None,
    ) -> ClaimHolder | OwnershipConflict | OutdatedBase | TaskMoved | None:
        key, version = task_key(self.run.id, task), self._versions[task]
        while True:
            plan = await claims.plan(task, override=True)  # the task has not started: a worker loses nothing
            if isinstance(plan, ClaimHolder):
                await self.refresh(task)
                return plan
            extra_writes = [] if also is None else await also(plan.guard)
            if isinstance(extra_writes, OwnershipConflict | OutdatedBase):
                return extra_writes
            status = self._tasks[task].status
            if self._versions[task] != version or status is not TaskStatus.PENDING:
                return TaskMoved(status)  # the update was made from an older document
            after, step = self._build_transition(task, update)
            try:
                await self._commit(Commit([*step.writes, *extra_writes, plan.write], step.events, self._guards))
            except VersionConflict:
                self.orchestrators.count(conflicts=1)
                if await self._store.get(key) is None:
                    raise RefusedError(f"run {self.run.id} was removed", "start a new run") from None
                await self.refresh(task)
                continue
            claims.mark_claimed(task, plan)
            self._apply_own_change(task, after)
            return None

    async def claim(self, task: str, *, is_asked: bool = False) -> bool:
        """Claim an unclaimed task in its current state; return True if it is ours.

        Such a task may be queued to land. On request of a person (`is_asked`), take the claim from any owner, except
        for a task that is being landed.
        """
        if self.claims is None:
            return True
        with self._delay_reports([task]):
            if task not in self.claims:
                await self.refresh(task)
                status = self._tasks[task].status
                if status not in CLAIMED_STATUSES or (is_asked and status is TaskStatus.LANDING):
                    return False  # there is nothing to claim, now or later
                if isinstance(await self.claims.claim(task, is_asked=is_asked), ClaimHolder):
                    return False
            await self.refresh(task, released=False)
            if (status := self._tasks[task].status) in CLAIMED_STATUSES:
                self._unreported.pop(task, None)
                return True
            await self.claims.release(task, CLAIM_RELEASES[status])  # the task had already ended
            return False

    async def release(self, task: str) -> None:
        """Release our claim if the task is no longer claimable.

        A checkpoint restore may cause that.
        """
        document = self._tasks[task]
        if self.claims is not None and task in self.claims and document.status not in CLAIMED_STATUSES:
            await self.claims.release(task, CLAIM_RELEASES[document.status], document.reason)

    def is_claimed_elsewhere(self, task: str) -> bool:
        """Return True if another orchestrator runs a task or queues it to land."""
        return self.claims is not None and self._tasks[task].status in CLAIMED_STATUSES and task not in self.claims

    async def require_claim(self, task: str) -> None:
        """Require this orchestrator's claim on a task.

        ClaimLost if another has taken it over.
        """
        if self.claims is not None and task not in self.claims:
            await self.refresh(task)
            await self._raise_if_claim_lost([task])

    async def confirm_claim(self, task: str) -> None:
        """Verify in the store that this orchestrator still has the claim on a task.

        ClaimLost if another has taken it over.
        """
        await self._raise_if_claim_lost([task])

    async def refresh(self, task: str, *, released: bool = True) -> bool:
        """Reload a task; return True if it changed.

        Unless `released`, keep the claim on it even if the task no longer needs one.
        """
        stored = await self._store.get(task_key(self.run.id, task))
        if stored is None or stored.version <= self._versions[task]:
            return False
        self._unreported.setdefault(task, self._tasks[task])
        after = TaskDocument.model_validate_json(stored.encoded)
        if released:
            self._apply_document(task, stored.version, after)
        else:
            self._tasks[task], self._versions[task] = after, stored.version
            self._planners |= dict.fromkeys(after.expanded, task)
        return True

    @contextmanager
    def _delay_reports(self, tasks: Iterable[str]) -> Iterator[None]:
        """Delay the reporting of changes of tasks while the body changes them itself."""
        done = anyio.Event()
        names = list(tasks)
        self._in_flight.update(dict.fromkeys(names, done))
        try:
            yield
        finally:
            for name in names:
                if self._in_flight.get(name) is done:
                    del self._in_flight[name]
            done.set()

    async def _wait_settled(self, task: str) -> None:
        while (done := self._in_flight.get(task)) is not None:
            await done.wait()

    def _apply_own_change(self, task: str, after: TaskDocument) -> None:
        """Apply a task document that this orchestrator has committed."""
        self._unreported.pop(task, None)
        self._apply_document(task, self._versions[task] + 1, after)

    def _apply_document(self, task: str, version: int, after: TaskDocument) -> None:
        if version > self._versions[task]:
            self._tasks[task], self._versions[task] = after, version
            self._planners |= dict.fromkeys(after.expanded, task)
        if self.claims is not None and after.status not in CLAIMED_STATUSES:
            self.claims.mark_released(task)

    def _build_transition(self, task: str, update: TaskUpdate) -> tuple[TaskDocument, Commit]:
        key = task_key(self.run.id, task)
        return build_transition(key, self._tasks[task], self._versions[task], update, self._clock.now(), self._redactor)

    async def _raise_if_claim_lost(self, tasks: Iterable[str]) -> None:
        """Raise ClaimLost with the new owner if one of the tasks was taken over."""
        if self.claims is None:
            return
        for task in tasks:
            guard, claim = self.claims.guard(task), await self.claims.read(task)
            if claim is not None and (guard is None or claim.epoch != guard.epoch):
                self.claims.mark_lost(task)
                raise ClaimLost(task, 0 if guard is None else guard.epoch, claim.epoch, claim.owner.id)

    async def note(self, event: RunEvent) -> None:
        """Record an event that changes no document."""
        await self._commit(Commit([], [self._event(event)], self._guards))

    async def prune_ownership(self, registry: OwnershipRegistry) -> None:
        """Delete path ownership under claims that have ended."""
        with suppress(VersionConflict):  # each new path owner prunes, too
            if writes := await registry.sweep():
                await self._commit(Commit(writes, guards=self._guards, durable=False))

    async def adapter(self, adapter: str) -> AdapterDocument:
        """Return the state of an adapter in this run."""
        stored = await self._store.get(adapter_key(self.run.id, adapter))
        return AdapterDocument() if stored is None else AdapterDocument.model_validate(stored.value)

    async def update_adapter(
        self, adapter: str, judge: Callable[[AdapterDocument], AdapterUpdate | None]
    ) -> tuple[AdapterDocument, bool]:
        """Record the update that `judge` derives from an adapter's state.

        Return the state and whether it changed. `judge` is called again if another orchestrator updates the adapter
        concurrently.
        """
        key = adapter_key(self.run.id, adapter)
        while True:
            stored = await self._store.get(key)
            known = AdapterDocument() if stored is None else AdapterDocument.model_validate(stored.value)
            if (update := judge(known)) is None:
                return known, False
            value = self._redacted(update.document.model_dump(mode="json"))
            event = self._event(update.event.within(adapter=adapter))
            with suppress(VersionConflict):
                await self._commit(Commit([Write(key, stored.version if stored else 0, value)], [event], self._guards))
                return update.document, True

    async def enable_adapter(self, adapter: str) -> AdapterDocument:
        """Enable an adapter that is cooling down or disabled; return its state."""
        enabled = AdapterUpdate(AdapterDocument(enabled_at=self._clock.now()), AdapterEnabled())
        known, _ = await self.update_adapter(
            adapter, lambda known: enabled if known.disabled_reason or known.cooldown_until else None
        )
        return known

    async def checkpoint(self) -> None:
        """Create the periodic checkpoint that is due, and prune older ones."""
        # Imported late: read-only commands create no checkpoint.
        from orchestrator.state.documents.checkpoints import create_checkpoint, prune_checkpoints  # noqa: PLC0415

        await create_checkpoint(
            self._store, self.run.id, "active run", maker=CheckpointOrigin.CLOCK, guards=self._guards
        )
        await prune_checkpoints(self._store, self.run.id, MAX_CLOCK_CHECKPOINTS, self._guards)

    async def requests(self) -> list[RunRequest]:
        """Return the pending requests, oldest first."""
        return await read_requests(self._store, self.run.id)

    async def changes(self) -> AsyncGenerator[ExternalChange]:
        """Yield pending requests, then changes and requests of others.

        The latter are yielded as they are committed.
        """
        while True:
            position = await self._store.position()
            if await self.load_new_tasks():
                yield ExternalChange(has_new_tasks=True)
            documents = await read_tasks(self._store, self.run.id)  # later changes come from the log
            for task in self.run.tasks:
                await self._wait_settled(task)
                if task in documents and documents[task].version > self._versions[task]:
                    await self.refresh(task)
                if (before := self._unreported.pop(task, None)) is not None:
                    yield ExternalChange(task, before)
            for request in await self.requests():
                yield ExternalChange(request=request)
            with suppress(HistoryCompacted):  # after a long suspension, reload
                async for record in self._store.watch(position):
                    async for change in self._changes_in(record):
                        yield change

    async def _changes_in(self, record: CommitRecord) -> AsyncGenerator[ExternalChange]:
        if run_key(self.run.id) in record.documents and await self.load_new_tasks():
            yield ExternalChange(has_new_tasks=True)
        for key, (version, value) in record.documents.items():
            if value is not None and f"{key.id}/".startswith(f"{self.run.id}/"):
                if key.kind == "task":
                    await self._wait_settled(key.id.partition("/")[2])
                for change in self._changes_of_document(record, key, version, value):
                    yield change

    def _changes_of_document(
        self, record: CommitRecord, key: Key, version: int, value: JsonObject
    ) -> Iterable[ExternalChange]:
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
                    self.claims.mark_released(name)
                self._apply_document(name, version, TaskDocument.model_validate(value))
            elif self.claims is not None and name in self.claims:
                return  # already reloaded by the takeover
            delays = [event.data.get("retry_in") for event in record.events if event.data.get("task") == name]
            yield ExternalChange(name, before, next(filter(None, delays), None))

    def _is_unreported(self, task: str, version: int) -> bool:
        return task in self._unreported and version == self._versions[task]

    async def earlier_specs(self, task: str) -> dict[str, JsonObject]:
        """Return all recorded specifications of a task's subtasks, by name.

        They are found by prefix, so specifications of earlier plans are included.
        """
        documents = await self._store.list("spec", f"{self.run.id}/{task}")
        return {document.key.id.partition("/")[2]: document.value for document in documents if not document.damaged}

    async def have_any_existed(self, names: Iterable[str]) -> bool:
        """Return True if any name was ever used for a task, deleted tasks included."""
        for name in names:
            if await self._store.history(Key("spec", f"{self.run.id}/{name}"), 1):
                return True
        return False

    async def complete_request(self, request: RunRequest) -> None:
        """Record that a request was completed."""
        key = request_key(self.run.id, request.id)
        stored = await self._store.get(key)
        if stored is not None:
            event = self._event(RequestCompleted(request=request.id))
            await self._commit(Commit([Write(key, stored.version, None)], [event], self._guards))

    def slowest_commit(self) -> float:
        """Return the duration in seconds of the slowest commit since the last call."""
        slowest, self._slowest = self._slowest, 0.0
        return slowest

    async def _commit(self, commit: Commit) -> None:
        began = self._clock.monotonic()
        try:
            await self._store.commit(commit)
        except LeaseLost:
            if (error := await self.orchestrators.find_fencing_error()) is not None:
                self.orchestrators.count(refused=1)
                raise error from None
            raise
        self._slowest = max(self._slowest, self._clock.monotonic() - began)

    def _event(self, event: RunEvent) -> Event:
        return record_event(event, self.run.id, self._redactor)

    def _redacted(self, value: JsonObject) -> JsonObject:
        return sanitize(value, self._redactor)

    async def finish(self, status: str) -> None:
        """Record that the run has nothing left to do; it may still be resumed."""
        await self._update_run(RunFinished(status=status), ended=self._clock.now())
        failpoint("run.finished")

    async def halt(self, by: HaltCause, reason: str) -> None:
        """Record the cause and the reason of an early stop; the run may be resumed."""
        await self._update_run(RunHalted(by=by, reason=reason), halted=reason, halted_by=by)

    async def proven_bases(self) -> tuple[str, ...]:
        """Return the bases whose checks passed in any process of the run."""
        return (await self._read_run())[1].proven_bases

    async def record_passed_base(self, key: str, event: BasePassed) -> None:
        """Record that the checks of a base passed."""
        bases = (*await self.proven_bases(), key)[-MAX_PROVEN_BASES:]
        await self._update_run(event, proven_bases=bases)

    async def allow_failing_base(self) -> None:
        """Record that sessions may start although checks fail on the base."""
        await self._update_run(BaseFailureAllowed(), allow_failing_base=True)

    async def set_budget(self, limits: JsonObject) -> None:
        """Record new limits of the run's budget, by key."""
        given = tuple(dict.fromkeys((*self.run.given, "budget")))
        await self._update_run(RunBudgetChanged(limits=limits), budget={**self.run.budget, **limits}, given=given)

    async def _update_run(self, event: RunEvent, **changes: Any) -> None:
        while True:
            version, before = await self._read_run()
            amended = before.model_copy(update=changes)
            write = Write(run_key(self.run.id), version, amended.model_dump(mode="json"))
            try:
                await self._commit(Commit([write], [self._event(event)], self._guards))
            except VersionConflict:  # subtasks were added
                continue
            break
        self._set_run(amended)


def _release_write(claims: Claims, task: str, after: TaskDocument, trigger: Trigger) -> Write:
    """Return the write that releases the claim on a task that is no longer claimed."""
    return claims.release_write(
        task,
        CLAIM_RELEASES[after.status],
        after.reason,
        counts=trigger in {Trigger.RETRY, Trigger.BOUNCE},
        reset_retries=trigger in {Trigger.ADVANCE, Trigger.EXPAND},
    )
