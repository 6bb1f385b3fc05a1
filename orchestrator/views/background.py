"""Update the views concurrently with a run, without delaying or failing it."""

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

#: The minimum and maximum seconds between two updates, and the pause as a multiple of the last duration.
MIN_INTERVAL: Final = 1.0
MAX_INTERVAL: Final = 10.0
INTERVAL_FACTOR: Final = 20
#: The pauses after failed updates.
RETRY_BACKOFF: Final = Backoff(initial=1.0, factor=2.0, max=60.0, jitter=False)
#: Seconds for the last update at the run's end.
FINAL_UPDATE_TIMEOUT: Final = 10.0


@asynccontextmanager
async def update_in_background(views: Views, store: Store, clock: Clock, run: str) -> AsyncIterator[None]:
    """Update the views during the body, and a last time after it, within a time limit.

    If another process updates them, this one waits for its end. A failure is recorded once, as `views.failing` of the
    run. If the body raises, updates stop at once.
    """
    updater = BackgroundUpdater(views, store, clock, run)
    raised: Exception | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(updater.run)
        try:
            yield
        except Exception as error:  # noqa: BLE001  raised anew below: as it is, and not in a group
            raised = error
            group.cancel_scope.cancel()
        updater.end()
        group.cancel_scope.deadline = anyio.current_time() + FINAL_UPDATE_TIMEOUT
    if raised is not None:
        raise raised


class BackgroundUpdater:
    """Updates the views about once a second, while this process holds their lock."""

    def __init__(self, views: Views, store: Store, clock: Clock, run: str) -> None:
        self._views, self._store, self._clock, self._run = views, store, clock, run
        self._is_ending = self._is_failure_recorded = False
        self._lock_scope = anyio.CancelScope()
        self._wakeup = anyio.Event()

    async def run(self) -> None:
        """Update the views until `end`; retry after errors."""
        failures = 0
        while True:
            is_last = self._is_ending
            try:
                await self._write_until_end()
            except Exception as error:  # noqa: BLE001  raised anew below: as it is, and not in a group
                failures += 1
                await self._record_failure(error)
            else:
                return
            if is_last:
                return
            await self._pause(retry_delay(RETRY_BACKOFF, failures))

    def end(self) -> None:
        """Make the last update, and stop."""
        self._is_ending = True
        self._wakeup.set()
        self._lock_scope.cancel()

    async def _write_until_end(self) -> None:
        async with AsyncExitStack() as stack:
            is_ours = False
            if not self._is_ending:
                with anyio.CancelScope() as self._lock_scope:
                    await stack.enter_async_context(self._views.lock.hold())
                    is_ours = True
            if is_ours:
                stack.push_async_callback(self._views.close)
                await self._update_until_end()
                return
        await self._views.refresh()

    async def _update_until_end(self) -> None:
        while True:
            is_last, began = self._is_ending, anyio.current_time()
            await self._views.update()
            if is_last:
                return
            took = anyio.current_time() - began
            await self._pause(min(max(MIN_INTERVAL, INTERVAL_FACTOR * took), MAX_INTERVAL))

    async def _pause(self, seconds: float) -> None:
        self._wakeup = anyio.Event()
        if not self._is_ending:
            await self._clock.wait(self._wakeup, self._clock.monotonic() + seconds)

    async def _record_failure(self, error: Exception) -> None:
        if not self._is_failure_recorded:
            self._is_failure_recorded = True
            reason = str(error) if isinstance(error, (CouncilError, OSError)) else f"{type(error).__name__}: {error}"
            with suppress(CouncilError, OSError):
                await self._store.commit(Commit([], [Event("views.failing", {"run": self._run, "reason": reason})]))
