"""Add the open tasks of trackers to a run."""

from __future__ import annotations

from functools import partial

from orchestrator.config.model import RunConfig
from orchestrator.config.tracked import add_tracked_tasks
from orchestrator.engine.trackers import fetch_tracked_tasks
from orchestrator.errors import RefusedError
from orchestrator.plugins import Plugins


async def add_open_tracked_tasks(config: RunConfig, plugins: Plugins) -> RunConfig:
    """Return the config with the open tasks of its trackers in addition to its own.

    Raises ConfigError if their tasks are invalid, RefusedError if a tracker does not answer or there is no task at all.
    """
    if not config.trackers:
        return config
    stored = {name: tracker.to_stored() for name, tracker in config.trackers.items()}
    tracked = await fetch_tracked_tasks(
        {name: partial(plugins.open, "tracker", name, tracker) for name, tracker in stored.items()}
    )
    config = add_tracked_tasks(config, tracked, plugins.adapters)
    if not config.tasks:
        names = ", ".join(map(repr, tracked))
        raise RefusedError(f"nothing to do: no open task in {names}", "add a task, or try again later")
    return config
