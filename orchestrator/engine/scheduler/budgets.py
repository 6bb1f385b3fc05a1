"""What sessions use up is held against their budgets, while they are at work and when they are over."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread

from orchestrator.config.model import BudgetConfig, TaskSpec
from orchestrator.domain.runs.budget import (
    Budget,
    BudgetUsage,
    Spending,
    compute_budget_usage,
    compute_remaining_cost,
    sum_spending,
)
from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.model import Attempt, TaskDocument
from orchestrator.domain.runs.outcome import Failed, Interrupted
from orchestrator.engine.accounting import Accounting
from orchestrator.engine.state.ledger import Ledger
from orchestrator.protocols import Adapter, JsonObject
from orchestrator.sessions.output.follow import OutputFollower
from orchestrator.sessions.output.log_files import MAX_OUTPUT_BYTES
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, Transcript
from orchestrator.system.clock import Clock

#: Seconds between two looks at what a session has used up.
POLL_INTERVAL = 1.0

_NOTHING = Spending()
#: What to do where each is used up; a run keeps its file as it was.
_REMEDIES = {
    "session": "raise its `session_budget` in the file, then `council retry TASK --reload`, or split the task",
    "task": "raise its `budget` in the file, then `council retry TASK --reload`, or split the task",
    "run": "`council resume --budget` goes on with more",
}


class _Limit(NamedTuple):
    """A budget with what was used up of it; `owner` is the attempt, the task or nothing, which is the run."""

    scope: str
    owner: str
    budget: Budget
    spent: Spending

    @property
    def of(self) -> str:
        """Whose it is, in words."""
        return f"{self.scope} {self.owner}" if self.owner else f"the {self.scope}"


class BudgetReached(NamedTuple):
    """A budget that is used up, and what that makes of the attempt that used it up."""

    scope: str
    outcome: Failed | Interrupted


@dataclass(slots=True)
class _UsageMeter:
    """A session at work: what it is known to have used up."""

    follower: OutputFollower
    started: float
    said: Transcript = EMPTY_TRANSCRIPT
    tokens: int = 0
    cost: float = 0.0

    def read(self) -> bool:
        """Take what has come; whether any did. Blocks."""
        events = self.follower.read()
        for event in events or ():
            self.said = self.said.after(event)
        return events is not None


class Budgets:
    """The budgets of a run, its tasks and their sessions; `halt` ends the run, with the reason."""

    def __init__(self, ledger: Ledger, clock: Clock, accounting: Accounting, halt: Callable[[str], None]) -> None:
        self._ledger, self._clock, self._accounting, self._halt = ledger, clock, accounting, halt
        self._run = BudgetConfig.model_validate(ledger.run.budget).policy()
        self._over = Spending()
        if self._run.is_limited:  # with many tasks that takes its time
            for task in ledger.run.tasks:
                self._over += sum_spending(ledger.task(task).attempts)
        self._meters: dict[str, _UsageMeter] = {}
        # Of all sessions at work, so that a look at the run does not go through them.
        self._tokens, self._cost, self._started = 0, 0.0, 0.0
        self._told: set[tuple[str, ...]] = set()

    def cost_left(self, task: str, spec: TaskSpec) -> float | None:
        """Return how many dollars a task's next session may cost; None: without a limit."""
        return compute_remaining_cost((one.budget, one.spent) for one in self._limits(task, spec, ""))

    def is_halted(self) -> bool:
        """Whether the run has nothing left to use up; it is halted then."""
        return self._check_limit(self._of_run()) is not None

    def find_obstacle(self, task: str, spec: TaskSpec) -> Failed | None:
        """Return why a task may have no further session."""
        reason = _exhausted(self._of_task(task, spec))
        return None if reason is None else Failed(FailureClass.BUDGET, reason)

    def add_peer_usage(self, before: TaskDocument, after: TaskDocument) -> None:
        """Take what sessions of other orchestrators used up of which the end has been recorded."""
        known = {one.number for one in before.attempts if one.ended is not None}
        self._over += sum_spending(one for one in after.attempts if one.ended is not None and one.number not in known)

    @asynccontextmanager
    async def watched(
        self,
        task: str,
        attempt: int,
        spec: TaskSpec,
        adapter: Adapter,
        log: Path,
        stop: Callable[[BudgetReached], None],
    ) -> AsyncIterator[None]:
        """Watch over a session for the body: call `stop` when it has used up what it, its task or the run may."""
        if not any(one.is_limited for one in (spec.session_budget.policy(), spec.budget.policy(), self._run)):
            yield
            return
        meter = self._meters[task] = _UsageMeter(OutputFollower(adapter, log), self._clock.now())
        self._started += meter.started
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._watch, task, attempt, spec, meter, stop)
                yield
                group.cancel_scope.cancel()
        finally:
            del self._meters[task]
            self._started -= meter.started
            self._tokens, self._cost = self._tokens - meter.tokens, self._cost - meter.cost

    def find_reached(self, task: str, spec: TaskSpec, said: Transcript) -> BudgetReached | None:
        """Return the budget that a session has used up by what it said to the last; it is over, but not counted yet."""
        own = self._accounting.net_usage(said, self._ledger.task(task).attempts)
        last = Spending(own.input_tokens + own.output_tokens, own.cost or 0.0)
        session = _Limit("session", task, spec.session_budget.policy(), last)
        limits = (session, self._of_task(task, spec, last), self._of_run(last))
        return next(filter(None, map(self._check_limit, limits)), None)

    async def count(self, task: str, spec: TaskSpec, attempt: Attempt) -> None:
        """Take what an attempt that is over used up, and tell where that is a good part of what there is, or more."""
        self._over += sum_spending([attempt])
        limits = (self._of_task(task, spec), self._of_run())
        for limit in limits:
            await self._warn(limit)
            for share in compute_budget_usage(limit.budget, limit.spent):
                if share.is_exhausted:
                    await self._note_share("budget.exhausted", limit, share)
        counts_money = any(one.budget.cost is not None for one in limits) or spec.session_budget.cost is not None
        if counts_money and attempt.cost is None and (attempt.input_tokens or attempt.output_tokens):
            facts = {"adapter": attempt.adapter, "model": attempt.model}
            await self._note_once("budget.price_unknown", facts, attempt.adapter, attempt.model or "")

    async def _watch(
        self, task: str, attempt: int, spec: TaskSpec, meter: _UsageMeter, stop: Callable[[BudgetReached], None]
    ) -> None:
        session = f"{task}.{attempt}"
        while True:
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + POLL_INTERVAL)
            if await anyio.to_thread.run_sync(meter.read):
                self._update_meter(task, meter)
            if meter.follower.at >= MAX_OUTPUT_BYTES:
                await self._note_once("budget.untracked", {"of": f"session {session}"}, session)
            for limit in self._limits(task, spec, session):
                await self._warn(limit)
                if (found := self._check_limit(limit)) is not None:
                    stop(found)
                    return

    def _limits(self, task: str, spec: TaskSpec, session: str) -> Iterator[_Limit]:
        now = self._now(task)
        yield _Limit("session", session, spec.session_budget.policy(), now)
        yield self._of_task(task, spec, now)
        yield self._of_run()

    def _of_task(self, task: str, spec: TaskSpec, more: Spending = _NOTHING) -> _Limit:
        """Return the limit of a task; `more` was used up beside what is recorded.

        A task and all that its plan became, sessions at work included, have one budget.
        """
        spent = more
        for one in self._ledger.family(task):
            spent += sum_spending(self._ledger.task(one).attempts)
            if one != task:
                spent += self._now(one)
        return _Limit("task", task, spec.budget.policy(), spent)

    def _of_run(self, more: Spending = _NOTHING) -> _Limit:
        """Return the limit of the run, sessions at work included; `more` was used up beside all that."""
        seconds = max(len(self._meters) * self._clock.now() - self._started, 0.0)
        return _Limit("run", "", self._run, self._over + Spending(self._tokens, self._cost, seconds) + more)

    def _update_meter(self, task: str, meter: _UsageMeter) -> None:
        own = self._accounting.net_usage(meter.said, self._ledger.task(task).attempts)
        tokens, cost = own.input_tokens + own.output_tokens, own.cost or 0.0
        self._tokens, self._cost = self._tokens + tokens - meter.tokens, self._cost + cost - meter.cost
        meter.tokens, meter.cost = tokens, cost

    def _now(self, task: str) -> Spending:
        """Return what the session of a task that is at work has used up so far."""
        meter = self._meters.get(task)
        if meter is None:
            return _NOTHING
        return Spending(meter.tokens, meter.cost, max(self._clock.now() - meter.started, 0.0))

    def _check_limit(self, limit: _Limit) -> BudgetReached | None:
        """Return what comes of a limit if nothing is left of it; where it is the run's, that is halted."""
        reason = _exhausted(limit)
        if reason is None:
            return None
        if limit.scope != "run":
            return BudgetReached(limit.scope, Failed(FailureClass.BUDGET, reason))
        self._halt(reason)
        return BudgetReached(limit.scope, Interrupted(reason))

    async def _warn(self, limit: _Limit) -> None:
        for share in compute_budget_usage(limit.budget, limit.spent):
            if share.is_low and not share.is_exhausted:
                await self._note_share("budget.low", limit, share)

    async def _note_share(self, event: str, limit: _Limit, share: BudgetUsage) -> None:
        facts = {"scope": limit.scope, "of": limit.of, "limit": share.key, "reason": share.describe()}
        await self._note_once(event, facts, limit.of, share.key)

    async def _note_once(self, event: str, facts: JsonObject, *of: str) -> None:
        if (event, *of) not in self._told:
            self._told.add((event, *of))
            await self._ledger.note(event, facts)


def _exhausted(limit: _Limit) -> str | None:
    """Return in words that nothing is left of a budget, if so."""
    found = next((one for one in compute_budget_usage(limit.budget, limit.spent) if one.is_exhausted), None)
    if found is None:
        return None
    return f"the {limit.scope}'s budget is used up, {found.describe()}: {_REMEDIES[limit.scope]}"
