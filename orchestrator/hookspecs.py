"""The hooks that a plugin may implement; plugins are found through the entry-point group `cli_council`.

A hook only registers: it reads no file, starts no process and makes no connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pluggy
from pydantic import BaseModel

from orchestrator.domain.workflow.handoff_kinds import HandoffKind, HandoffValidator
from orchestrator.domain.workflow.mediation import Transformation
from orchestrator.protocols import AdapterType, SinkType, StoreType, TrackerType

if TYPE_CHECKING:  # most programs do without its imports
    from orchestrator.domain.workflow.verification import Constraint

#: The name of the entry-point group, and the project name for a plugin's `pluggy.HookimplMarker`.
ENTRY_POINT_GROUP = "cli_council"

hookspec = pluggy.HookspecMarker(ENTRY_POINT_GROUP)


class RegisterAdapter(Protocol):
    """Registers an adapter type."""

    def __call__(self, name: str, adapter: AdapterType, /) -> None:
        """Make `adapter` available as `use: NAME` under `adapters:`."""


class RegisterStore(Protocol):
    """Registers a store type."""

    def __call__(self, scheme: str, store: StoreType, /) -> None:
        """Make `store` available for URLs that begin with `SCHEME:`."""


class RegisterSink(Protocol):
    """Registers a sink type."""

    def __call__(self, name: str, sink: SinkType, /) -> None:
        """Make `sink` available as `use: NAME` under `sinks:`."""


class RegisterTracker(Protocol):
    """Registers a tracker type."""

    def __call__(self, name: str, tracker: TrackerType, /) -> None:
        """Make `tracker` available as `use: NAME` under `trackers:`."""


class RegisterHandoffKind(Protocol):
    """Registers a kind of handoff."""

    def __call__(self, name: str, kind: type[BaseModel] | HandoffKind, /) -> None:
        """Make a kind available as `produces: NAME` of a phase; a pydantic model becomes a kind with that schema."""


class RegisterTransformation(Protocol):
    """Registers a transformation of handoffs between two phases."""

    def __call__(self, name: str, transformation: Transformation, /) -> None:
        """Make it available as `transform: NAME` of a phase; one named `KIND_to_KIND` applies by default."""


class RegisterValidator(Protocol):
    """Registers an additional validator of handoffs."""

    def __call__(self, name: str, validator: HandoffValidator, /) -> None:
        """Run it on each handoff of its kind, after the kind's own validation; `name` identifies it in errors."""


class RegisterConstraint(Protocol):
    """Registers a constraint on the complete record of a task."""

    def __call__(self, name: str, constraint: Constraint, /) -> None:
        """Run it in `council check`; `name` identifies it in violations."""


@hookspec
def council_register_adapters(register: RegisterAdapter) -> None:
    """Call `register(name, adapter)` for each adapter of this plugin."""


@hookspec
def council_register_stores(register: RegisterStore) -> None:
    """Call `register(scheme, store)` for each store of this plugin."""


@hookspec
def council_register_sinks(register: RegisterSink) -> None:
    """Call `register(name, sink)` for each sink of this plugin."""


@hookspec
def council_register_trackers(register: RegisterTracker) -> None:
    """Call `register(name, tracker)` for each tracker of this plugin."""


@hookspec
def council_register_handoff_kinds(register: RegisterHandoffKind) -> None:
    """Call `register(name, model)` for each kind of handoff of this plugin."""


@hookspec
def council_register_transformations(register: RegisterTransformation) -> None:
    """Call `register(name, function)` for each transformation of this plugin."""


@hookspec
def council_register_validators(register: RegisterValidator) -> None:
    """Call `register(name, HandoffValidator(kind, function))` for each validator of this plugin."""


@hookspec
def council_register_constraints(register: RegisterConstraint) -> None:
    """Call `register(name, function)` for each constraint of this plugin."""
