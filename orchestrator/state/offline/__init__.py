"""Continue while a store is unreachable. Entry point: `fork.survive_outages`.

The functions for commands are imported on first use: most commands read a local store, and need none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy import lazy_names

if TYPE_CHECKING:
    from orchestrator.state.offline.outage import pausing_store, wait_for_server, waiting_store

__all__ = ["pausing_store", "wait_for_server", "waiting_store"]

if not TYPE_CHECKING:  # type checkers see the imports above, and report unknown names
    __getattr__ = lazy_names(__name__, {"outage": __all__})
