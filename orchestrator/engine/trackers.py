"""Asks the trackers of a run for their tasks, once, before the run is recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

import anyio

from orchestrator.errors import RefusedError
from orchestrator.protocols import TrackedTask, Tracker

#: Seconds that a tracker may take.
FETCH_TIMEOUT = 60.0

OpenTracker = Callable[[], AbstractAsyncContextManager[Tracker]]


async def fetch_tracked_tasks(
    trackers: Mapping[str, OpenTracker], limit: float = FETCH_TIMEOUT
) -> dict[str, Sequence[TrackedTask]]:
    """Return the open tasks of each tracker by its name; RefusedError if one can't tell them."""
    return {name: await _fetch(name, tracker, limit) for name, tracker in trackers.items()}


async def _fetch(name: str, opened: OpenTracker, limit: float) -> Sequence[TrackedTask]:
    remedy = "mend that, or take the tracker out of the file"
    try:
        with anyio.fail_after(limit):
            async with opened() as tracker:
                return [TrackedTask(task.id, task.prompt, tuple(task.needs)) for task in await tracker.tasks()]
    except RefusedError as error:
        raise RefusedError(f"tracker {name!r}: {error.what}", error.remedy) from error
    except TimeoutError as error:
        raise RefusedError(f"tracker {name!r} did not tell its tasks in {limit:g} s", remedy) from error
    except (Exception, SystemExit) as error:
        what = " ".join(f"tracker {name!r} can't tell its tasks, {type(error).__name__}: {error}".split())
        raise RefusedError(what, remedy) from error
