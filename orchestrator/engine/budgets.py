"""What sessions use up is held against their budgets, while they are at work and when they are over."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread

from orchestrator.clock import Clock
from orchestrator.config.model import BudgetConfig, TaskSpec
from orchestrator.domain.budget import Budget, Share, Spending, cost_left, shares, spent_by
from orchestrator.domain.failures import FailureClass
from orchestrator.domain.model import Attempt
from orchestrator.domain.outcome import Failed
from orchestrator.engine.accounting import Accounting
from orchestrator.engine.ledger import Ledger
from orchestrator.protocols import Adapter, JsonObject
from orchestrator.sessions.following import Follower
from orchestrator.sessions.transcript import NOTHING_SAID, Transcript

#: Seconds between two looks at what a session has used up.
PAUSE = 1.0

#: Where each budget stands in a file.
_SETTINGS = {
    "session": "`session_budget` of the task or the defaults",
    "task": "`budget` of the task or the defaults",
    "run": "`budget` at the top of the file",
}


class _Limit(NamedTuple):
    """A budget with what was used up of it; `owner` is the attempt, the task or nothing, which is the run."""

    scope: str
    owner: str
    budget: Budget
    spent: Spending


@dataclass(slots=True)
class _Meter:
    """A session at work: what it is known to have used up."""

    follower: Follower
    started: float
    said: Transcript = NOTHING_SAID

    def read(self) -> None:
        """Take what has come. Blocks."""
        for event in self.follower.read() or ():
            self.said = self.said.after(event)


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
        self._warned: set[tuple[str, str, str]] = set()

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
        self, task: str, attempt: int, spec: TaskSpec, adapter: Adapter, log: Path, stop: Callable[[Failed], None]
    ) -> AsyncIterator[None]:
        """Watch over a session for the body: call `stop` when it has used up what it may."""
        if not any(one.is_limited for one in (spec.session_budget.policy(), spec.budget.policy(), self._run)):
            yield
            return
        meter = self._meters[task] = _Meter(Follower(adapter, log), self._clock.now())
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._watch, task, attempt, spec, meter, stop)
                yield
                group.cancel_scope.cancel()
        finally:
            del self._meters[task]

    async def count(self, task: str, spec: TaskSpec, attempt: Attempt) -> None:
        """Take what an attempt that is over used up, and warn where that is a good part of what there is."""
        self._over += spent_by([attempt])
        for limit in (
            _Limit("task", task, spec.budget.policy(), spent_by(self._ledger.task(task).attempts)),
            _Limit("run", "", self._run, self._spent_by_run()),
        ):
            await self._warn(limit)

    async def _watch(
        self, task: str, attempt: int, spec: TaskSpec, meter: _Meter, stop: Callable[[Failed], None]
    ) -> None:
        while True:
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + PAUSE)
            await anyio.to_thread.run_sync(meter.read)
            for limit in self._limits(task, spec, f"{task}.{attempt}"):
                await self._warn(limit)
                reason = self._exhausted(limit)
                if reason is None:
                    continue
                if limit.scope == "run":
                    self._halt(reason)
                else:
                    stop(Failed(FailureClass.BUDGET, reason))
                return

    def _limits(self, task: str, spec: TaskSpec, session: str) -> Iterator[_Limit]:
        now = self._now(task)
        yield _Limit("session", session, spec.session_budget.policy(), now)
        yield _Limit("task", task, spec.budget.policy(), spent_by(self._ledger.task(task).attempts) + now)
        yield _Limit("run", "", self._run, self._spent_by_run())

    def _spent_by_run(self) -> Spending:
        total = self._over
        for task in self._meters:
            total += self._now(task)
        return total

    def _now(self, task: str) -> Spending:
        """Return what the session of a task that is at work has used up so far."""
        meter = self._meters.get(task)
        if meter is None:
            return Spending()
        said = self._accounting.own(meter.said, self._ledger.task(task).attempts)
        seconds = max(self._clock.now() - meter.started, 0.0)
        return Spending(said.input_tokens + said.output_tokens, said.cost or 0.0, seconds)

    def _exhausted(self, limit: _Limit) -> str | None:
        """Return in words that nothing is left of a budget, if so."""
        found = next((one for one in shares(limit.budget, limit.spent) if one.is_exhausted), None)
        if found is None:
            return None
        return f"the {limit.scope}'s budget is used up, {found.describe()}: raise {_SETTINGS[limit.scope]}"

    async def _warn(self, limit: _Limit) -> None:
        for share in shares(limit.budget, limit.spent):
            mark = (limit.scope, limit.owner, share.key)
            if share.is_low and mark not in self._warned:
                self._warned.add(mark)
                await self._ledger.note("budget.low", _facts(limit, share))


def _facts(limit: _Limit, share: Share) -> JsonObject:
    owner = {"run": {}, "task": {"task": limit.owner}, "session": {"session": limit.owner}}[limit.scope]
    return {"scope": limit.scope, **owner, "limit": share.key, "reason": share.describe()}
