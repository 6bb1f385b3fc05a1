"""What a process does about the others in a run: it follows what they do, stands in for who is gone, and is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import anyio

from orchestrator.clock import Clock
from orchestrator.domain.model import FINAL, REVIVABLE, Action, Request, TaskStatus
from orchestrator.engine.budgets import Budgets
from orchestrator.engine.in_hand import InHand
from orchestrator.engine.ledger import Change, Ledger
from orchestrator.engine.reconciling import Reconciler
from orchestrator.engine.recovery import recover_tasks, remove_abandoned
from orchestrator.engine.requests import cancel, ignore, revive
from orchestrator.engine.workshop import Workshop
from orchestrator.errors import StoreUnavailable
from orchestrator.failpoints import failpoint
from orchestrator.repo.pool import Pool


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
        halt: Callable[[str], None],
        is_ending: Callable[[], bool],
    ) -> None:
        """Call `halt` with the reason where the run was stopped; take nothing over once it `is_ending`."""
        self._ledger, self._shop, self._pool, self._hand = ledger, workshop, pool, hand
        self._budgets, self._clock = budgets, clock
        self._halt, self._is_ending = halt, is_ending
        self._reconciler = Reconciler(ledger, workshop)
        self._busy = 0

    @property
    def is_busy(self) -> bool:
        """Whether something is being done for others, of which more work may come."""
        return self._busy > 0

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self._hand.wake()

    async def follow(self) -> None:
        """Keep up with what other orchestrators do, and do what is asked of this one."""
        async for change in self._ledger.changes():
            # What is half done would leave the board and the documents apart.
            with anyio.CancelScope(shield=True):
                await self._take_note(change)

    async def _take_note(self, change: Change) -> None:
        if change.request is not None:
            if self._ledger.coordinates.is_set():
                await self._obey(change.request)
            return
        if change.halted is not None:
            self._halt(change.halted)
        if change.adapter is not None:
            self._hand.learn(*change.adapter)
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

    async def sweep(self) -> None:
        """Take over from orchestrators that are gone, coordinate if nobody does, and see what others landed."""
        while True:
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + self._ledger.orchestrators.timing.sweep)
            with suppress(StoreUnavailable), anyio.CancelScope(shield=True):
                if not self._is_ending():
                    await self._sweep()

    async def _sweep(self) -> None:
        with self._at_work():
            if await self._ledger.campaign():
                for request in await self._ledger.requests():
                    await self._obey(request)
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

    async def _obey(self, request: Request) -> None:
        with self._at_work():
            for task in request.tasks:
                await (self._revive if request.action is Action.RETRY else self._cancel)(task)
            await ignore(self._ledger, request)
            failpoint("request.obeyed")
            await self._ledger.answer(request)

    async def _revive(self, task: str) -> None:
        if self._ledger.task(task).status in REVIVABLE:
            self._hand.cancelled.discard(task)
            await revive(self._ledger, task)
            self._hand.board.revive(task)

    async def _cancel(self, task: str) -> None:
        if self._ledger.task(task).status in FINAL:
            return
        if self._ledger.is_elsewhere(task) and not await self._override(task):
            return
        hand = self._hand
        hand.cancelled.add(task)
        if task in hand.works:
            hand.works[task].cancel()
        elif task in hand.merging.landing or self._ledger.task(task).status is TaskStatus.LANDING:
            hand.merging.cancel(task)  # what comes of it is told when it is known whether the target moved
        else:
            hand.drop(task)
            await cancel(self._ledger, task)

    async def _override(self, task: str) -> bool:
        """Take a task from the orchestrator that has it; a landing is brought to its end by whoever began it."""
        if self._ledger.task(task).status is TaskStatus.LANDING:
            return False
        return await self._ledger.claim(task, override=True)
