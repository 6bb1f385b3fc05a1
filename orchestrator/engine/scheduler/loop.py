"""The run's loop: look at the board, decide, perform, and feed what came of it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import assert_never

import anyio
from anyio.abc import TaskGroup

from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.lifecycle import Trigger
from orchestrator.domain.runs.model import CLAIMED, SUCCESSFUL, WAITING_TO_LAND, AdapterDocument, Halt, TaskStatus
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.runs.retry import Backoff, retry_delay
from orchestrator.domain.scheduling.claims import Verdict, should_try
from orchestrator.domain.scheduling.dispatch import Board, Entry, decide
from orchestrator.engine.landing.base_checks import BaseChecks
from orchestrator.engine.landing.base_selection import StartingPoints
from orchestrator.engine.landing.merge_queue import MergeQueue
from orchestrator.engine.landing.repository_guard import EscapeDetector
from orchestrator.engine.phases.completion import Phasing
from orchestrator.engine.phases.start import Rest
from orchestrator.engine.run_context import Workshop
from orchestrator.engine.scheduler.attempts import (
    After,
    Again,
    Asked,
    Attempts,
    Closed,
    Done,
    Elsewhere,
    Halted,
    Over,
    Parked,
    Starved,
    ToLand,
    Work,
)
from orchestrator.engine.scheduler.budgets import Budgets
from orchestrator.engine.scheduler.capacity import Capacity
from orchestrator.engine.scheduler.local_work import InHand
from orchestrator.engine.scheduler.monitor import Monitor
from orchestrator.engine.scheduler.peers import Following
from orchestrator.engine.scheduler.requests import cancel
from orchestrator.engine.state.ledger import Learned, Ledger
from orchestrator.errors import ClaimLost, GitError, HandoffBroken, RefusedError, VersionConflict
from orchestrator.locking.merge_permit import MergePermits
from orchestrator.repo.worktrees.pool import Pool
from orchestrator.sessions.setup import homes

#: Seconds from one push to the next, while there are sessions that may finish meanwhile and fill it.
GATHERING = 0.25
#: Seconds after which a landing that could not be made is tried again while sessions are at work.
DEFERRED_PAUSE = 30.0
#: How often, and after how many seconds each, it is tried again when nothing else is left to do: the user may just
#: be in the middle of a commit.
LAST_TRIES, LAST_PAUSE = 3, 1.0
#: How long nothing starts after the machine had not enough of something.
STARVED = Backoff(initial=1.0, factor=2.0, max=30.0, jitter=False)


class Scheduler:
    """Runs what the board allows, within capacity, until nothing is left that could be done."""

    def __init__(
        self,
        ledger: Ledger,
        workshop: Workshop,
        pool: Pool,
        board: Board,
        capacity: Capacity,
        monitor: Monitor,
        permits: MergePermits,
        phasing: Phasing,
        *,
        entries: Mapping[str, Entry],
        lacking: Mapping[str, str],
        only_lands: bool = False,
    ) -> None:
        """Take a run whose cut-off attempts have been returned; `board` reflects its documents, `entries` its tasks.

        `lacking` has the adapters that are closed for this process alone, each with the reason. One that `only_lands`
        starts no session.
        """
        self._only_lands = only_lands
        self._lacking = lacking
        self._ledger, self._shop, self._board = ledger, workshop, board
        clock = self._clock = workshop.tools.clock
        self._capacity, self._monitor = capacity, monitor
        self.halted: tuple[Halt, str] | None = None
        """What stopped it before its end, and why."""
        self._budgets = Budgets(ledger, clock, workshop.accounting, partial(self._halt, Halt.BUDGET))
        self._pool = pool
        self._starts = StartingPoints(ledger, workshop)
        self._bases = BaseChecks(ledger, workshop, pool, self._starts, entries)
        self._briefing = phasing.briefing
        self._attempts = Attempts(ledger, workshop, pool, self._budgets, self._starts, self._bases, phasing, clock)
        cancelled: set[str] = set()
        self._merging = MergeQueue(ledger, workshop, pool, clock, permits, cancelled, self._bases, self._give_up)
        self._escapes = EscapeDetector(ledger, workshop, self._merging)
        self._hand = InHand(ledger, board, self._merging, clock, cancelled, lacking)
        self._others = Following(
            ledger, workshop, pool, self._hand, self._budgets, clock, self._halt, lambda: self._starts_nothing
        )
        self._deferred_until = 0.0
        self._last_tries = LAST_TRIES
        self._landing = False
        self._gather_until = 0.0
        self._starved = 0
        self._paused_until = 0.0
        self._stopping = False
        self._awaited: tuple[Mapping[str, float], Mapping[str, int]] = {}, {}
        """The parked adapters and the tasks to be approved that were last told to be all that is waited for."""

    async def remember(self, learned: Mapping[str, AdapterDocument]) -> None:
        """Keep the adapters parked that an earlier owner parked; those that it closed are tried again."""
        opened = Learned(AdapterDocument(), "adapter.opened", {})
        for adapter, one in learned.items():
            if one.closed is not None:
                await self._ledger.learn(adapter, lambda known: None if known.closed is None else opened)
            elif one.parked_until is not None:
                self._hand.park(adapter, one.parked_until)

    def stop(self) -> None:
        """Start nothing more and stop sessions and checks; a move of the target is brought to its end."""
        self._stopping = True
        self._bases.stop()
        self._merging.stop()
        self._hand.stop_sessions()

    def _halt(self, by: Halt, reason: str) -> None:
        """Start nothing more and stop sessions; what is built lands, which costs nothing of a budget."""
        self.halted = self.halted or (by, reason)
        self._bases.stop()
        self._hand.stop_sessions()

    def _give_up(self, reason: str) -> None:
        """Stop all work: a command of checks or setup can't be run here, so that nothing can be built or landed."""
        self.halted = self.halted or (Halt.COMMANDS, reason)
        self.stop()

    async def run(self) -> bool:
        """Work until nothing is left that could be done; False if it was stopped before that."""
        statuses = self._ledger.statuses()
        for wanted in (TaskStatus.LANDING, TaskStatus.QUEUED):
            ours = (task for task, status in statuses.items() if status is wanted and task not in self._hand.elsewhere)
            self._merging.waiting.extend(ours)
        async with anyio.create_task_group() as listening:
            listening.start_soon(self._others.follow)
            listening.start_soon(self._others.obey)
            listening.start_soon(self._coordinate)
            if self._shop.desk is not None:
                listening.start_soon(self._shop.desk.heed)
            listening.start_soon(self._others.renew)
            listening.start_soon(self._others.sweep)
            listening.start_soon(self._others.notice_deaths)
            async with anyio.create_task_group() as group:
                over = [task for task, status in statuses.items() if status in SUCCESSFUL]
                group.start_soon(self._forget_homes, over)
                failure = None if self._only_lands else await self._bases.failure()
                if failure is not None:
                    self.halted = self.halted or (Halt.BASE, failure)
                    self.stop()
                await self._tick(group)
                while not self._idle():
                    await self._pause()
                    await self._tick(group)
            listening.cancel_scope.cancel()
        is_over = self._board.is_over(self._ledger.statuses())
        if not is_over and (self._starts_nothing or self._lacks_what_is_left()):
            return False
        self.halted = None
        await self._escapes.look()
        # Whoever coordinated may be gone since it was last looked, and the others as far as this one.
        if not self._ledger.coordinates.is_set() and not await self._ledger.campaign():
            return True
        await self._others.clear_away()
        try:
            await self._merging.verify()
        except GitError as error:
            await self._ledger.note("run.target_unreachable", {"reason": str(error)})
        return True

    def _lacks_what_is_left(self) -> bool:
        """Whether another process could do what this one can't: then the run's end is not this one's to record."""
        lacking = {name for name, why in self._lacking.items() if self._board.closed.get(name) == why}
        return any(lacking.intersection(adapters) for adapters in self._board.left(self._ledger.statuses()))

    async def _tick(self, group: TaskGroup) -> None:
        if self._stopping:
            return
        now = self._clock.monotonic()
        if self._hand.deferred and now >= self._deferred_until:
            if not self._hand.works:
                self._last_tries -= 1
            self._merging.waiting.extendleft(reversed(self._hand.deferred))
            self._hand.deferred.clear()
        if not self._landing and self._may_land(now):
            self._landing = True
            group.start_soon(self._land, group)
        starts = decide(self._board, await self._free(now), now)
        tips: dict[bool, str] = {}
        for task in starts:
            work = await self._prepare(task, tips)
            if self._starts_nothing:  # while we asked where to start from
                return
            if work is not None:
                self._hand.works[task] = work
                group.start_soon(self._attempt, work)
        await self._tell_what_is_awaited()

    async def _prepare(self, task: str, tips: dict[bool, str]) -> Work | None:
        """Return the next attempt of a task that is to start; None where it may not any more."""
        spec = await self._ledger.spec(task)
        if self._budgets.is_halted():
            return None
        if self._hand.waits_for_parts(task):  # which its plan became elsewhere
            await self._ledger.learn_tasks()
            self._hand.wait(task)
            self._hand.wake()
            return None
        obstacle = self._budgets.obstacle(task, spec) or await self._is_tried_out(task)
        if obstacle is not None:
            await self._refuse(task, obstacle)
            return None
        try:
            turn = await self._briefing.turn(task, spec)
            if isinstance(turn, Rest):
                await self._feed(task, await self._attempts.rest(task, turn))
                self._hand.wake()  # what needs it may start
                return None
            start = await self._starts.of(task, spec, turn, tips)
            if not self._board.is_running(task):  # it was cancelled meanwhile
                return None
            return await self._attempts.prepare(task, spec, turn, self._board.adapter_of(task), start)
        except (RefusedError, HandoffBroken) as error:  # a template, a condition, or what was handed over is at fault
            await self._refuse(task, Failed(FailureClass.INVALID, str(error)))
            return None

    async def _is_tried_out(self, task: str) -> Failed | None:
        """Return why a task may not be tried again: its own attempts and those that were taken over were too many."""
        claims, timing = self._ledger.claims, self._ledger.orchestrators.timing
        if claims is None:
            return None
        claim = await claims.read(task)
        if claim is None or should_try(claim, None, timing, ignored=None) is not Verdict.TRIED_OUT:
            return None
        reason = f"it was tried {claim.retries + 1} times, some of them by orchestrators that were gone before its end"
        return Failed(FailureClass.CRASHED, f"{reason}: see to those, then `council retry {task}`")

    async def _tell_what_is_awaited(self) -> None:
        """Say once that nothing is left to do but to wait for adapters that are parked, and for people."""
        if self._is_at_work() or self._waits_to_land() or self._hand.elsewhere or self._starts_nothing:
            return
        awaited, asked = self._board.awaited(), self._to_be_approved()
        if (not awaited and self._board.has_work()) or not (awaited or asked) or (awaited, asked) == self._awaited:
            return
        self._awaited = awaited, asked
        ends = [(await self._ledger.adapter(name)).parked_until for name in awaited]
        facts = {"until": min(filter(None, ends), default=None), "adapters": sorted(awaited, key=awaited.__getitem__)}
        await self._ledger.note("run.waiting", {**facts, "approvals": list(asked)})

    async def _refuse(self, task: str, why: Failed) -> None:
        """End a task that may have no further session."""
        facts = {"outcome": why.failure, "reason": why.reason}
        try:
            await self._ledger.change(task, Trigger.FAIL, facts, reason=why.reason)
        except (ClaimLost, VersionConflict):  # another orchestrator was quicker
            await self._ledger.refresh(task)
            self._hand.mirror(task)
        else:
            self._board.ended(task)
        self._hand.wake()

    def _may_land(self, now: float) -> bool:
        """Whether to land what waits now, rather than a little later with what sessions are just about to bring."""
        waiting = len(self._merging.waiting)
        is_full = waiting >= self._capacity.sessions or not self._hand.works
        return waiting > 0 and (is_full or now >= self._gather_until)

    async def _free(self, now: float) -> int:
        """How many sessions may start. None while more is built than can be landed: it would only grow stale."""
        is_full = len(self._merging.waiting) >= self._capacity.sessions
        if is_full or now < self._paused_until or self._starts_nothing:
            return 0
        return await self._capacity.free(len(self._hand.works))

    @property
    def _starts_nothing(self) -> bool:
        return self._stopping or self._only_lands or self.halted is not None

    def _is_at_work(self) -> bool:
        return bool(self._hand.works or self._landing or self._others.is_busy)

    def _waits_to_land(self) -> bool:
        return bool(self._merging.waiting or (self._hand.deferred and self._last_tries > 0))

    def _to_be_approved(self) -> dict[str, int]:
        """Return the tasks that wait for a person, each with the number of the phases that it was at."""
        statuses = self._ledger.statuses().items()
        return {task: len(self._ledger.task(task).phases) for task, status in statuses if status is TaskStatus.WAITING}

    def _idle(self) -> bool:
        if self._is_at_work():
            return False
        if self._stopping:
            return True
        if self._waits_to_land():
            return False
        # Asked last: who waits for a person is looked for among all tasks.
        is_open = self._board.has_work() or self._waits_for_others() or self._to_be_approved()
        return self._starts_nothing or not is_open

    def _waits_for_others(self) -> bool:
        """Whether tasks of others may bring more work: not where theirs and ours all wait for the target."""
        statuses = self._ledger.statuses()
        are_built = all(statuses[task] in WAITING_TO_LAND for task in self._hand.elsewhere)
        return bool(self._hand.elsewhere) and not (self._hand.deferred and are_built)

    async def _pause(self) -> None:
        times: list[float | None] = []
        if not self._stopping:
            is_paused = self._paused_until > self._clock.monotonic()
            starts = None if self._starts_nothing else self._board.next_time()
            times.append(self._paused_until if is_paused else starts)
            times.append(self._deferred_until if self._hand.deferred else None)
            times.append(self._gather_until if self._merging.waiting and not self._landing else None)
            times.append(self._capacity.look_again)
        await self._hand.pause(min((time for time in times if time is not None), default=None))

    async def _attempt(self, work: Work) -> None:
        await self._escapes.begin(work.task)
        after = await self._attempts.perform(work)
        await self._escapes.end(work.task)
        if work.task in self._hand.cancelled:  # perhaps only since the attempt's end was recorded
            await cancel(self._ledger, work.task)
        # The board hears of it last: from then on the task may have its next session.
        del self._hand.works[work.task]
        if not self._hand.works:  # nothing else is at work that the wait for the user could be hidden behind
            self._deferred_until = min(self._deferred_until, self._clock.monotonic() + LAST_PAUSE)
        await self._feed(work.task, after)
        self._hand.wake()

    async def _feed(self, task: str, after: After | Elsewhere) -> None:
        if isinstance(after, Elsewhere):
            (self._hand.mirror if self._ledger.is_elsewhere(task) else self._hand.take_up)(task)
            return
        self._starved = self._starved if isinstance(after, Starved) else 0
        match after:
            case ToLand():
                self._board.built(task)
                self._merging.waiting.append(task)
            case Done():
                self._hand.show(task, 0.0)
                await self._forget_homes([task])
            case Over() | Asked():
                self._hand.show(task, 0.0)
            case Again(delay):
                self._hand.wait(task, delay or 0.0)
            case Parked(adapter, until):
                self._hand.park(adapter, until)
                self._hand.wait(task)
            case Closed(adapter, reason):
                self._board.close(adapter, reason)
                self._hand.wait(task)
            case Starved(reason):
                self._hand.wait(task)
                await self._hold_back(reason)
            case Halted(reason):
                self._hand.wait(task)
                self._give_up(reason)
            case _:
                assert_never(after)
        self._catch_up(task)

    async def _hold_back(self, reason: str) -> None:
        """Start nothing for a while: the machine has not enough of something."""
        if self._paused_until > self._clock.monotonic():  # another session has met the same
            return
        self._starved += 1
        pause = retry_delay(STARVED, self._starved)
        self._paused_until = self._clock.monotonic() + pause
        await self._ledger.note("run.paused", {"reason": reason, "retry_in": pause})

    def _catch_up(self, task: str) -> None:
        match self._ledger.task(task).status:  # a person may have asked for something since the end was recorded
            case TaskStatus.CANCELLED:
                self._hand.drop(task)
            case TaskStatus.PENDING:
                self._board.revive(task)

    async def _land(self, group: TaskGroup) -> None:
        for task in await self._merging.land():
            await self._feed_landing(task)
            if self._ledger.task(task).status is TaskStatus.LANDED:
                group.start_soon(self._forget_homes, [task])
        self._gather_until = self._clock.monotonic() + GATHERING
        self._landing = False
        self._hand.wake()

    async def _forget_homes(self, tasks: Sequence[str]) -> None:
        """Remove the homes of tasks that have landed or are done: nobody goes on with them."""
        await homes.remove(self._shop.tools.logs, tasks, self._shop.tools.environ)

    async def _feed_landing(self, task: str) -> None:
        status = self._ledger.task(task).status
        if task in self._hand.cancelled and status in {TaskStatus.QUEUED, TaskStatus.CHECKING}:
            await cancel(self._ledger, task)
            status = TaskStatus.CANCELLED
        if status not in CLAIMED:
            self._hand.show(task, 0.0)
            return
        pause = DEFERRED_PAUSE if self._hand.works else LAST_PAUSE
        if not self._hand.deferred or not self._hand.works:
            self._deferred_until = self._clock.monotonic() + pause
        self._hand.deferred.append(task)

    async def _coordinate(self) -> None:
        """Look after the state, once this is the run's coordinator."""
        await self._ledger.coordinates.wait()
        await self._monitor.watch()
