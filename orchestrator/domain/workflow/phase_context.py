"""Select the values for the session of a phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.domain.documents.json_values import encode_canonical
from orchestrator.domain.runs.phases import InputSummary
from orchestrator.domain.settings.phase_settings import Phase
from orchestrator.domain.workflow.handoff_kinds import PHASE_NEEDS, HandoffKind, kind_from_schema


def get_handoff_kind(phase: Phase, kinds: Mapping[str, HandoffKind]) -> HandoffKind | None:
    """Return a phase's handoff kind; None if it has none or an unknown one."""
    if phase.kind is None:
        return None
    return kinds.get(phase.kind) if phase.handoff_schema is None else kind_from_schema(phase.kind, phase.handoff_schema)


def get_phase_needs(phase: Phase, kind: HandoffKind | None) -> tuple[str, ...] | None:
    """Return the names of the values that a phase needs; None: all.

    They are declared by the phase, its kind, or the default for its name, in this order.
    """
    if phase.needs is not None:
        return phase.needs
    if kind is not None and kind.needs is not None:
        return kind.needs
    return PHASE_NEEDS.get(phase.name)


def select_values(values: Mapping[str, Any], needs: Sequence[str] | None) -> tuple[dict[str, Any], InputSummary]:
    """Return the needed values (None: all), and a record of passed and omitted ones."""
    wanted = values.keys() if needs is None else dict.fromkeys(needs)
    inputs = {key: values[key] for key in wanted if key in values}
    omitted = tuple(key for key in values if key not in inputs)
    size, total_size = len(encode_canonical(inputs)), len(encode_canonical(dict(values)))
    return inputs, InputSummary(keys=tuple(inputs), omitted=omitted, size=size, total_size=total_size)
