"""Context of a phase: inherited, local and produced values, and the selection that its session gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.domain.documents.json_values import encode_canonical
from orchestrator.domain.runs.phases import GivenValues
from orchestrator.domain.settings.phase_settings import Phase
from orchestrator.domain.workflow.handoff_kinds import PHASE_NEEDS, HandoffKind, kind_from_schema


@dataclass(frozen=True, slots=True)
class PhaseContext:
    """The named values of one phase."""

    phase: str
    inherited: Mapping[str, Any] = field(default_factory=dict)
    """Values from the config file and from earlier phases."""
    local: Mapping[str, Any] = field(default_factory=dict)
    """Values for this phase only."""
    produced: Mapping[str, Any] = field(default_factory=dict)
    """Values that it produced."""

    def known(self) -> dict[str, Any]:
        """Return all input values; local values override inherited ones."""
        return {**self.inherited, **self.local}

    def complete(self) -> dict[str, Any]:
        """Return all values; produced values override local ones, and these override inherited ones."""
        return {**self.known(), **self.produced}

    def to_next_phase(self) -> dict[str, Any]:
        """Return the values that the next phase inherits: all except local ones."""
        return {**self.inherited, **self.produced}


def chain_contexts(
    phases: Iterable[Phase], inherited: Mapping[str, Any], produced: Mapping[str, Mapping[str, Any]]
) -> list[PhaseContext]:
    """Return the contexts of phases in order, each inheriting from the previous one.

    `produced` has the exported values of handoffs by phase; a missing phase adds nothing.
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
    """Return the context of a starting phase, given the phases before it."""
    return chain_contexts([*before, phase], inherited, {each.name: produced.get(each.name, {}) for each in before})[-1]


def get_handoff_kind(phase: Phase, kinds: Mapping[str, HandoffKind]) -> HandoffKind | None:
    """Return the kind of a phase's handoff; None if it has none, or the kind is unknown."""
    if phase.kind is None:
        return None
    return kinds.get(phase.kind) if phase.handoff_schema is None else kind_from_schema(phase.kind, phase.handoff_schema)


def get_phase_needs(phase: Phase, kind: HandoffKind | None) -> tuple[str, ...] | None:
    """Return the names of the values that a phase needs; None: all.

    They are declared by the phase, by its kind, or by the default for its name, in this order.
    """
    if phase.needs is not None:
        return phase.needs
    if kind is not None and kind.needs is not None:
        return kind.needs
    return PHASE_NEEDS.get(phase.name)


def select_values(values: Mapping[str, Any], needs: Sequence[str] | None) -> tuple[dict[str, Any], GivenValues]:
    """Return the needed values (None: all), in the order of `needs`, and a record of what was given and omitted."""
    wanted = values.keys() if needs is None else dict.fromkeys(needs)
    given = {key: values[key] for key in wanted if key in values}
    omitted = tuple(key for key in values if key not in given)
    size, whole = len(encode_canonical(given)), len(encode_canonical(dict(values)))
    return given, GivenValues(keys=tuple(given), left_out=omitted, size=size, whole=whole)
