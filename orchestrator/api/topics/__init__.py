"""The topics of a council, each a class with the operations on one subject.

`orchestrator.api.council.Council` creates them. Each is imported on first use: showing a run needs few of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy import lazy_names

if TYPE_CHECKING:
    from orchestrator.api.topics.changes import TaskChanges
    from orchestrator.api.topics.checkpoints import Checkpoints
    from orchestrator.api.topics.checks import Checks
    from orchestrator.api.topics.cleanup import Cleaner
    from orchestrator.api.topics.history import StateHistory
    from orchestrator.api.topics.locks import Locks
    from orchestrator.api.topics.logs import TaskLogs
    from orchestrator.api.topics.notes import Notes
    from orchestrator.api.topics.reports import RunReports
    from orchestrator.api.topics.runs import Runs
    from orchestrator.api.topics.sessions import Sessions
    from orchestrator.api.topics.state import State
    from orchestrator.api.topics.tasks import Tasks

__all__ = [
    "Checkpoints",
    "Checks",
    "Cleaner",
    "Locks",
    "Notes",
    "RunReports",
    "Runs",
    "Sessions",
    "State",
    "StateHistory",
    "TaskChanges",
    "TaskLogs",
    "Tasks",
]

if not TYPE_CHECKING:  # type checkers see the imports above, and report unknown names
    __getattr__ = lazy_names(
        __name__,
        {
            "changes": ["TaskChanges"],
            "checks": ["Checks"],
            "cleanup": ["Cleaner"],
            "checkpoints": ["Checkpoints"],
            "history": ["StateHistory"],
            "locks": ["Locks"],
            "logs": ["TaskLogs"],
            "reports": ["RunReports"],
            "runs": ["Runs"],
            "notes": ["Notes"],
            "sessions": ["Sessions"],
            "state": ["State"],
            "tasks": ["Tasks"],
        },
    )
