"""Enforce the budgets of a run, its tasks and their sessions.

Usage is compared with the budgets during and after each session.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread

from orchestrator.domain.events.runs import BudgetExhausted, BudgetLow, BudgetPriceUnknown, BudgetUntracked
from orchestrator.domain.runs.model import Attempt, TaskDocument
from orchestrator.domain.runs.outcome import Failed, Interrupted
from orchestrator.domain.runs.usage import (
    BudgetUsage,
    Spending,
    compute_budget_usage,
    compute_remaining_cost,
    sum_spending,
)
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.run_settings import Budget, TaskSpec
from orchestrator.engine.accounting import Accounting
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.reload import can_reload
from orchestrator.protocols import Adapter
from orchestrator.sessions.output.follow import OutputFollower
from orchestrator.sessions.output.log_files import MAX_OUTPUT_BYTES
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, Transcript
from orchestrator.system.clock import Clock

#: Seconds between readings of a session's usage.
POLL_INTERVAL = 1.0

_NOTHING = Spending()
#: The keys of the budgets of a task in the file, by scope.
_KEYS = {"session": "session_budget", "task": "budget"}


class _Limit(NamedTuple):
    """A budget and its usage; `owner` is the session or task, empty for the run."""

    scope: str
    owner: str
    budget: Budget
    spent: Spending
    is_reloadable: bool = True
    """Whether a change of the file can apply to the task."""

    @property
    def description(self) -> str:
        """The owner as text."""
        return f"{self.scope} {self.owner}" if self.owner else f"the {self.scope}"

    @property
    def remedy(self) -> str:
        """Return the remedy for an exhausted budget.

        A run uses its file as recorded at the start.
        """
        if self.scope not in _KEYS:
            return "continue with a higher limit"
        then = ", then `council retry TASK --reload`" if self.is_reloadable else " and start a new run"
        return f"raise its `{_KEYS[self.scope]}` in the file{then}, or split the task"


class BudgetReached(NamedTuple):
    """An exhausted budget, and the resulting outcome of the attempt."""

    scope: str
    outcome: Failed | Interrupted


@dataclass(slots=True)
class _UsageMeter:
    """The known usage of an active session."""

    follower: OutputFollower
    started: float
    """The start of its session in monotonic seconds."""
    transcript: Transcript = EMPTY_TRANSCRIPT
    tokens: int = 0
    cost: float = 0.0

    def read(self) -> bool:
        """Read new output; return True if there was any. Blocks."""
        events = self.follower.read()
        for event in events or ():
            self.transcript = self.transcript.after(event)
        return events is not None


class Budgets:
    """The budgets of a run, its tasks and their sessions.

    `halt` ends the run with a reason.
    """

    def __init__(self, ledger: Ledger, clock: Clock, accounting: Accounting, halt: Callable[[str], None]) -> None:
        self._ledger, self._clock, self._accounting, self._halt = ledger, clock, accounting, halt
        self._run = ledger.run.budget
        self._ended_usage = Spending()
        if self._run.limits:  # slow with many tasks
            for task in ledger.run.tasks:
                self._ended_usage += sum_spending(ledger.task(task).attempts)
        self._meters: dict[str, _UsageMeter] = {}
        # The total of all active sessions, so that run checks need no loop over them.
        self._tokens, self._cost, self._started = 0, 0.0, 0.0

    def cost_left(self, task: str, spec: TaskSpec) -> float | None:
        """Return the cost limit of a task's next session in US dollars; None: unlimited."""
        return compute_remaining_cost((limit.budget, limit.spent) for limit in self._limits(task, spec, ""))

    def is_halted(self) -> bool:
        """Return True if the run's budget is exhausted; the run is then halted."""
        return self._check_limit(self._run_limit()) is not None

    def find_obstacle(self, task: str, spec: TaskSpec) -> Failed | None:
        """Return the failure if a budget prevents another session of the task, else None."""
        reason = _describe_if_exhausted(self._task_limit(task, spec))
        return None if reason is None else Failed(FailureClass.BUDGET, reason)

    def add_peer_usage(self, before: TaskDocument, after: TaskDocument) -> None:
        """Add the usage of newly ended sessions of other orchestrators."""
        counted = {attempt.number for attempt in before.attempts if attempt.ended is not None}
        self._ended_usage += sum_spending(
            attempt for attempt in after.attempts if attempt.ended is not None and attempt.number not in counted
        )

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
        """Watch a session during the body.

        Call `stop` when its own budget, or that of its task or the run, is exhausted.
        """
        if not any(budget.limits for budget in (spec.session_budget, spec.budget, self._run)):
            yield
            return
        meter = self._meters[task] = _UsageMeter(OutputFollower(adapter, log), self._clock.monotonic())
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

    def find_reached(self, task: str, spec: TaskSpec, transcript: Transcript) -> BudgetReached | None:
        """Return the budget that is exhausted by the final usage of a session, or None.

        The session has ended, but its usage is not counted yet.
        """
        net = self._accounting.net_usage(transcript, self._ledger.task(task).attempts)
        usage = Spending(net.input_tokens + net.output_tokens, net.cost or 0.0)
        session = _Limit("session", task, spec.session_budget, usage, can_reload(self._ledger.run, spec))
        limits = (session, self._task_limit(task, spec, usage), self._run_limit(usage))
        return next(filter(None, map(self._check_limit, limits)), None)

    async def count(self, task: str, spec: TaskSpec, attempt: Attempt) -> None:
        """Add the usage of an ended attempt, and report low or exhausted budgets."""
        self._ended_usage += sum_spending([attempt])
        limits = (self._task_limit(task, spec), self._run_limit())
        for limit in limits:
            await self._warn(limit)
            for share in compute_budget_usage(limit.budget, limit.spent):
                if share.is_exhausted:
                    await self._note_share(BudgetExhausted, limit, share)
        counts_money = any(limit.budget.cost is not None for limit in limits) or spec.session_budget.cost is not None
        if counts_money and attempt.cost is None and (attempt.input_tokens or attempt.output_tokens):
            unknown = BudgetPriceUnknown(adapter=attempt.adapter, model=attempt.model)
            await self._ledger.writer.note_once(unknown, attempt.adapter, attempt.model or "")

    async def _watch(
        self, task: str, attempt: int, spec: TaskSpec, meter: _UsageMeter, stop: Callable[[BudgetReached], None]
    ) -> None:
        session = f"{task}.{attempt}"
        while True:
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + POLL_INTERVAL)
            if await anyio.to_thread.run_sync(meter.read):
                self._update_meter(task, meter)
            if meter.follower.at >= MAX_OUTPUT_BYTES:
                await self._ledger.writer.note_once(BudgetUntracked(owner=f"session {session}"), session)
            for limit in self._limits(task, spec, session):
                await self._warn(limit)
                if (reached := self._check_limit(limit)) is not None:
                    stop(reached)
                    return

    def _limits(self, task: str, spec: TaskSpec, session: str) -> Iterator[_Limit]:
        usage = self._active_usage(task)
        yield _Limit("session", session, spec.session_budget, usage, can_reload(self._ledger.run, spec))
        yield self._task_limit(task, spec, usage)
        yield self._run_limit()

    def _task_limit(self, task: str, spec: TaskSpec, more: Spending = _NOTHING) -> _Limit:
        """Return the limit of a task; `more` is usage that is not recorded yet.

        A task and all subtasks of its plan, with their active sessions, share one budget.
        """
        spent = more
        for member in self._ledger.tasks.plan_members(task):
            spent += sum_spending(self._ledger.task(member).attempts)
            if member != task:
                spent += self._active_usage(member)
        return _Limit("task", task, spec.budget, spent, can_reload(self._ledger.run, spec))

    def _run_limit(self, more: Spending = _NOTHING) -> _Limit:
        """Return the run's budget and usage with active sessions; `more` is extra usage."""
        seconds = max(len(self._meters) * self._clock.monotonic() - self._started, 0.0)
        return _Limit("run", "", self._run, self._ended_usage + Spending(self._tokens, self._cost, seconds) + more)

    def _update_meter(self, task: str, meter: _UsageMeter) -> None:
        net = self._accounting.net_usage(meter.transcript, self._ledger.task(task).attempts)
        tokens, cost = net.input_tokens + net.output_tokens, net.cost or 0.0
        self._tokens, self._cost = self._tokens + tokens - meter.tokens, self._cost + cost - meter.cost
        meter.tokens, meter.cost = tokens, cost

    def _active_usage(self, task: str) -> Spending:
        """Return the usage so far of a task's active session."""
        meter = self._meters.get(task)
        if meter is None:
            return _NOTHING
        return Spending(meter.tokens, meter.cost, max(self._clock.monotonic() - meter.started, 0.0))

    def _check_limit(self, limit: _Limit) -> BudgetReached | None:
        """Return the outcome if a limit is exhausted, else None.

        Halt the run if the limit belongs to the run.
        """
        reason = _describe_if_exhausted(limit)
        if reason is None:
            return None
        if limit.scope != "run":
            return BudgetReached(limit.scope, Failed(FailureClass.BUDGET, reason))
        self._halt(reason)
        return BudgetReached(limit.scope, Interrupted(reason))

    async def _warn(self, limit: _Limit) -> None:
        for share in compute_budget_usage(limit.budget, limit.spent):
            if share.is_low and not share.is_exhausted:
                await self._note_share(BudgetLow, limit, share)

    async def _note_share(self, kind: type[BudgetLow | BudgetExhausted], limit: _Limit, share: BudgetUsage) -> None:
        event = kind(scope=limit.scope, owner=limit.description, limit=share.key, reason=share.describe())
        await self._ledger.writer.note_once(event, limit.description, share.key)


def _describe_if_exhausted(limit: _Limit) -> str | None:
    """Return a message if a budget is exhausted, else None."""
    share = next((share for share in compute_budget_usage(limit.budget, limit.spent) if share.is_exhausted), None)
    if share is None:
        return None
    return f"the {limit.scope}'s budget is exhausted, {share.describe()}: {limit.remedy}"
