"""Notice that a forge has reported a change (`council serve-webhooks`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing

from orchestrator.domain.events.runs import ForgeChanged
from orchestrator.errors import CouncilError, HistoryCompacted
from orchestrator.protocols import Store


async def watch_forge(store: Store, run: str, wake: Callable[[], None]) -> None:
    """Call `wake` for each change that a forge reports to a run, until cancelled or the store is unavailable."""
    while True:
        try:
            async with aclosing(store.watch(await store.position())) as records:
                async for record in records:
                    if any(one.type == ForgeChanged.type and one.data.get("run") == run for one in record.events):
                        wake()
        except HistoryCompacted:
            continue
        except (CouncilError, OSError):  # what is read regularly is read anyway
            return
