"""Claims: the leases on tasks. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """When a claim is renewed and when it counts no more; all but `max_retries` are seconds."""

    heartbeat: float = 60.0
    """Between two renewals."""
    stale: float = 300.0
    """Since the last renewal, after which anybody may take it over."""
    owner_stale: float = 600.0
    """The same for an owner on this machine, unless it is proven dead."""
    sweep: float = 90.0
    """Between two looks for claims that are stale."""
    max_retries: int = 3
    """How often a task is tried again after its first attempt; a takeover counts as one."""
