"""Built-in handoff kinds and transformations, registered as a plugin's are."""

from __future__ import annotations

import pluggy

from orchestrator.domain.workflow.handoff_kinds import HANDOFF_KINDS
from orchestrator.domain.workflow.mediation import TRANSFORMATIONS
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterHandoffKind, RegisterTransformation

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


@hookimpl
def council_register_handoff_kinds(register: RegisterHandoffKind) -> None:
    """Register the handoffs of phases: scout, plan, build, test, deploy and review."""
    for name, kind in HANDOFF_KINDS.items():
        register(name, kind)


@hookimpl
def council_register_transformations(register: RegisterTransformation) -> None:
    """Register the transformation of a scout's result into a planner's input."""
    for name, transformation in TRANSFORMATIONS.items():
        register(name, transformation)
