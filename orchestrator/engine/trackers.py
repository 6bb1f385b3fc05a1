"""Fetch the tasks of a run's trackers once, before the run is recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

import anyio

from orchestrator.errors import PluginFailed, RefusedError, plugin_code
from orchestrator.protocols import TrackedTask, Tracker

#: The timeout of a tracker, in seconds.
FETCH_TIMEOUT = 60.0

OpenTracker = Callable[[], AbstractAsyncContextManager[Tracker]]


async def fetch_tracked_tasks(
    trackers: Mapping[str, OpenTracker], limit: float = FETCH_TIMEOUT
) -> dict[str, Sequence[TrackedTask]]:
    """Return open tasks by tracker; raise RefusedError if a tracker can't list them."""
    return {name: await _fetch(name, tracker, limit) for name, tracker in trackers.items()}


async def _fetch(name: str, open_tracker: OpenTracker, limit: float) -> Sequence[TrackedTask]:
    remedy = "fix the tracker, or remove it from the file"
    try:
        with plugin_code(RefusedError, TimeoutError), anyio.fail_after(limit):
            async with open_tracker() as tracker:
                return [TrackedTask(task.id, task.prompt, tuple(task.needs)) for task in await tracker.tasks()]
    except RefusedError as error:
        raise RefusedError(f"tracker {name!r}: {error.message}", error.remedy) from error
    except TimeoutError as error:
        raise RefusedError(f"tracker {name!r} did not list its tasks within {limit:g} s", remedy) from error
    except PluginFailed as failed:
        raise RefusedError(f"tracker {name!r} can't list its tasks: {failed}", remedy) from failed
