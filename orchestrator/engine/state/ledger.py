"""The state of a run as seen by one orchestrator.

Every change is one commit fenced by its lease epoch.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio

from orchestrator.domain.events.base import RunEvent, TaskEvent
from orchestrator.domain.events.runs import RunJoined
from orchestrator.domain.runs.model import RunDocument, TaskDocument
from orchestrator.domain.runs.statuses import CLAIMED_STATUSES, TRANSITIONS, TaskStatus, Trigger
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.engine.state.adapter_states import AdapterStates
from orchestrator.engine.state.records import new_task_writes, parse_entry, run_key, task_key
from orchestrator.engine.state.run_state import RunState
from orchestrator.engine.state.tasks import LoadedRun, TaskDefinitions, TaskTable, load_run
from orchestrator.engine.state.transitions import TaskUpdate, build_transition
from orchestrator.engine.state.work_sharing import WorkSharing
from orchestrator.engine.state.writer import RunWriter
from orchestrator.errors import ClaimLost, LeaseLost, RefusedError, VersionConflict
from orchestrator.locking.claims import Claims
from orchestrator.locking.orchestrators import RunMembership
from orchestrator.locking.takeovers import ClaimTakeovers
from orchestrator.protocols import Commit, Event, Guard, Store, Write
from orchestrator.repo.source.shared_work import SharedWork, TaskCommit
from orchestrator.repo.worktrees.hub import work_branch_name
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

if TYPE_CHECKING:
    from orchestrator.domain.security.secrets import Redactor

#: Given the guard of the claim on a task, returns the writes that claim its paths, for the commit that starts it; None
#: if it can't start now.
StartPlan = Callable[[Guard], Awaitable["Sequence[Write] | None"]]


class Ledger:
    """The state of a run as seen by one orchestrator; applies changes to its tasks.

    Each orchestrator holds a claim on every task that it works on, from the start of the task until the task ends or
    waits for a retry. `writer` commits; `run_state`, `adapters`, `tasks` and `definitions` hold the documents.
    """

    def __init__(
        self, writer: RunWriter, loaded: LoadedRun, work: SharedWork | None = None, *, is_shared: bool = True
    ) -> None:
        """Create a ledger from loaded documents; `work` is at the remote if the run spans machines.

        Unless `is_shared`, there are no claims, and only the leader can work in the run.
        """
        self.work = None if work is None else WorkSharing(work, writer)
        self.writer, self.orchestrators = writer, writer.orchestrators
        parts = writer.store, writer.clock, writer.orchestrators
        self.claims = Claims(*parts) if is_shared else None
        self.takeovers = None if self.claims is None else ClaimTakeovers(*parts, self.claims)
        self.run_state = RunState(writer, loaded.run)
        self.adapters = AdapterStates(writer, self.run_state)
        self.tasks = TaskTable(writer.store, self.run_state, loaded, self.claims)
        max_attempts = writer.orchestrators.timing.max_retries + 1
        self.definitions = TaskDefinitions(writer.store, self.run_state, max_attempts)
        self._path_starts = anyio.Lock()
        """Held to claim paths: all commits that do write the same document, and would conflict."""

    @classmethod
    async def take(
        cls,
        store: Store,
        clock: Clock,
        redactor: Redactor,
        orchestrators: RunMembership,
        sandbox: str,
        work: SharedWork | None = None,
        *,
        is_shared: bool = True,
    ) -> Ledger:
        """Become the leader of a run under the next epoch, and load the run.

        The event contains the kind of the `sandbox`. Raises RunActive if another live orchestrator leads the run.
        """
        writer = RunWriter(store, clock, redactor, orchestrators)
        while True:
            loaded = await load_run(store, writer.run)
            reopened = []
            if (loaded.run.ended, loaded.run.halted) != (None, None):
                version, run = await RunState(writer, loaded.run).read()
                run = run.model_copy(update={"ended": None, "halted": None, "halt_cause": None})
                reopened = [Write(run_key(run.id), version, run.model_dump(mode="json"))]
            try:
                await writer.lead(sandbox, reopened)
            except VersionConflict:
                # Without our record, another orchestrator was first.
                if await orchestrators.peers.find(orchestrators.me.id) is not None:
                    raise
            else:
                # Again: a checkpoint may have been restored before the lease.
                return cls(writer, await load_run(store, writer.run, loaded), work, is_shared=is_shared)

    @classmethod
    async def join(
        cls,
        store: Store,
        clock: Clock,
        redactor: Redactor,
        orchestrators: RunMembership,
        sandbox: str,
        work: SharedWork | None = None,
    ) -> Ledger:
        """Join a run as a worker, and load it; the event has the kind of the `sandbox`."""
        writer, me = RunWriter(store, clock, redactor, orchestrators), orchestrators.me
        loaded = await load_run(store, writer.run)
        joined = RunJoined(run=writer.run, orchestrator=me.id, host=me.host, pid=me.pid, sandbox=sandbox)
        await store.commit(Commit([orchestrators.join_write()], [Event.of(joined)]))
        orchestrators.mark_joined()
        return cls(writer, await load_run(store, writer.run, loaded), work)

    @property
    def run(self) -> RunDocument:
        """The document of the run."""
        return self.run_state.document

    def task(self, task: str) -> TaskDocument:
        """Return the current state of a task."""
        return self.tasks[task]

    def work_branch(self, task: str) -> str:
        """Return the branch with the built work of a task."""
        return work_branch_name(self.run.id, task, self.tasks[task].building_attempt.number)

    async def fetch_work(self, task: str, commit: str | None, ref: str) -> None:
        """Fetch recorded work of a task from other machines, and store it as `ref`, unless it is here.

        Raises GitError if the remote can't be reached, and WorkMissing if it does not have the work.
        """
        if self.work is not None and commit:
            await self.work.fetch(TaskCommit(task, commit), ref)

    def statuses(self) -> dict[str, TaskStatus]:
        """Return the status of every task, in file order."""
        return {task: self.tasks[task].status for task in self.run.tasks}

    async def note(self, event: RunEvent) -> None:
        """Record an event without changing a document."""
        await self.writer.note(event)

    async def change(self, task: str, trigger: Trigger, event: TaskEvent, **changes: Any) -> None:
        """Apply a trigger to a task and record it, with the event of the trigger."""
        await self.change_all({task: TaskUpdate(trigger, event, changes)})

    async def change_all(self, updates: Mapping[str, TaskUpdate], permits: Sequence[Guard] = ()) -> None:
        """Change tasks in one commit, as `change` does.

        `permits` are additional guards. Raises ClaimLost if another orchestrator has taken over one of the tasks.
        """
        if self.work is not None:
            await self.work.push(updates)
        writes, events, guards, changed = list[Write](), list[Event](), list(permits), dict[str, TaskDocument]()
        for task, update in updates.items():
            if self.is_claimed_elsewhere(task) or (self.tasks[task].status, update.trigger) not in TRANSITIONS:
                await self.require_claim(task)
            changed[task], step = self._build_transition(task, update)
            writes += step.writes
            events += step.events
            if self.claims is not None and (guard := self.claims.guard(task)) is not None:
                guards.append(guard)
                if changed[task].status not in CLAIMED_STATUSES:
                    writes.append(_release_write(self.claims, task, changed[task], update.trigger))
            if update.trigger is Trigger.REQUEST_RETRY and self.claims is not None:
                writes += await self.claims.reset_retries(task)
        with self.tasks.delay_reports(updates):
            try:
                await self._commit_with_new_tasks(updates, Commit(writes, events, guards))
            except (LeaseLost, VersionConflict):
                await self.confirm_claims(*updates)
                raise
            for task, after in changed.items():
                self.tasks.apply_own(task, after)

    async def _commit_with_new_tasks(self, updates: Mapping[str, TaskUpdate], commit: Commit) -> None:
        """Commit changes together with the subtasks that they create, if any.

        Other processes may change the run document concurrently.
        """
        specs = {task: spec for update in updates.values() for task, spec in update.tasks.items()}

        def insert(names: list[str]) -> None:
            for task, update in updates.items():
                index = 1 + max(names.index(name) for name in (task, *self.tasks[task].subtasks) if name in names)
                names[index:index] = update.tasks

        if specs:
            await self._commit_new_tasks(specs, commit, insert)
        else:
            await self.writer.commit(commit)

    async def add_tasks(self, specs: Mapping[str, TaskSpec], event: RunEvent) -> None:
        """Add tasks at the end of the run, and record an event."""

        def append(names: list[str]) -> None:
            names += [task for task in specs if task not in names]

        commit = Commit([], [Event.of(event.within(run=self.run.id))])
        await self._commit_new_tasks(specs, commit, append)

    async def _commit_new_tasks(
        self, specs: Mapping[str, TaskSpec], commit: Commit, insert: Callable[[list[str]], None]
    ) -> None:
        """Commit with new tasks, which `insert` adds to the names of the run's tasks."""
        while True:
            version, before = await self.run_state.read()
            names = list(before.tasks)
            insert(names)
            after = before.model_copy(update={"tasks": tuple(names)})
            run_write = Write(run_key(after.id), version, after.model_dump(mode="json"))
            writes = [*commit.writes, run_write, *new_task_writes(after, specs)]
            try:
                await self.writer.commit(replace(commit, writes=writes))
            except VersionConflict:
                if (await self.run_state.read())[0] == version:
                    raise
                continue
            break
        failpoint("plan.subtasks")
        for task, spec in specs.items():
            if task not in self.tasks:  # otherwise already read from the log
                self.tasks.add(task, 1, TaskDocument(), parse_entry(spec.model_dump(mode="json")))
        self.run_state.adopt(after)

    async def start(self, task: str, update: TaskUpdate, also: StartPlan | None = None) -> bool:
        """Claim a task and record its next attempt in one commit.

        Return False if another orchestrator owns or has changed the task, or if `also` returns None.
        """
        if self.claims is None:
            await self.change_all({task: update})
            return True
        if self.work is not None:
            await self.work.push({task: update})
        async with self._path_starts if also is not None else nullcontext():
            with self.tasks.delay_reports([task]):
                return await self._start(self.claims, task, update, also)

    async def _start(self, claims: Claims, task: str, update: TaskUpdate, also: StartPlan | None) -> bool:
        version = self.tasks.version(task)
        while True:
            plan = await claims.plan(task, override=True)  # the task has not started: a worker loses nothing
            if plan is None:
                await self.tasks.refresh(task)
                return False
            if (extra_writes := [] if also is None else await also(plan.guard)) is None:
                return False
            if self.tasks.version(task) != version or self.tasks[task].status is not TaskStatus.PENDING:
                return False  # the update is based on an older document
            after, step = self._build_transition(task, update)
            try:
                await self.writer.commit(Commit([*step.writes, *extra_writes, plan.write], step.events))
            except VersionConflict:
                self.orchestrators.count(conflicts=1)
                if await self.writer.store.get(task_key(self.run.id, task)) is None:
                    raise RefusedError(f"run {self.run.id} was removed", "start a new run") from None
                await self.tasks.refresh(task)
                continue
            claims.mark_claimed(task, plan)
            self.tasks.apply_own(task, after)
            return True

    async def claim(self, task: str, *, is_requested: bool = False) -> bool:
        """Claim an unclaimed task in its current state; return whether the claim is ours.

        Such a task may be queued to land. On a user's request (`is_requested`), take the claim from any owner, except
        for a task that is landing.
        """
        if self.claims is None:
            return True
        with self.tasks.delay_reports([task]):
            if task not in self.claims:
                await self.tasks.refresh(task)
                status = self.tasks[task].status
                if status not in CLAIMED_STATUSES or (is_requested and status is TaskStatus.LANDING):
                    return False  # nothing to claim, now or later
                if await self.claims.claim(task, is_requested=is_requested) is None:
                    return False
            await self.tasks.refresh(task, released=False)
            if (status := self.tasks[task].status) in CLAIMED_STATUSES:
                self.tasks.take_unreported(task)
                return True
            await self.claims.release(task, status.release_reason)  # the task had already ended
            return False

    async def release(self, task: str) -> None:
        """Release our claim on a task that a restored checkpoint made unclaimable."""
        document = self.tasks[task]
        if self.claims is not None and task in self.claims and document.status not in CLAIMED_STATUSES:
            await self.claims.release(task, document.status.release_reason, document.reason)

    def is_claimed_elsewhere(self, task: str) -> bool:
        """Return True if another orchestrator runs a task or queues it to land."""
        return self.claims is not None and self.tasks[task].status in CLAIMED_STATUSES and task not in self.claims

    async def require_claim(self, task: str) -> None:
        """Check that this orchestrator still has the claim on a task.

        Raises ClaimLost if another orchestrator has taken it over.
        """
        if self.claims is not None and task not in self.claims:
            await self.tasks.refresh(task)
            await self.confirm_claims(task)

    async def confirm_claims(self, *tasks: str) -> None:
        """Verify in the store that the claims on tasks are ours, or were never taken.

        Raises ClaimLost with the new owner if one of the tasks was taken over.
        """
        if self.claims is None:
            return
        for task in tasks:
            guard, claim = self.claims.guard(task), await self.claims.read(task)
            if claim is not None and (guard is None or claim.epoch != guard.epoch):
                self.claims.mark_lost(task)
                raise ClaimLost(task, 0 if guard is None else guard.epoch, claim.epoch, claim.owner.id)

    def _build_transition(self, task: str, update: TaskUpdate) -> tuple[TaskDocument, Commit]:
        key, writer = task_key(self.run.id, task), self.writer
        return build_transition(
            key, self.tasks[task], self.tasks.version(task), update, writer.clock.now(), writer.redactor
        )


def _release_write(claims: Claims, task: str, after: TaskDocument, trigger: Trigger) -> Write:
    """Return the write that releases the claim on a task that is no longer claimed."""
    return claims.release_write(
        task,
        after.status.release_reason,
        after.reason,
        counts=trigger in {Trigger.RETRY, Trigger.RETRY_WORK},
        reset_retries=trigger in {Trigger.ADVANCE, Trigger.EXPAND},
    )
