"""Looks after the state while a run is at work: by the clock, beside the scheduler, whatever that is doing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Final

import anyio

from orchestrator.config.model import Retention
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.engine.diagnostics.state_findings import judge_documents, judge_integrity, judge_latency
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import StoreUnavailable
from orchestrator.protocols import Store
from orchestrator.state.documents.maintenance import compact_log, delete_expired
from orchestrator.system.clock import Clock

#: Seconds between two looks at what has expired and at the size of the log.
SWEEP_INTERVAL: Final = 30.0
#: Seconds between two looks at sizes and at how long commits take.
HEALTH_INTERVAL: Final = 60.0
#: Seconds between two readings of all that is recorded.
VERIFY_INTERVAL: Final = 60.0
#: Seconds between two checkpoints of the run.
CHECKPOINT_INTERVAL: Final = 300.0
#: How many times as long as it took is paused behind each of these, but no more seconds than that.
_PAUSE_FACTOR, _MAX_PAUSE = 50.0, 600.0


class Monitor:
    """Sweeps, compacts, verifies, makes checkpoints, and records what a person should know, each thing once."""

    def __init__(self, ledger: Ledger, store: Store, clock: Clock) -> None:
        """Look after the store of a run."""
        self._ledger, self._store, self._clock = ledger, store, clock
        self._retention = Retention.model_validate(ledger.run.retention)
        self._facts = {"run": ledger.run.id}
        self._told: set[str] = set()

    async def watch(self) -> None:
        """Do all that, until it is cancelled."""
        async with anyio.create_task_group() as group:
            for pause, look in (
                (SWEEP_INTERVAL, self._sweep),
                (HEALTH_INTERVAL, self._look),
                (VERIFY_INTERVAL, self._verify),
                (CHECKPOINT_INTERVAL, self._ledger.checkpoint),
            ):
                group.start_soon(self._repeat, pause, look)

    async def _repeat(self, pause: float, look: Callable[[], Awaitable[object]]) -> None:
        wait = pause
        while True:
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + wait)
            began = self._clock.monotonic()
            with suppress(StoreUnavailable):  # whatever must be recorded will say so
                await look()
            wait = max(pause, min(_PAUSE_FACTOR * (self._clock.monotonic() - began), _MAX_PAUSE))

    async def _sweep(self) -> None:
        await delete_expired(self._store, self._facts)
        await compact_log(self._store, self._clock, self._retention.age, self._retention.size, self._facts)

    async def _look(self) -> None:
        latency = judge_latency(self._ledger.slowest_commit())
        await self._tell([*judge_documents(await self._store.statistics()), latency])

    async def _verify(self) -> None:
        await self._tell(judge_integrity(await self._store.verify()))

    async def _tell(self, findings: Iterable[Finding]) -> None:
        """Record what is not as it should be; the same thing again only if it was well in between."""
        for one in findings:
            if one.level is Level.OK:
                self._told.discard(one.name)
            elif one.name not in self._told:
                self._told.add(one.name)
                await self._ledger.note("state.warning", {"about": one.name, "reason": one.found, "remedy": one.remedy})
