"""What a phase knows: values that it inherits, has of its own and produces; what of them it is given. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.domain.documents.json_values import canonical
from orchestrator.domain.runs.phases import Given
from orchestrator.domain.workflow.handoff_kinds import NEEDS, Kind, schema_kind
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

    def passed_on(self) -> dict[str, Any]:
        """Return what the next phase inherits: all but its own."""
        return {**self.inherited, **self.produced}


def chained(
    phases: Iterable[Phase], inherited: Mapping[str, Any], produced: Mapping[str, Mapping[str, Any]]
) -> list[PhaseContext]:
    """Return the contexts of phases in their order, each inheriting from the one before.

    `produced` has by phase what its handoff exports; a phase that is not there adds nothing.
    """
    chain: list[PhaseContext] = []
    known = dict(inherited)
    for phase in phases:
        chain.append(PhaseContext(phase.name, known, phase.context, produced.get(phase.name, {})))
        known = chain[-1].passed_on()
    return chain


def context_of(
    phase: Phase, before: Sequence[Phase], inherited: Mapping[str, Any], produced: Mapping[str, Mapping[str, Any]]
) -> PhaseContext:
    """Return the context of a phase that begins, after the phases before it."""
    return chained([*before, phase], inherited, {one.name: produced.get(one.name, {}) for one in before})[-1]


def kind_of(phase: Phase, kinds: Mapping[str, Kind]) -> Kind | None:
    """Return the kind of what a phase hands over; None where it hands nothing over, or nobody knows the kind."""
    if phase.produces is None:
        return None
    return kinds.get(phase.produces) if phase.schema_ is None else schema_kind(phase.produces, phase.schema_)


def needs_of(phase: Phase, kind: Kind | None) -> tuple[str, ...] | None:
    """Return the names of the values that a phase is given; None: all.

    As it declares, else as its kind does, else as phases of its name do.
    """
    if phase.needs is not None:
        return phase.needs
    if kind is not None and kind.needs is not None:
        return kind.needs
    return NEEDS.get(phase.name)


def filtered(values: Mapping[str, Any], needs: Sequence[str] | None) -> tuple[dict[str, Any], Given]:
    """Return those of the values that are needed (None: all), in the order in which they are, and what that spares."""
    wanted = values.keys() if needs is None else dict.fromkeys(needs)
    given = {key: values[key] for key in wanted if key in values}
    left = tuple(key for key in values if key not in given)
    size, whole = len(canonical(given)), len(canonical(dict(values)))
    return given, Given(keys=tuple(given), left_out=left, size=size, whole=whole)
