"""Creation and execution of runs in this process, and requests on runs.

`RunExecutor` runs tasks, `RunController` performs requests of a user, `perform_dry_run` checks a run without starting
it, `find_invisible_files` warns of files that sessions can't see, `start_in_background` starts another process,
`sync_with_trackers` updates external task lists. Each is imported on first use: commands that only show a run need none
of them, and no command needs all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy import lazy_names

if TYPE_CHECKING:
    from orchestrator.api.execution.background import BackgroundProcess, start_in_background
    from orchestrator.api.execution.control import RunController
    from orchestrator.api.execution.creation import create_merge_run, create_run
    from orchestrator.api.execution.dry_run import find_invisible_files, perform_dry_run
    from orchestrator.api.execution.executor import RunExecutor
    from orchestrator.api.execution.services import read_sync_status, sync_with_trackers

__all__ = [
    "BackgroundProcess",
    "RunController",
    "RunExecutor",
    "create_merge_run",
    "create_run",
    "find_invisible_files",
    "perform_dry_run",
    "read_sync_status",
    "start_in_background",
    "sync_with_trackers",
]

if not TYPE_CHECKING:  # type checkers see the imports above, and report unknown names
    __getattr__ = lazy_names(
        __name__,
        {
            "background": ["BackgroundProcess", "start_in_background"],
            "control": ["RunController"],
            "executor": ["RunExecutor"],
            "creation": ["create_merge_run", "create_run"],
            "dry_run": ["find_invisible_files", "perform_dry_run"],
            "services": ["read_sync_status", "sync_with_trackers"],
        },
    )
