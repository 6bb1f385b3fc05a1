"""How many sessions fit into what the machine has left, and what to do if that is fewer than were wanted."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class AvailableResources:
    """What is left, in descriptors and bytes; None where it is unknown or has no limit."""

    descriptor_limit: int | None
    """How many this process may have open."""
    descriptors_open: int
    memory: int | None
    """What can be had without swapping."""


@dataclass(frozen=True, slots=True)
class SessionDemand:
    """What a session is expected to take of each, and what is left to the rest of the program and of the machine."""

    descriptors: int = 8
    """Two pipes to its supervisor, and its part of what git commands in threads need; 6 at the peak were measured."""
    memory: int = 256 * MIB
    spare_descriptors: int = 24
    """The state log, its folder, locks, the wake-up pipes and what is imported late."""
    spare_memory: int = 128 * MIB


@dataclass(frozen=True, slots=True)
class SessionFit:
    """How many sessions there may be; `limited_by` says what keeps it below what was wanted, and what to do."""

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
    """Return how many of the wanted sessions fit beside what is open and in use now, before the first of them."""
    limits = [
        ("descriptors", _fitting_descriptors(facts, demand), "raise it with `ulimit -n`"),
        ("memory", _fitting_memory(facts, demand), "end other programs, or state a smaller need of memory"),
    ]
    known = [(many, name, remedy) for name, many, remedy in limits if many is not None]
    many, name, remedy = min(known, default=(wanted, "", ""))
    if many >= wanted:
        return SessionFit(wanted)
    what = _left(name, facts, demand)
    if many < 1:
        return NoSessionFits(f"not even one session fits: {what}", remedy)
    return SessionFit(many, f"{what}, enough for {many} of {wanted} sessions: {remedy}")


def can_start_session(facts: AvailableResources, running: int, demand: SessionDemand = DEFAULT_DEMAND) -> bool:
    """Whether memory is left for one more session beside those that run.

    With none running the answer is yes: nothing of ours could end and give memory back.
    """
    return not running or facts.memory is None or facts.memory >= demand.memory + demand.spare_memory


def _fitting_descriptors(facts: AvailableResources, demand: SessionDemand) -> int | None:
    if facts.descriptor_limit is None:
        return None
    return (facts.descriptor_limit - facts.descriptors_open - demand.spare_descriptors) // demand.descriptors


def _fitting_memory(facts: AvailableResources, demand: SessionDemand) -> int | None:
    return None if facts.memory is None else (facts.memory - demand.spare_memory) // demand.memory


def _left(name: str, facts: AvailableResources, demand: SessionDemand) -> str:
    if name == "descriptors":
        return f"{facts.descriptors_open} of at most {facts.descriptor_limit} file descriptors are open"
    return f"{(facts.memory or 0) // MIB} MiB of memory are left, where a session takes {demand.memory // MIB} MiB"
