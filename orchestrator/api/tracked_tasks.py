"""The tasks that a run takes from its trackers."""

from __future__ import annotations

from functools import partial

from orchestrator.config.model import RunConfig
from orchestrator.config.tracked import add_tracked_tasks
from orchestrator.engine.trackers import fetch_tracked_tasks
from orchestrator.errors import RefusedError
from orchestrator.plugins import Plugins


async def add_open_tracked_tasks(config: RunConfig, plugins: Plugins) -> RunConfig:
    """Return the config with the tasks that its trackers have open beside its own.

    Raises ConfigError if what they give does not fit, RefusedError if one does not answer or nothing is left to do.
    """
    if not config.trackers:
        return config
    stored = {name: tracker.to_stored() for name, tracker in config.trackers.items()}
    found = await fetch_tracked_tasks(
        {name: partial(plugins.open, "tracker", name, one) for name, one in stored.items()}
    )
    config = add_tracked_tasks(config, found, plugins.adapters)
    if not config.tasks:
        named = ", ".join(map(repr, found))
        raise RefusedError(f"there is nothing to do: no task is open in {named}", "add one, or look again later")
    return config
