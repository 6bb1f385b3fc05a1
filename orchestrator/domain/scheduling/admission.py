"""Compute how many sessions fit into the free resources of the machine, and the remedy if there are too few."""

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
    """The expected demand of a session, and the reserve for the rest of the program and the machine."""

    descriptors: int = 8
    """Two pipes to its supervisor, and its share of git commands in threads; the measured peak is 6."""
    memory: int = 256 * MIB
    spare_descriptors: int = 24
    """The state log, its folder, locks, wake-up pipes, and late imports."""
    spare_memory: int = 128 * MIB


@dataclass(frozen=True, slots=True)
class SessionFit:
    """The number of sessions that fit; `limited_by` is the limit below the wanted number, and its remedy."""

    sessions: int
    limited_by: str | None = None


@dataclass(frozen=True, slots=True)
class NoSessionFits:
    """Not even one session fits."""

    what: str
    remedy: str


DEFAULT_DEMAND = SessionDemand()


def fit_sessions(
    facts: AvailableResources, wanted: int, demand: SessionDemand = DEFAULT_DEMAND
) -> SessionFit | NoSessionFits:
    """Return how many of the wanted sessions fit, given the resources in use before the first one."""
    limits = [
        ("descriptors", _fitting_descriptors(facts, demand), "raise it with `ulimit -n`"),
        ("memory", _fitting_memory(facts, demand), "stop other programs, or set a smaller `session_memory`"),
    ]
    known = [(count, name, remedy) for name, count, remedy in limits if count is not None]
    count, name, remedy = min(known, default=(wanted, "", ""))
    if count >= wanted:
        return SessionFit(wanted)
    what = _describe_usage(name, facts, demand)
    if count < 1:
        return NoSessionFits(f"not even one session fits: {what}", remedy)
    return SessionFit(count, f"{what}, enough for {count} of {wanted} sessions: {remedy}")


def can_start_session(facts: AvailableResources, running: int, demand: SessionDemand = DEFAULT_DEMAND) -> bool:
    """Whether there is memory for one more session.

    Always true if no session is running, because waiting would not free memory.
    """
    return not running or facts.memory is None or facts.memory >= demand.memory + demand.spare_memory


def _fitting_descriptors(facts: AvailableResources, demand: SessionDemand) -> int | None:
    if facts.descriptor_limit is None:
        return None
    return (facts.descriptor_limit - facts.descriptors_open - demand.spare_descriptors) // demand.descriptors


def _fitting_memory(facts: AvailableResources, demand: SessionDemand) -> int | None:
    return None if facts.memory is None else (facts.memory - demand.spare_memory) // demand.memory


def _describe_usage(name: str, facts: AvailableResources, demand: SessionDemand) -> str:
    if name == "descriptors":
        return f"{facts.descriptors_open} of at most {facts.descriptor_limit} file descriptors are open"
    return f"{(facts.memory or 0) // MIB} MiB of memory are free, and a session needs {demand.memory // MIB} MiB"
