"""The hooks of plugins, which are found by the entry-point group `cli_council`.

A hook only registers: it reads no file, starts no process and makes no connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import pluggy
from pydantic import BaseModel

from orchestrator.domain.workflow.handoff_kinds import HandoffKind, HandoffValidator
from orchestrator.domain.workflow.mediation import Transformation
from orchestrator.protocols import AdapterType, ForgeType, ProfileFormat, SinkType, StoreType, TrackerType

if TYPE_CHECKING:  # most programs do without its imports
    from orchestrator.domain.workflow.verification import Constraint

#: The name of the entry-point group, and the project name for a plugin's `pluggy.HookimplMarker`.
ENTRY_POINT_GROUP = "cli_council"

hookspec = pluggy.HookspecMarker(ENTRY_POINT_GROUP)


Value_contra = TypeVar("Value_contra", contravariant=True)


class Register(Protocol[Value_contra]):
    """Registers a value of a plugin under a name."""

    def __call__(self, name: str, value: Value_contra, /) -> None:
        """Make `value` available under `name`."""


#: Available as `use: NAME` under `adapters:`, `sinks:` and `trackers:`.
RegisterAdapter = Register[AdapterType]
RegisterSink = Register[SinkType]
RegisterTracker = Register[TrackerType]
#: Available as `use: NAME` under `pull_requests:`.
RegisterForge = Register[ForgeType]
#: The name identifies the format in errors.
RegisterProfiles = Register[ProfileFormat]
#: Available for URLs that begin with `NAME:`.
RegisterStore = Register[StoreType]
#: Available as `produces: NAME` of a phase; a pydantic model becomes a kind with that schema.
RegisterHandoffKind = Register[type[BaseModel] | HandoffKind]
#: Available as `transform: NAME` of a phase; one named `KIND_to_KIND` applies by default.
RegisterTransformation = Register[Transformation]
#: Runs on each handoff of its kind, after the kind's own validation; the name identifies it in errors.
RegisterValidator = Register[HandoffValidator]


class RegisterConstraint(Protocol):
    """Registers a constraint, which runs in `council check`."""

    # Not an alias of `Register`: its value's module is imported only for type checks.
    def __call__(self, name: str, value: Constraint, /) -> None:
        """Register a check of each task's complete record, named in its violations."""


@hookspec
def council_register_adapters(register: RegisterAdapter) -> None:
    """Call `register(name, adapter)` for each adapter of this plugin."""


@hookspec
def council_register_profiles(register: RegisterProfiles) -> None:
    """Call `register(name, ProfileFormat(…))` for each folder of profiles of adapters."""


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
def council_register_forges(register: RegisterForge) -> None:
    """Call `register(name, forge)` for each forge of this plugin, on which tasks land by pull requests."""


@hookspec
def council_register_handoff_kinds(register: RegisterHandoffKind) -> None:
    """Call `register(name, model)` for each kind of handoff of this plugin."""


@hookspec
def council_register_transformations(register: RegisterTransformation) -> None:
    """Call `register(name, function)` for each transformation of this plugin."""


@hookspec
def council_register_validators(register: RegisterValidator) -> None:
    """Call `register(name, HandoffValidator(kind, function))` for each validator."""


@hookspec
def council_register_constraints(register: RegisterConstraint) -> None:
    """Call `register(name, function)` for each constraint of this plugin."""
