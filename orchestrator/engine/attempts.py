"""One attempt of a task: recorded before anything of it exists, run, and recorded as what it came to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, assert_never

from orchestrator.clock import Clock
from orchestrator.config.model import TaskSpec
from orchestrator.domain.failures import FailureClass, Policy, policy_of
from orchestrator.domain.holdings import HeldBy as OwnedBy
from orchestrator.domain.lifecycle import Trigger
from orchestrator.domain.model import AdapterDocument, Attempt, TaskDocument
from orchestrator.domain.notes import block
from orchestrator.domain.outcome import Built, Exhausted, Failed, Interrupted, Limits
from orchestrator.domain.retry import park_until, retry_delay
from orchestrator.domain.sessions import SessionName
from orchestrator.engine.budgets import Budgets, Reached
from orchestrator.engine.details import Workplace
from orchestrator.engine.ledger import Learned, Ledger, Outdated
from orchestrator.engine.starting_points import Start, StartingPoints
from orchestrator.engine.workshop import Workshop
from orchestrator.errors import ClaimLost
from orchestrator.failpoints import failpoint
from orchestrator.protocols import Capability, Guard, JsonObject, Write
from orchestrator.repo.pool import Pool
from orchestrator.repo.worktrees import Worktree
from orchestrator.sessions.output import log_file
from orchestrator.sessions.session import Assignment, Conversation, Finished, Session

#: By how many seconds the end of a limit must be later than was known to be told again: programs tell whole seconds.
_LATER = 1.0

#: Why an attempt begins anew though there is work that it was to mend.
_DOES_NOT_FIT = "what was built before conflicts with what has landed since: it is done anew"


@dataclass(frozen=True, slots=True)
class ToLand:
    """The work waits to land."""


@dataclass(frozen=True, slots=True)
class Over:
    """No attempt follows."""


@dataclass(frozen=True, slots=True)
class Again:
    """Another attempt may follow after `delay` seconds; None: not while this process runs."""

    delay: float | None


@dataclass(frozen=True, slots=True)
class Parked:
    """Nothing of the adapter may start before `until` (wall-clock seconds); the task then starts anew."""

    adapter: str
    until: float


@dataclass(frozen=True, slots=True)
class Closed:
    """Nothing of the adapter may start until a person has seen to it."""

    adapter: str
    reason: str


@dataclass(frozen=True, slots=True)
class Starved:
    """The machine has not enough of something: nothing should start for a while."""

    reason: str


After = ToLand | Over | Again | Parked | Closed | Starved


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Another orchestrator has the task, or had paths that it is to own: where it is now is in the ledger."""


@dataclass(slots=True)
class Work:
    """An attempt under way; `cancelled` says that a person does not want the task any more."""

    task: str
    spec: TaskSpec
    adapter: str
    session: Session
    cancelled: bool = field(default=False, init=False)
    is_spent: bool = field(default=False, init=False)
    """Whether the task's budget is used up, so that no other attempt follows."""

    @property
    def name(self) -> SessionName:
        """What its session is called."""
        worktree = self.session.assignment.worktree
        return SessionName(worktree.run, worktree.task, worktree.attempt)

    def exhaust(self, found: Reached) -> None:
        """End it because a budget is used up."""
        self.is_spent = found.scope == "task"
        self.session.stop(found.outcome if isinstance(found.outcome, Failed) else None)

    def cancel(self) -> None:
        """End it for good."""
        self.cancelled = True
        self.session.stop()


@dataclass(frozen=True, slots=True)
class Attempts:
    """Makes and performs the attempts of one run."""

    ledger: Ledger
    shop: Workshop
    pool: Pool
    budgets: Budgets
    starts: StartingPoints
    clock: Clock

    def prepare(self, task: str, spec: TaskSpec, adapter: str, start: Start, notes: str | None) -> Work:
        """Return the next attempt of a task, with one of its adapters, from `start`; nothing of it exists yet.

        `notes` are what it gets to read beside its prompt.
        """
        document = self.ledger.task(task)
        earlier, goes_on = None, start.commit is not None
        if goes_on and Capability.RESUME in self.shop.adapters[adapter].capabilities():
            earlier = _conversation(document, adapter)
        assignment = Assignment(
            worktree=Worktree(self.shop.hub, self.ledger.run.id, task, len(document.attempts) + 1),
            base=start.base,
            start=start.commit,
            prompt=spec.prompt,
            told="\n\n".join(filter(None, (notes, document.feedback if goes_on else None))) or None,
            adapter=self.shop.adapters[adapter],
            adapter_name=adapter,
            reach=self.shop.configs[adapter].reach,
            limits=Limits(spec.timeout, spec.silence),
            max_file=spec.max_file,
            instructions=spec.instructions,
            mcp_servers=self.shop.mcp_servers,
            most_cost=self.budgets.cost_left(task, spec),
            earlier=earlier,
        )
        return Work(task, spec, adapter, Session(self.shop.tools, self.pool, assignment))

    async def perform(self, work: Work) -> After | Elsewhere:
        """Record the attempt, run it, record its end, and clean up behind it."""
        what = work.session.assignment
        attempt = Attempt(
            number=what.worktree.attempt,
            adapter=work.adapter,
            base=what.base,
            start=what.start,
            started=self.clock.now(),
            secrets=work.session.secret_names(),
        )
        earlier = self.ledger.task(work.task).attempts
        if len(earlier) + 1 != attempt.number:  # another orchestrator has tried it since this one was prepared
            return Elsewhere()
        attempts = (*earlier, attempt)
        details, changes = {"base": what.base, "adapter": work.adapter}, {"attempts": attempts, "current": None}
        if what.start is None and self.ledger.task(work.task).start is not None:
            details |= {"reason": _DOES_NOT_FIT}
            changes |= {"start": None, "feedback": None}
        taken = await self.ledger.start(work.task, details, partial(self._paths, work), **changes)
        if taken is not None:
            return Elsewhere()
        failpoint("attempt.recorded")
        number, log = attempt.number, log_file(self.shop.tools.logs, work.task, attempt.number, "stdout")
        async with AsyncExitStack() as stack:
            watched = self.budgets.watched(work.task, number, work.spec, what.adapter, log, work.exhaust)
            await stack.enter_async_context(watched)
            if self.shop.desk is not None:
                seat = self.shop.desk.seated(work.name, work.adapter, self._workplace(work), keep_ownership=True)
                await stack.enter_async_context(seat)
            finished = await work.session.run()
        finished = self._by_budget(work, finished)
        try:
            after = await self._record(work, finished)
        except ClaimLost as lost:
            facts = {"task": work.task, "attempt": number, "by": lost.by, "branch": finished.branch}
            await self.ledger.note("task.claim_lost", facts)
            await work.session.release(saved=finished.collected)
            return Elsewhere()
        failpoint("attempt.ended")
        await self.budgets.count(work.task, work.spec, self.ledger.task(work.task).attempts[number - 1])
        for ref in finished.salvaged:
            await self.ledger.note("task.salvaged", {"task": work.task, "branch": ref})
        for fault in finished.faults:
            await self.ledger.note("task.after_run_failed", {"task": work.task, "reason": fault})
        for fault in finished.desk_faults:
            await self.ledger.note("task.desk_failed", {"task": work.task, "reason": fault})
        if not finished.collected:
            reason = "; ".join(("it holds what is on no branch", *finished.notes))
            kept = {"task": work.task, "worktree": str(what.worktree.tree), "reason": reason}
            await self.ledger.note("task.worktree_kept", kept)
        await work.session.release(saved=finished.collected)
        return after

    def _workplace(self, work: Work) -> Workplace:
        what, tools = work.session.assignment, self.shop.tools
        return Workplace(what.worktree, what.base, what.adapter, tools.logs, tools.admission(what.max_file))

    async def notes(self, task: str, spec: TaskSpec) -> str | None:
        """Return what earlier sessions left for one of this task, or of the paths that it owns, to read."""
        if self.shop.desk is None:
            return None
        return block(await self.shop.desk.memory.concerning(task, spec.owns))

    async def _paths(self, work: Work, claim: Guard) -> Sequence[Write] | OwnedBy | Outdated:
        """Return what it takes to own a task's paths under a claim that is about to be taken."""
        owns = work.spec.owns
        if not owns:
            return []
        orchestrator = self.ledger.orchestrators.me.id
        planned = await self.shop.registry.plan(work.name, owns, orchestrator=orchestrator, claim=claim)
        # Whoever had them may have landed since it was looked where to start; from now on nobody else can.
        if isinstance(planned, OwnedBy) or not await self.starts.is_outdated(owns, work.session.assignment.base):
            return planned
        return Outdated()

    def _by_budget(self, work: Work, finished: Finished) -> Finished:
        """Return the end of a session; one that stopped itself at a limit of ours is that limit's."""
        if not isinstance(finished.outcome, Failed) or finished.outcome.failure is not FailureClass.LIMIT:
            return finished
        found = self.budgets.reached(work.task, work.spec, finished.transcript)
        if found is None:
            return finished
        work.is_spent = found.scope == "task"
        return replace(finished, outcome=found.outcome)

    async def _record(self, work: Work, finished: Finished) -> After:
        await self.ledger.hold(work.task)
        if work.cancelled:
            await self._end(work, Trigger.CANCEL, finished, "cancelled", "on request, while it ran")
            return Over()
        outcome = finished.outcome
        match outcome:
            case Built(commit):
                await self._end(work, Trigger.BUILD, finished, "built", None, commit=commit, start=None, feedback=None)
                failpoint("work.recorded")
                await self._trust(work.adapter)
                return ToLand()
            case Interrupted(reason):
                await self._end(work, Trigger.INTERRUPT, finished, "interrupted", reason)
                return Again(None)
            case Exhausted(reason):
                await self._end(work, Trigger.HOLD, finished, "interrupted", reason)
                return Starved(reason)
            case Failed():
                return await self._failed(work, finished, outcome)
            case _:
                assert_never(outcome)

    async def _failed(self, work: Work, finished: Finished, outcome: Failed) -> After:
        failure, reason = outcome.failure, outcome.reason
        match policy_of(failure, work.spec.retry_on):
            case Policy.PARK:
                await self._end(work, Trigger.HOLD, finished, failure, reason)
                return await self._park(work.adapter, outcome)
            case Policy.CLOSE:
                await self._end(work, Trigger.HOLD, finished, failure, reason)
                return await self._close(work.adapter, reason)
            case policy:
                failures = self.ledger.task(work.task).failures + 1
                if policy is Policy.RETRY and failures < work.spec.attempts and not work.is_spent:
                    delay = round(retry_delay(work.spec.backoff.policy(), failures), 3)
                    facts = {"retry_in": delay}
                    await self._end(work, Trigger.RETRY, finished, failure, reason, facts, failures=failures)
                    return Again(delay)
                trigger = Trigger.IDLE if failure is FailureClass.NO_CHANGE else Trigger.FAIL
                await self._end(work, trigger, finished, failure, reason, failures=failures)
                return Over()

    async def _park(self, adapter: str, outcome: Failed) -> Parked:
        now = self.clock.now()

        def judge(known: AdapterDocument) -> Learned | None:
            # Sessions that run into one limit side by side are one park.
            parked_until = known.parked_until if _is_parked(known, now) else None
            parks = known.parks + (parked_until is None)
            until = park_until(now, outcome.until, parks)
            if parked_until is not None and (outcome.until is None or until - parked_until < _LATER):
                return None
            learned = AdapterDocument(parked_until=until, parks=parks)
            return Learned(learned, "adapter.parked", {"until": until, "reason": outcome.reason})

        known, is_new = await self.ledger.learn(adapter, judge)
        if is_new:
            failpoint("adapter.parked")
        assert known.parked_until is not None, "else it would have been parked"  # noqa: S101
        return Parked(adapter, known.parked_until)

    async def _close(self, adapter: str, reason: str) -> Closed:
        closed = Learned(AdapterDocument(closed=reason), "adapter.closed", {"reason": reason})
        await self.ledger.learn(adapter, lambda known: closed if known.closed is None else None)
        return Closed(adapter, reason)

    async def _trust(self, adapter: str) -> None:
        """Forget that an adapter was parked: a session of it has ended well that did not begin before that."""
        opened, now = Learned(AdapterDocument(), "adapter.opened", {}), self.clock.now()
        await self.ledger.learn(adapter, lambda known: opened if known.parks and not _is_parked(known, now) else None)

    async def _end(
        self,
        work: Work,
        trigger: Trigger,
        finished: Finished,
        outcome: str,
        reason: str | None,
        details: JsonObject | None = None,
        **changes: Any,
    ) -> None:
        document = self.ledger.task(work.task)
        attempts = document.with_attempt(
            ended=self.clock.now(),
            branch=finished.branch,
            outcome=outcome,
            reason=reason,
            is_kept=not finished.collected,
            folder=None if finished.folder is None else str(finished.folder),
            resumed=work.session.assignment.earlier is not None,
            **self.shop.accounting.recorded(finished.transcript, document.attempts),
        )
        facts = {"outcome": outcome, "reason": reason, "branch": finished.branch, **(details or {})}
        changes = {"attempts": attempts, "branch": finished.branch, "reason": reason, **changes}
        await self.ledger.change(work.task, trigger, facts, **changes)


def _conversation(document: TaskDocument, adapter: str) -> Conversation | None:
    """Return what a task's next attempt can go on with: the conversation in which was built what it is to mend."""
    if not document.attempts:
        return None
    last = document.attempt
    if last.adapter != adapter or last.outcome != FailureClass.CHECKS_FAILED:
        return None
    if last.session is None or last.folder is None:
        return None
    return Conversation(last.session, Path(last.folder))


def _is_parked(adapter: AdapterDocument, now: float) -> bool:
    return adapter.parked_until is not None and adapter.parked_until > now
