"""The group of commands that inspect and maintain the recorded state; each is imported on demand."""

from __future__ import annotations

import click

from orchestrator.cli.core.group import LazyGroup

_HERE = "orchestrator.cli.commands.state"


@click.group(
    cls=LazyGroup,
    places={
        "at": f"{_HERE}.history:at",
        "diff": f"{_HERE}.history:diff",
        "history": f"{_HERE}.history:history",
        "log": f"{_HERE}.history:log",
        "show": f"{_HERE}.history:show",
        "verify": f"{_HERE}.history:verify",
        "health": f"{_HERE}.maintenance:health",
        "compact": f"{_HERE}.maintenance:compact",
        "adopt": f"{_HERE}.maintenance:adopt",
        "views": f"{_HERE}.maintenance:views",
        "conflicts": f"{_HERE}.conflicts:conflicts",
        "settle": f"{_HERE}.conflicts:settle",
        "copy": f"{_HERE}.copy:copy",
        "export": f"{_HERE}.copy:export",
        "import": f"{_HERE}.copy:import_",
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
