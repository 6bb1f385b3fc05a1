"""The processes that tests look for."""

from __future__ import annotations

import psutil


def child_processes() -> list[psutil.Process]:
    """Return what this process has started and is left, except the keeper, which ends with this process."""
    return [
        one
        for one in psutil.Process().children()
        if "orchestrator.system.command_reaper" not in " ".join(one.cmdline())
    ]
