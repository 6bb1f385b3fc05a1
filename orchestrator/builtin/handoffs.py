"""The kinds of handoffs and the transformations that come with the package, registered as a plugin's would be."""

from __future__ import annotations

import pluggy

from orchestrator.domain.workflow.handoff_kinds import HANDOFF_KINDS
from orchestrator.domain.workflow.mediation import TRANSFORMATIONS
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterHandoffKind, RegisterTransformation

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


@hookimpl
def council_register_handoff_kinds(register: RegisterHandoffKind) -> None:
    """Register what phases hand over: scout, plan, build, test, deploy and review."""
    for name, kind in HANDOFF_KINDS.items():
        register(name, kind)


@hookimpl
def council_register_transformations(register: RegisterTransformation) -> None:
    """Register what makes of a scout's result what a planner wants."""
    for name, transformation in TRANSFORMATIONS.items():
        register(name, transformation)
