"""What a process does about the others in a run: it follows what they do, stands in for who is gone, and is asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import anyio

from orchestrator.domain.runs.model import FINAL, REVIVABLE, Action, Halt, Request, TaskStatus
from orchestrator.engine.run_context import Workshop
from orchestrator.engine.scheduler.budgets import Budgets
from orchestrator.engine.scheduler.local_work import InHand
from orchestrator.engine.scheduler.reconciliation import Reconciler
from orchestrator.engine.scheduler.recovery import recover_tasks, remove_abandoned
from orchestrator.engine.scheduler.requests import approve, cancel, given_up, ignore, revive, send_back
from orchestrator.engine.state.ledger import Change, Ledger
from orchestrator.errors import StoreUnavailable
from orchestrator.repo.worktrees.pool import Pool
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: Seconds that a session which was told to stop, or a landing, gets to be over, and between two looks whether it is.
_STOP_LIMIT: Final = 60.0
_LOOK_PAUSE: Final = 0.05
#: Seconds between two looks at the locks of this machine's orchestrators.
DEATH_PAUSE: Final = 0.5


class Following:
    """Enters what others do into what this process has in hand, beside the scheduler."""

    def __init__(
        self,
        ledger: Ledger,
        workshop: Workshop,
        pool: Pool,
        hand: InHand,
        budgets: Budgets,
        clock: Clock,
        halt: Callable[[Halt, str], None],
        is_ending: Callable[[], bool],
    ) -> None:
        """Call `halt` with the reason where the run was stopped; take nothing over once it `is_ending`."""
        self._ledger, self._shop, self._pool, self._hand = ledger, workshop, pool, hand
        self._budgets, self._clock = budgets, clock
        self._halt, self._is_ending = halt, is_ending
        self._reconciler = Reconciler(ledger, workshop)
        self._asked: deque[Request] = deque()
        """What is yet to be done of what was asked for, in its order."""
        self._is_asked = anyio.Event()
        self._is_sweeping = False
        self._is_due = anyio.Event()
        """Set to have the next sweep at once."""

    @property
    def is_busy(self) -> bool:
        """Whether something is being done for others, of which more work may come."""
        return self._is_sweeping or bool(self._asked)

    async def follow(self) -> None:
        """Keep up with what other orchestrators do, and hear what is asked of this one."""
        async for change in self._ledger.changes():
            # What is half done would leave the board and the documents apart.
            with anyio.CancelScope(shield=True):
                await self._take_note(change)

    async def _take_note(self, change: Change) -> None:
        if change.request is not None:
            if self._ledger.coordinates.is_set():
                self._hear(change.request)
            return
        if change.halted is not None:
            self._halt(*change.halted)
        if change.adapter is not None:
            # The newest: this process may have learned more since, and heeded it.
            self._hand.learn(change.adapter, await self._ledger.adapter(change.adapter))
        if change.is_grown:
            self._hand.grow()
        if change.task is not None and change.before is not None:
            self._budgets.take_in(change.before, self._ledger.task(change.task))
            self._hand.mirror(change.task, change.retry_in)
        self._hand.wake()

    async def renew(self) -> None:
        """Give signs of life, whatever else is going on."""
        others = self._ledger.orchestrators
        while True:
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + others.timing.heartbeat)
            with suppress(StoreUnavailable):  # whatever must be recorded will say so
                await others.renew()

    async def notice_deaths(self) -> None:
        """Sweep as soon as an orchestrator of this machine has ended: the kernel frees its lock at once."""
        others, locks = self._ledger.orchestrators, self._shop.hub.life_locks
        known = frozenset[str]()
        with suppress(StoreUnavailable):  # then the next sweep finds those that had ended before this look
            known = frozenset(name for name, one in (await others.all()).items() if one.ended is None)
        while True:
            with suppress(OSError, StoreUnavailable):  # no descriptor left: look again later
                living = await locks.living(self._ledger.run.id)
                if ended := known - living:
                    others.doubt(ended)
                    self._is_due.set()
                known = living
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + DEATH_PAUSE)

    async def sweep(self) -> None:
        """Take over from orchestrators that are gone, lead the run if nobody does, and see what others landed."""
        while True:
            await self._clock.wait(self._is_due, self._clock.monotonic() + self._ledger.orchestrators.timing.sweep)
            self._is_due = anyio.Event()
            with suppress(StoreUnavailable), anyio.CancelScope(shield=True):
                if not self._is_ending():
                    self._is_sweeping = True
                    try:
                        await self._sweep()
                    finally:
                        self._is_sweeping = False
                        self._hand.wake()

    async def _sweep(self) -> None:
        if await self._ledger.campaign():
            for request in await self._ledger.requests():
                self._hear(request)
        await self._ledger.tidy(self._shop.registry)
        for task in await recover_tasks(self._ledger, self._shop, self._clock):
            self._hand.take_up(task)
        await self.clear_away()
        for task in await self._reconciler.look(frozenset(self._hand.merging.landing)):
            self._hand.mirror(task)

    async def clear_away(self) -> None:
        """Remove what orchestrators that are gone left behind and no task is at any more: sessions, then places."""
        await remove_abandoned(self._ledger, self._shop)
        await self._pool.clear()

    def _hear(self, request: Request) -> None:
        self._asked.append(request)
        self._is_asked.set()

    async def obey(self) -> None:
        """Do what is asked of the run, one after the other; what others do is followed meanwhile."""
        while True:
            await self._is_asked.wait()
            self._is_asked = anyio.Event()
            while self._asked:
                with anyio.CancelScope(shield=True):  # what is half done would leave the board and the documents apart
                    await self._obey(self._asked[0])
                self._asked.popleft()
                self._hand.wake()

    async def _obey(self, request: Request) -> None:
        if request not in await self._ledger.requests():  # who has just become the coordinator hears some of them twice
            return
        if any(task not in self._ledger for task in request.tasks):
            await self._ledger.learn_tasks()
            self._hand.grow()
        for task in request.tasks:
            await self._perform(request, task)
        if request.action is Action.IGNORE:
            await self._until_over(request.tasks)
        for adapter in request.adapters:
            self._hand.learn(adapter, await self._ledger.reopen(adapter))
        await ignore(self._ledger, request)
        failpoint("request.obeyed")
        await self._ledger.answer(request)

    async def _perform(self, request: Request, task: str) -> None:
        match request.action:
            case Action.RETRY:
                await self._revive(task, request.phase)
            case Action.APPROVE:
                if await approve(self._ledger, task, request.reason):
                    self._hand.go_on(task)
            case Action.REJECT:
                if await send_back(self._ledger, task, request.reason):
                    self._hand.go_on(task)
            case _:
                await self._cancel(task)

    async def _until_over(self, tasks: Sequence[str]) -> None:
        """Wait for sessions that are being stopped: until they are over, attempts have the documents to themselves."""
        with anyio.move_on_after(_STOP_LIMIT):
            for task in tasks:
                while self._is_yet_to_end(task):  # noqa: ASYNC110  another task of ours
                    await anyio.sleep(_LOOK_PAUSE)

    def _is_yet_to_end(self, task: str) -> bool:
        return self._ledger.task(task).status not in FINAL and not self._ledger.is_elsewhere(task)

    async def _revive(self, task: str, phase: str | None) -> None:
        if self._ledger.task(task).status in REVIVABLE:
            for part in await given_up(self._ledger, task, phase):
                await self._cancel(part)
            self._hand.cancelled.discard(task)
            if await revive(self._ledger, task, phase):
                self._hand.revive(task)

    async def _cancel(self, task: str) -> None:
        until = self._clock.monotonic() + _STOP_LIMIT
        while not await self._is_seen_to(task):
            if self._is_ending() or self._clock.monotonic() >= until:
                break
            await anyio.sleep(_LOOK_PAUSE)

    async def _is_seen_to(self, task: str) -> bool:
        """Whether a task that is not wanted is over now or ends as soon as it can; not while it lands elsewhere."""
        hand, status = self._hand, self._ledger.task(task).status
        is_elsewhere, is_landing = self._ledger.is_elsewhere(task), status is TaskStatus.LANDING
        if status in FINAL:
            return True
        if is_elsewhere and is_landing:
            return False
        hand.cancelled.add(task)
        if task in hand.works and not is_elsewhere:
            hand.works[task].cancel()
        elif (task in hand.merging.landing or is_landing) and not is_elsewhere:
            hand.merging.cancel(task)  # what comes of it is told when it is known whether the target moved
        else:
            return await self._end(task)
        return True

    async def _end(self, task: str) -> bool:
        """End a task that this process is not at, wherever it is; False where somebody has just begun to land it."""
        hand = self._hand
        hand.drop(task)
        if await cancel(self._ledger, task):
            return True
        if not self._ledger.is_elsewhere(task) and self._ledger.task(task).status is TaskStatus.LANDING:
            hand.take_up(task)  # that was begun where it was, just before it was taken from there
            return True
        hand.cancelled.discard(task)
        hand.mirror(task)
        return self._ledger.task(task).status in FINAL
