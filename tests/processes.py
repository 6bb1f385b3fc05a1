"""Processes that tests search for."""

from __future__ import annotations

import psutil

#: The database servers of this process, which live as long as the test session.
servers: set[int] = set()


def child_processes() -> list[psutil.Process]:
    """Return the child processes, except servers and the keeper, which end with this process."""
    return [
        one
        for one in psutil.Process().children()
        if one.pid not in servers and "orchestrator.system.command_reaper" not in " ".join(one.cmdline())
    ]
