"""Session capacity, limited by the configuration and this machine's resources."""

from __future__ import annotations

import anyio.to_thread

from orchestrator.domain.events.runs import RunCapacityLimited, RunPaused
from orchestrator.domain.runs.retry import retry_delay
from orchestrator.domain.scheduling.admission import (
    NoSessionFits,
    SessionDemand,
    SessionFit,
    can_start_session,
    fit_sessions,
)
from orchestrator.domain.settings.run_settings import Backoff
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import RefusedError
from orchestrator.system.clock import Clock
from orchestrator.system.resources import raise_descriptor_limit, read_resources

#: Seconds before memory is checked again after a shortage.
MEMORY_RETRY_DELAY = 5.0
#: The pause of session starts after a session failed for lack of a resource, in seconds.
SHORTAGE_BACKOFF = Backoff(initial=1.0, factor=2.0, max=30.0, jitter=False)


async def measure_capacity(wanted: int, demand: SessionDemand) -> SessionFit:
    """Raise the descriptor limit and return how many sessions fit.

    Raises RefusedError if none fits.
    """
    await anyio.to_thread.run_sync(raise_descriptor_limit)
    fit = fit_sessions(await anyio.to_thread.run_sync(read_resources), wanted, demand)
    if isinstance(fit, NoSessionFits):
        raise RefusedError(fit.message, fit.remedy)
    return fit


class Capacity:
    """The capacity for sessions, measured at the start and monitored afterwards."""

    def __init__(self, sessions: int, demand: SessionDemand, ledger: Ledger, clock: Clock) -> None:
        """Create the capacity with the number of sessions that fit; see `measure`."""
        self.sessions = sessions
        self._demand, self._ledger, self._clock = demand, ledger, clock
        self._is_short = False
        self.recheck_at: float | None = None
        """When to check memory again (monotonic seconds); None if memory is not short."""
        self.paused_until = 0.0
        """No session starts before this time (monotonic seconds)."""
        self._shortages = 0

    @classmethod
    async def measure(cls, wanted: int, ledger: Ledger, clock: Clock) -> Capacity:
        """Measure the capacity of this machine and record a limit.

        Raises RefusedError if no session fits.
        """
        demand = SessionDemand(memory=ledger.run.session_memory)
        fit = await measure_capacity(wanted, demand)
        if fit.limited_by is not None:
            await ledger.note(RunCapacityLimited(sessions=fit.sessions, reason=fit.limited_by))
        return cls(fit.sessions, demand, ledger, clock)

    async def free(self, running: int) -> int:
        """Return the number of additional sessions that may start now."""
        self.recheck_at = None
        wanted = self.sessions - running
        if wanted <= 0:
            return 0
        facts = await anyio.to_thread.run_sync(read_resources)
        # A new session has not yet allocated its memory: start one at a time if memory is low.
        startable = wanted if facts.memory is None else min(wanted, max(facts.memory // self._demand.memory, 1))
        startable = startable if can_start_session(facts, running, self._demand) else 0
        if startable == 0:
            self.recheck_at = self._clock.monotonic() + MEMORY_RETRY_DELAY
        if (startable == 0) != self._is_short:
            self._is_short = startable == 0
            if self._is_short:
                reason = "memory is low: no new sessions until more is free"
                await self._ledger.note(RunCapacityLimited(sessions=running, reason=reason))
        return startable

    async def apply_shortage(self, reason: str | None) -> None:
        """Pause starts, each time longer, if a session lacked a resource.

        `reason` is None if it did not.
        """
        if reason is None:
            self._shortages = 0
        elif self.paused_until <= self._clock.monotonic():  # otherwise another session reported the same shortage
            self._shortages += 1
            pause = retry_delay(SHORTAGE_BACKOFF, self._shortages)
            self.paused_until = self._clock.monotonic() + pause
            await self._ledger.note(RunPaused(reason=reason, retry_in=pause))
