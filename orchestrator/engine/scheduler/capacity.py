"""How many sessions may run: what the run asks for, as far as this machine has room for them."""

from __future__ import annotations

import anyio.to_thread

from orchestrator.domain.scheduling.admission import (
    NoSessionFits,
    SessionDemand,
    SessionFit,
    can_start_session,
    fit_sessions,
)
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import RefusedError
from orchestrator.system.clock import Clock
from orchestrator.system.resources import raise_descriptor_limit, read_resources

#: Seconds after which memory that was short is looked at again.
MEMORY_RETRY_DELAY = 5.0


async def measure_capacity(wanted: int, demand: SessionDemand) -> SessionFit:
    """Raise the limit of descriptors and look how many of the wanted sessions fit; RefusedError if not even one."""
    await anyio.to_thread.run_sync(raise_descriptor_limit)
    found = fit_sessions(await anyio.to_thread.run_sync(read_resources), wanted, demand)
    if isinstance(found, NoSessionFits):
        raise RefusedError(found.what, found.remedy)
    return found


class Capacity:
    """The room for sessions, measured once before the first of them and watched from then on."""

    def __init__(self, sessions: int, demand: SessionDemand, ledger: Ledger, clock: Clock) -> None:
        """Take how many sessions fit; `measure` finds that out."""
        self.sessions = sessions
        self._demand, self._ledger, self._clock = demand, ledger, clock
        self._is_short = False
        self.recheck_at: float | None = None
        """When (monotonic seconds) memory that was short should be looked at again; None if it was not."""

    @classmethod
    async def measure(cls, wanted: int, ledger: Ledger, clock: Clock) -> Capacity:
        """Raise the limit of descriptors and look how many of the wanted fit; RefusedError if not even one does."""
        demand = SessionDemand(memory=ledger.run.session_memory)
        found = await measure_capacity(wanted, demand)
        if found.limited_by is not None:
            await ledger.note("run.capacity_limited", {"sessions": found.sessions, "reason": found.limited_by})
        return cls(found.sessions, demand, ledger, clock)

    async def free(self, running: int) -> int:
        """Return how many more sessions may start now beside those that run."""
        self.recheck_at = None
        wanted = self.sessions - running
        if wanted <= 0:
            return 0
        facts = await anyio.to_thread.run_sync(read_resources)
        # What has just started has not taken its share yet: one at a time where it is tight.
        room = wanted if facts.memory is None else min(wanted, max(facts.memory // self._demand.memory, 1))
        room = room if can_start_session(facts, running, self._demand) else 0
        if room == 0:
            self.recheck_at = self._clock.monotonic() + MEMORY_RETRY_DELAY
        if (room == 0) != self._is_short:
            self._is_short = room == 0
            if self._is_short:
                reason = "memory is short: nothing starts beside what runs until there is more"
                await self._ledger.note("run.capacity_limited", {"sessions": running, "reason": reason})
        return room
