"""The hooks that a plugin may implement, found through the entry-point group `cli_council`.

A hook registers and does nothing else: no file is read, nothing is started, no connection is made.
"""

from __future__ import annotations

from typing import Protocol

import pluggy

from orchestrator.protocols import AdapterType, SinkType, StoreType, TrackerType

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
