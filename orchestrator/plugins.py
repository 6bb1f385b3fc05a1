"""Finds plugins through the entry-point group `cli_council`; what we ship comes in by the same door."""

from __future__ import annotations

import pluggy

from orchestrator import hookspecs
from orchestrator.errors import PluginError
from orchestrator.protocols import AdapterType

ENTRY_POINT_GROUP = "cli_council"


def load_adapter_types() -> dict[str, AdapterType]:
    """Return every registered adapter type by its name."""
    manager = pluggy.PluginManager(ENTRY_POINT_GROUP)
    manager.add_hookspecs(hookspecs)
    manager.load_setuptools_entrypoints(ENTRY_POINT_GROUP)
    manager.check_pending()
    types: dict[str, AdapterType] = {}

    def register(name: str, adapter: AdapterType) -> None:
        if name in types:
            raise PluginError(name, "two plugins register an adapter of this name")
        types[name] = adapter

    manager.hook.council_register_adapters(register=register)
    return types
