"""Keeps the views up to date beside a run: never holding it up, and never failing it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Final

import anyio

from orchestrator.domain.runs.retry import Backoff, retry_delay
from orchestrator.errors import CouncilError
from orchestrator.protocols import Commit, Event, Store
from orchestrator.system.clock import Clock
from orchestrator.views.update import Views

#: Seconds between two updates, at least and at most; in between it is so many times as long as the last one took.
MIN_INTERVAL: Final = 1.0
MAX_INTERVAL: Final = 10.0
INTERVAL_FACTOR: Final = 20
#: How long to wait before what failed is tried again.
RETRY_BACKOFF: Final = Backoff(initial=1.0, factor=2.0, max=60.0, jitter=False)
#: Seconds that there are at the run's end for what is left.
FINAL_UPDATE_TIMEOUT: Final = 10.0


@asynccontextmanager
async def update_in_background(views: Views, store: Store, clock: Clock, run: str) -> AsyncIterator[None]:
    """Keep the views up to date during the body, and bring them to its end, within a limit.

    Where another process does it, it is left to that one until it ends. That they can't be written is recorded once,
    as `views.failing` of the run. If the body raises, it ends at once.
    """
    keeper = BackgroundUpdater(views, store, clock, run)
    raised: Exception | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(keeper.keep)
        try:
            yield
        except Exception as error:
            raised = error
            group.cancel_scope.cancel()
        keeper.end()
        group.cancel_scope.deadline = anyio.current_time() + FINAL_UPDATE_TIMEOUT
    if raised is not None:
        raise raised


class BackgroundUpdater:
    """Updates the views about once a second, whenever it is this process's turn."""

    def __init__(self, views: Views, store: Store, clock: Clock, run: str) -> None:
        self._views, self._store, self._clock, self._run = views, store, clock, run
        self._is_over = self._is_told = False
        self._turn = anyio.CancelScope()
        self._hurry = anyio.Event()

    async def keep(self) -> None:
        """Update the views until `end`; whatever fails is tried again."""
        failures = 0
        while True:
            is_last = self._is_over
            try:
                await self._write_until_end()
            except Exception as error:
                failures += 1
                await self._tell(error)
            else:
                return
            if is_last:
                return
            await self._pause(retry_delay(RETRY_BACKOFF, failures))

    def end(self) -> None:
        """Nothing more comes: bring the views up to date, and be over."""
        self._is_over = True
        self._hurry.set()
        self._turn.cancel()

    async def _write_until_end(self) -> None:
        async with AsyncExitStack() as stack:
            is_ours = False
            if not self._is_over:
                with anyio.CancelScope() as self._turn:
                    await stack.enter_async_context(self._views.lock.hold())
                    is_ours = True
            if is_ours:
                stack.push_async_callback(self._views.close)
                await self._update_until_end()
                return
        await self._views.refresh()

    async def _update_until_end(self) -> None:
        while True:
            is_last, began = self._is_over, anyio.current_time()
            await self._views.update()
            if is_last:
                return
            took = anyio.current_time() - began
            await self._pause(min(max(MIN_INTERVAL, INTERVAL_FACTOR * took), MAX_INTERVAL))

    async def _pause(self, seconds: float) -> None:
        self._hurry = anyio.Event()
        if not self._is_over:
            await self._clock.wait(self._hurry, self._clock.monotonic() + seconds)

    async def _tell(self, error: Exception) -> None:
        if not self._is_told:
            self._is_told = True
            reason = str(error) if isinstance(error, (CouncilError, OSError)) else f"{type(error).__name__}: {error}"
            with suppress(CouncilError, OSError):
                await self._store.commit(Commit([], [Event("views.failing", {"run": self._run, "reason": reason})]))
