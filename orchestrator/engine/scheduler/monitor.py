"""Periodic maintenance of the state store, independent of the scheduler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Final

import anyio

from orchestrator.domain.events.state import StateWarning
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.engine.diagnostics.state_findings import check_documents, check_integrity, check_latency
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import StoreUnavailable
from orchestrator.state.documents.update import compact_log, delete_expired

#: Seconds between deletions of expired documents and compactions of the log.
SWEEP_INTERVAL: Final = 30.0
#: Seconds between checks of sizes and commit latency.
HEALTH_INTERVAL: Final = 60.0
#: Seconds between full verifications.
VERIFY_INTERVAL: Final = 60.0
#: Seconds between checkpoints of the run.
CHECKPOINT_INTERVAL: Final = 300.0
#: A job pauses for this multiple of its duration, up to a maximum in seconds.
_PAUSE_FACTOR, _MAX_PAUSE = 50.0, 600.0


class Monitor:
    """Deletes expired data, compacts, verifies and makes checkpoints.

    Each warning is recorded once.
    """

    def __init__(self, ledger: Ledger) -> None:
        """Create a monitor of a run's store."""
        self._ledger, self._store, self._clock = ledger, ledger.writer.store, ledger.writer.clock
        self._retention = ledger.run.state

    async def watch(self) -> None:
        """Run all periodic jobs until cancelled."""
        async with anyio.create_task_group() as group:
            for pause, job in (
                (SWEEP_INTERVAL, self._sweep),
                (HEALTH_INTERVAL, self._check_health),
                (VERIFY_INTERVAL, self._verify),
                (CHECKPOINT_INTERVAL, self._ledger.writer.checkpoint),
            ):
                group.start_soon(self._repeat, pause, job)

    async def _repeat(self, pause: float, job: Callable[[], Awaitable[object]]) -> None:
        wait = pause
        while True:
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + wait)
            began = self._clock.monotonic()
            with suppress(StoreUnavailable):  # mandatory commits report the outage
                await job()
            wait = max(pause, min(_PAUSE_FACTOR * (self._clock.monotonic() - began), _MAX_PAUSE))

    async def _sweep(self) -> None:
        await delete_expired(self._store, self._ledger.run.id)
        await compact_log(
            self._store, self._clock, self._retention.retention, self._retention.max_size, self._ledger.run.id
        )

    async def _check_health(self) -> None:
        latency = check_latency(self._ledger.writer.slowest_commit(), is_local=bool(self._store.local_paths()))
        await self._report([*check_documents(await self._store.statistics()), latency])

    async def _verify(self) -> None:
        await self._report(check_integrity(await self._store.verify()))

    async def _report(self, findings: Iterable[Finding]) -> None:
        """Record each problem; record it again only if it was resolved in between."""
        for finding in findings:
            if finding.level is Level.OK:
                self._ledger.writer.forget(StateWarning, finding.name)
            else:
                warning = StateWarning(about=finding.name, reason=finding.message, remedy=finding.remedy)
                await self._ledger.writer.note_once(warning, finding.name)
