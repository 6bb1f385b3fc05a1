"""The hooks that a plugin may implement, found through the entry-point group `cli_council`."""

from __future__ import annotations

from typing import Protocol

import pluggy

from orchestrator.protocols import AdapterType

hookspec = pluggy.HookspecMarker("cli_council")


class RegisterAdapter(Protocol):
    """How a plugin announces an adapter."""

    def __call__(self, name: str, adapter: AdapterType, /) -> None:
        """Make `adapter` available as `use: NAME`. A name that is taken is refused."""


@hookspec
def council_register_adapters(register: RegisterAdapter) -> None:
    """Call `register(name, adapter)` for each adapter that this plugin brings; do nothing else here."""
