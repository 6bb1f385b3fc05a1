"""Compute how many sessions the machine can run, and the remedy if too few."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class AvailableResources:
    """Free resources, in descriptors and bytes; None if unknown or unlimited."""

    descriptor_limit: int | None
    """The limit of open descriptors of this process."""
    descriptors_open: int
    memory: int | None
    """Memory available without swapping."""


@dataclass(frozen=True, slots=True)
class SessionDemand:
    """A session's expected demand, and the reserve for council and the machine."""

    descriptors: int = 8
    """Two pipes to its supervisor, and its share of git commands in threads; the measured peak is 6."""
    memory: int = 256 * MIB
    spare_descriptors: int = 24
    """The state log, its folder, locks, wake-up pipes, and late imports."""
    spare_memory: int = 128 * MIB


@dataclass(frozen=True, slots=True)
class SessionFit:
    """The number of sessions that fit.

    `limited_by` is the limit below the wanted number, and its remedy.
    """

    sessions: int
    limited_by: str | None = None


@dataclass(frozen=True, slots=True)
class NoSessionFits:
    """The resources do not suffice for a single session."""

    message: str
    remedy: str


DEFAULT_DEMAND = SessionDemand()


def fit_sessions(
    facts: AvailableResources, wanted: int, demand: SessionDemand = DEFAULT_DEMAND
) -> SessionFit | NoSessionFits:
    """Return the number of sessions that fit, given the resources already in use."""
    limits = []
    if facts.descriptor_limit is not None:
        count = (facts.descriptor_limit - facts.descriptors_open - demand.spare_descriptors) // demand.descriptors
        message = f"{facts.descriptors_open} of {facts.descriptor_limit} file descriptors are open"
        limits.append((count, message, "raise the limit with `ulimit -n`"))
    if facts.memory is not None:
        count = (facts.memory - demand.spare_memory) // demand.memory
        message = f"{facts.memory // MIB} MiB of memory available, and each session needs {demand.memory // MIB} MiB"
        limits.append((count, message, "stop other programs, or lower `session_memory`"))
    count, message, remedy = min(limits, default=(wanted, "", ""), key=lambda limit: limit[0])
    if count >= wanted:
        return SessionFit(wanted)
    if count < 1:
        return NoSessionFits(f"not enough resources for a session: {message}", remedy)
    return SessionFit(count, f"{message}, enough for {count} of {wanted} sessions: {remedy}")


def can_start_session(facts: AvailableResources, running: int, demand: SessionDemand = DEFAULT_DEMAND) -> bool:
    """Return whether there is memory for one more session.

    Always true if no session is running, because then waiting would not free memory.
    """
    return not running or facts.memory is None or facts.memory >= demand.memory + demand.spare_memory
