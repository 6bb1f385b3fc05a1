"""The hooks that a plugin may implement, found through the entry-point group `cli_council`.

A hook registers and does nothing else: no file is read, nothing is started, no connection is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pluggy
from pydantic import BaseModel

from orchestrator.domain.workflow.handoff_kinds import HandoffKind, HandoffValidator
from orchestrator.domain.workflow.mediation import Transformation
from orchestrator.protocols import AdapterType, SinkType, StoreType, TrackerType

if TYPE_CHECKING:  # it brings what most programs do without
    from orchestrator.domain.workflow.verification import Constraint

#: The name of the entry-point group, and of the project that a plugin's `pluggy.HookimplMarker` names.
ENTRY_POINT_GROUP = "cli_council"

hookspec = pluggy.HookspecMarker(ENTRY_POINT_GROUP)


class RegisterAdapter(Protocol):
    """How a plugin announces an adapter."""

    def __call__(self, name: str, adapter: AdapterType, /) -> None:
        """Make `adapter` available as `use: NAME` under `adapters:`."""


class RegisterStore(Protocol):
    """How a plugin announces a store."""

    def __call__(self, scheme: str, store: StoreType, /) -> None:
        """Make `store` available for URLs that begin with `SCHEME:`."""


class RegisterSink(Protocol):
    """How a plugin announces a sink."""

    def __call__(self, name: str, sink: SinkType, /) -> None:
        """Make `sink` available as `use: NAME` under `sinks:`."""


class RegisterTracker(Protocol):
    """How a plugin announces a tracker."""

    def __call__(self, name: str, tracker: TrackerType, /) -> None:
        """Make `tracker` available as `use: NAME` under `trackers:`."""


class RegisterHandoffKind(Protocol):
    """How a plugin announces a kind of handoff."""

    def __call__(self, name: str, kind: type[BaseModel] | HandoffKind, /) -> None:
        """Make what a model takes available as `produces: NAME` of a phase; a kind says more than a model can."""


class RegisterTransformation(Protocol):
    """How a plugin announces what mediates between two phases."""

    def __call__(self, name: str, transformation: Transformation, /) -> None:
        """Make it available as `transform: NAME` of a phase; `KIND_to_KIND` is taken without being named."""


class RegisterValidator(Protocol):
    """How a plugin announces a check of what is handed over."""

    def __call__(self, name: str, validator: HandoffValidator, /) -> None:
        """Have it run on each handoff of its kind, after the kind's own check; `name` stands in what it finds."""


class RegisterConstraint(Protocol):
    """How a plugin announces a rule over all that is recorded of a task."""

    def __call__(self, name: str, constraint: Constraint, /) -> None:
        """Have it run by `council check`; `name` says which rule it is where it fails."""


@hookspec
def council_register_adapters(register: RegisterAdapter) -> None:
    """Call `register(name, adapter)` for each adapter that this plugin brings."""


@hookspec
def council_register_stores(register: RegisterStore) -> None:
    """Call `register(scheme, store)` for each store that this plugin brings."""


@hookspec
def council_register_sinks(register: RegisterSink) -> None:
    """Call `register(name, sink)` for each sink that this plugin brings."""


@hookspec
def council_register_trackers(register: RegisterTracker) -> None:
    """Call `register(name, tracker)` for each tracker that this plugin brings."""


@hookspec
def council_register_handoff_kinds(register: RegisterHandoffKind) -> None:
    """Call `register(name, model)` for each kind of handoff that this plugin brings."""


@hookspec
def council_register_transformations(register: RegisterTransformation) -> None:
    """Call `register(name, function)` for each transformation that this plugin brings."""


@hookspec
def council_register_validators(register: RegisterValidator) -> None:
    """Call `register(name, HandoffValidator(kind, function))` for each check of handoffs that this plugin brings."""


@hookspec
def council_register_constraints(register: RegisterConstraint) -> None:
    """Call `register(name, function)` for each rule over a task's whole way that this plugin brings."""
