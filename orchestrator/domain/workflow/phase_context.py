"""What a phase knows: values that it inherits, has of its own and produces; what of them it is given. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.domain.documents.json_values import encode_canonical
from orchestrator.domain.runs.phases import GivenValues
from orchestrator.domain.workflow.handoff_kinds import PHASE_NEEDS, HandoffKind, kind_from_schema
from orchestrator.domain.workflow.routing import Phase


@dataclass(frozen=True, slots=True)
class PhaseContext:
    """The values of one phase, each under a name."""

    phase: str
    inherited: Mapping[str, Any] = field(default_factory=dict)
    """What was known when it began: from the file, and what earlier phases produced."""
    local: Mapping[str, Any] = field(default_factory=dict)
    """What it alone knows."""
    produced: Mapping[str, Any] = field(default_factory=dict)
    """What came of it."""

    def known(self) -> dict[str, Any]:
        """Return what it could be given: its own before what it inherits."""
        return {**self.inherited, **self.local}

    def complete(self) -> dict[str, Any]:
        """Return all of it: what came of it before its own, and that before what it inherits."""
        return {**self.known(), **self.produced}

    def to_next_phase(self) -> dict[str, Any]:
        """Return what the next phase inherits: all but its own."""
        return {**self.inherited, **self.produced}


def chain_contexts(
    phases: Iterable[Phase], inherited: Mapping[str, Any], produced: Mapping[str, Mapping[str, Any]]
) -> list[PhaseContext]:
    """Return the contexts of phases in their order, each inheriting from the one before.

    `produced` has by phase what its handoff exports; a phase that is not there adds nothing.
    """
    chain: list[PhaseContext] = []
    known = dict(inherited)
    for phase in phases:
        chain.append(PhaseContext(phase.name, known, phase.context, produced.get(phase.name, {})))
        known = chain[-1].to_next_phase()
    return chain


def build_phase_context(
    phase: Phase, before: Sequence[Phase], inherited: Mapping[str, Any], produced: Mapping[str, Mapping[str, Any]]
) -> PhaseContext:
    """Return the context of a phase that begins, after the phases before it."""
    return chain_contexts([*before, phase], inherited, {one.name: produced.get(one.name, {}) for one in before})[-1]


def get_handoff_kind(phase: Phase, kinds: Mapping[str, HandoffKind]) -> HandoffKind | None:
    """Return the kind of what a phase hands over; None where it hands nothing over, or nobody knows the kind."""
    if phase.produces is None:
        return None
    return kinds.get(phase.produces) if phase.schema_ is None else kind_from_schema(phase.produces, phase.schema_)


def get_phase_needs(phase: Phase, kind: HandoffKind | None) -> tuple[str, ...] | None:
    """Return the names of the values that a phase is given; None: all.

    As it declares, else as its kind does, else as phases of its name do.
    """
    if phase.needs is not None:
        return phase.needs
    if kind is not None and kind.needs is not None:
        return kind.needs
    return PHASE_NEEDS.get(phase.name)


def select_values(values: Mapping[str, Any], needs: Sequence[str] | None) -> tuple[dict[str, Any], GivenValues]:
    """Return those of the values that are needed (None: all), in the order in which they are, and what that spares."""
    wanted = values.keys() if needs is None else dict.fromkeys(needs)
    given = {key: values[key] for key in wanted if key in values}
    left = tuple(key for key in values if key not in given)
    size, whole = len(encode_canonical(given)), len(encode_canonical(dict(values)))
    return given, GivenValues(keys=tuple(given), left_out=left, size=size, whole=whole)
