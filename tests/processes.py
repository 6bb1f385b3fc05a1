"""Processes that tests search for."""

from __future__ import annotations

import psutil


def child_processes() -> list[psutil.Process]:
    """Return the child processes, except the keeper, which ends with this process."""
    return [
        one
        for one in psutil.Process().children()
        if "orchestrator.system.command_reaper" not in " ".join(one.cmdline())
    ]
