"""The `state` command group. Each command is imported on first use."""

from __future__ import annotations

import click

from orchestrator.cli.core.group import LazyGroup

#: The commands by module, in the order of the help.
_COMMANDS = {
    "history": ("at", "diff", "history", "log", "show", "verify"),
    "maintenance": ("health", "compact", "adopt", "views"),
    "conflicts": ("conflicts", "resolve"),
    "copy": ("copy", "export"),
}


@click.group(
    cls=LazyGroup,
    locations={
        **{name: f"state.{module}:{name}" for module, names in _COMMANDS.items() for name in names},
        "import": "state.copy:import_",
    },
)
def state() -> None:
    """Inspect and maintain the recorded state, now and in the past.

    A point in time is a position of the log, a time (2026-01-02T03:04), an age (2h), the id of a checkpoint, or now.

    \b
    Examples:
      council state log --limit 20
      council state at 2h
      council state history task/models
    """
