"""What sessions use up is held against their budgets, while they are at work and when they are over."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import anyio
import anyio.to_thread

from orchestrator.clock import Clock
from orchestrator.config.model import BudgetConfig, TaskSpec
from orchestrator.domain.budget import Budget, Share, Spending, cost_left, shares, spent_by
from orchestrator.domain.failures import FailureClass
from orchestrator.domain.model import Attempt
from orchestrator.domain.outcome import Failed, Interrupted
from orchestrator.engine.accounting import Accounting
from orchestrator.engine.ledger import Ledger
from orchestrator.protocols import Adapter
from orchestrator.sessions.following import Follower
from orchestrator.sessions.output import OUTPUT_CAP
from orchestrator.sessions.transcript import NOTHING_SAID, Transcript

#: Seconds between two looks at what a session has used up.
PAUSE = 1.0

#: What to do where each is used up; a run keeps its file as it was.
_REMEDIES = {
    "session": "for a new run raise its `session_budget`, or split the task",
    "task": "for a new run raise its `budget`, or split the task",
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


class Reached(NamedTuple):
    """A budget that is used up, and what that makes of the attempt that used it up."""

    scope: str
    outcome: Failed | Interrupted


@dataclass(slots=True)
class _Meter:
    """A session at work: what it is known to have used up."""

    follower: Follower
    started: float
    said: Transcript = NOTHING_SAID
    tokens: int = 0
    cost: float = 0.0

    def read(self) -> bool:
        """Take what has come; whether any did. Blocks."""
        events = self.follower.read()
        for event in events or ():
            self.said = self.said.after(event)
        return events is not None


class Stop(Protocol):
    """What ends a session, and `for_good` all attempts of its task."""

    def __call__(self, why: Failed, *, for_good: bool) -> None:
        """End it."""


class Budgets:
    """The budgets of a run, its tasks and their sessions; `halt` ends the run, with the reason."""

    def __init__(self, ledger: Ledger, clock: Clock, accounting: Accounting, halt: Callable[[str], None]) -> None:
        self._ledger, self._clock, self._accounting, self._halt = ledger, clock, accounting, halt
        self._run = BudgetConfig.model_validate(ledger.run.budget).policy()
        self._over = Spending()
        if self._run.is_limited:  # with many tasks that takes its time
            for task in ledger.run.tasks:
                self._over += spent_by(ledger.task(task).attempts)
        self._meters: dict[str, _Meter] = {}
        # Of all sessions at work, so that a look at the run does not go through them.
        self._tokens, self._cost, self._started = 0, 0.0, 0.0
        self._told: set[tuple[str, str, str]] = set()

    def cost_left(self, task: str, spec: TaskSpec) -> float | None:
        """Return how many dollars a task's next session may cost; None: without a limit."""
        limits = self._limits(task, spec, "")
        return cost_left((one.budget, one.spent) for one in limits)

    def is_halted(self) -> bool:
        """Whether the run has nothing left to use up; it is halted then."""
        reason = self._exhausted(_Limit("run", "", self._run, self._spent_by_run()))
        if reason is not None:
            self._halt(reason)
        return reason is not None

    def obstacle(self, task: str, spec: TaskSpec) -> Failed | None:
        """Return why a task may have no further session."""
        budget = spec.budget.policy()
        found = self._exhausted(_Limit("task", task, budget, spent_by(self._ledger.task(task).attempts)))
        return None if found is None else Failed(FailureClass.BUDGET, found)

    @asynccontextmanager
    async def watched(
        self, task: str, attempt: int, spec: TaskSpec, adapter: Adapter, log: Path, stop: Stop
    ) -> AsyncIterator[None]:
        """Watch over a session for the body: call `stop` when it has used up what it or its task may."""
        if not any(one.is_limited for one in (spec.session_budget.policy(), spec.budget.policy(), self._run)):
            yield
            return
        meter = self._meters[task] = _Meter(Follower(adapter, log), self._clock.now())
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

    def reached(self, task: str, spec: TaskSpec, attempt: Attempt, said: Transcript) -> Reached | None:
        """Return the budget that a session has used up by what it said to the last; it is over, but not counted yet."""
        own = self._accounting.own(said, [one for one in self._ledger.task(task).attempts if one != attempt])
        last = Spending(own.input_tokens + own.output_tokens, own.cost or 0.0, 0.0)
        for limit in (
            _Limit("session", task, spec.session_budget.policy(), last),
            _Limit("task", task, spec.budget.policy(), spent_by(self._ledger.task(task).attempts) + last),
            _Limit("run", "", self._run, self._spent_by_run() + last),
        ):
            reason = self._exhausted(limit)
            if reason is not None and limit.scope == "run":
                self._halt(reason)
                return Reached(limit.scope, Interrupted(reason))
            if reason is not None:
                return Reached(limit.scope, Failed(FailureClass.BUDGET, reason))
        return None

    async def count(self, task: str, spec: TaskSpec, attempt: Attempt) -> None:
        """Take what an attempt that is over used up, and tell where that is a good part of what there is, or more."""
        self._over += spent_by([attempt])
        limits = (
            _Limit("task", task, spec.budget.policy(), spent_by(self._ledger.task(task).attempts)),
            _Limit("run", "", self._run, self._spent_by_run()),
        )
        for limit in limits:
            await self._warn(limit)
            for share in shares(limit.budget, limit.spent):
                if share.is_exhausted:
                    await self._tell("budget.exhausted", limit, share)
        counts_money = any(one.budget.cost is not None for one in limits) or spec.session_budget.cost is not None
        if counts_money and attempt.cost is None and (attempt.input_tokens or attempt.output_tokens):
            await self._tell_unpriced(attempt)

    async def _tell_unfollowed(self, of: str) -> None:
        mark = ("unfollowed", of, "")
        if mark not in self._told:
            self._told.add(mark)
            await self._ledger.note("budget.unfollowed", {"of": of})

    async def _tell_unpriced(self, attempt: Attempt) -> None:
        mark = ("price", attempt.adapter, attempt.model or "")
        if mark not in self._told:
            self._told.add(mark)
            facts = {"adapter": attempt.adapter, "model": attempt.model}
            await self._ledger.note("budget.unpriced", facts)

    async def _watch(self, task: str, attempt: int, spec: TaskSpec, meter: _Meter, stop: Stop) -> None:
        while True:
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + PAUSE)
            if await anyio.to_thread.run_sync(meter.read):
                self._weigh(task, meter)
            if meter.follower.at >= OUTPUT_CAP:
                await self._tell_unfollowed(f"session {task}.{attempt}")
            for limit in self._limits(task, spec, f"{task}.{attempt}"):
                await self._warn(limit)
                reason = self._exhausted(limit)
                if reason is None:
                    continue
                if limit.scope == "run":
                    self._halt(reason)
                else:
                    stop(Failed(FailureClass.BUDGET, reason), for_good=limit.scope == "task")
                return

    def _limits(self, task: str, spec: TaskSpec, session: str) -> Iterator[_Limit]:
        now = self._now(task)
        yield _Limit("session", session, spec.session_budget.policy(), now)
        yield _Limit("task", task, spec.budget.policy(), spent_by(self._ledger.task(task).attempts) + now)
        yield _Limit("run", "", self._run, self._spent_by_run())

    def _weigh(self, task: str, meter: _Meter) -> None:
        own = self._accounting.own(meter.said, self._ledger.task(task).attempts)
        tokens, cost = own.input_tokens + own.output_tokens, own.cost or 0.0
        self._tokens, self._cost = self._tokens + tokens - meter.tokens, self._cost + cost - meter.cost
        meter.tokens, meter.cost = tokens, cost

    def _spent_by_run(self) -> Spending:
        seconds = max(len(self._meters) * self._clock.now() - self._started, 0.0)
        return self._over + Spending(self._tokens, self._cost, seconds)

    def _now(self, task: str) -> Spending:
        """Return what the session of a task that is at work has used up so far."""
        meter = self._meters.get(task)
        if meter is None:
            return Spending()
        return Spending(meter.tokens, meter.cost, max(self._clock.now() - meter.started, 0.0))

    def _exhausted(self, limit: _Limit) -> str | None:
        """Return in words that nothing is left of a budget, if so."""
        found = next((one for one in shares(limit.budget, limit.spent) if one.is_exhausted), None)
        if found is None:
            return None
        return f"the {limit.scope}'s budget is used up, {found.describe()}: {_REMEDIES[limit.scope]}"

    async def _warn(self, limit: _Limit) -> None:
        for share in shares(limit.budget, limit.spent):
            if share.is_low and not share.is_exhausted:
                await self._tell("budget.low", limit, share)

    async def _tell(self, event: str, limit: _Limit, share: Share) -> None:
        mark = (event, limit.of, share.key)
        if mark not in self._told:
            self._told.add(mark)
            facts = {"scope": limit.scope, "of": limit.of, "limit": share.key, "reason": share.describe()}
            await self._ledger.note(event, facts)
