"""CLI Council: run AI coding CLIs concurrently on one git repository.

    async with Council.open("council.yaml") as council:
        report = await council.runs.run()

This module has the public Python API; `orchestrator.protocols` has the contracts for plugins. A council needs an
asyncio event loop; from synchronous code, start one with `asyncio.run(main())`.

Times are in seconds (timestamps: since the epoch), sizes in bytes, costs in US dollars. All errors are CouncilErrors:
ConfigError has all problems of a file or `Config`, RefusedError has the reason and the remedy. A failed task is not an
error, but part of the `RunReport`.

Each name is imported on first use.
"""

from __future__ import annotations

from orchestrator.lazy import lazy_names

# Not that of `typing`: each session's supervisor imports this module, and `typing` would slow its start by half.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from orchestrator.api.council import Council
    from orchestrator.api.topics.changes import PreservedWork
    from orchestrator.api.topics.logs import LogChunk
    from orchestrator.api.topics.state import ProjectPaths
    from orchestrator.api.transfer import adopt_state, copy_state
    from orchestrator.config.schema import AdapterSettings, Config, Task
    from orchestrator.domain.documents.conflicts import ConflictStrategy, DocumentUpdate
    from orchestrator.domain.documents.stored import LockInfo
    from orchestrator.domain.runs.statuses import TaskStatus
    from orchestrator.domain.sessions.contexts import SessionContext, SessionStatus, TaskSummary
    from orchestrator.domain.sessions.notes import Note
    from orchestrator.domain.sessions.predicted_conflicts import PredictedConflict
    from orchestrator.domain.settings.failures import FailureClass
    from orchestrator.domain.settings.run_settings import Backoff, SetupStep, TaskSettings, WorktreeSettings
    from orchestrator.domain.workflow.violations import Violation
    from orchestrator.engine.phases.verification import RunVerification, TaskVerification
    from orchestrator.engine.reports.report import (
        AdapterReport,
        OrchestratorReport,
        RunReport,
        RunStatus,
        SessionReport,
    )
    from orchestrator.engine.reports.task_details import TaskDetails
    from orchestrator.engine.reports.task_report import TaskReport
    from orchestrator.engine.scheduler.restore import RestoreResult
    from orchestrator.engine.session_api.details import SessionDetails
    from orchestrator.errors import (
        ConfigError,
        CouncilError,
        LockHeld,
        LockUnavailable,
        Problem,
        RefusedError,
        RequestTimeout,
        StateLost,
        StoreUnavailable,
        UnreadableDocument,
        VersionConflict,
    )
    from orchestrator.locking.lock_overview import LockLayer, LockParty, LockStatus
    from orchestrator.plugins import Plugins
    from orchestrator.protocols import Document, Event, Key, RecordedEvent, VerificationReport
    from orchestrator.state.documents.checkpoints import Checkpoint, RestorePlan
    from orchestrator.state.documents.conflicts import Conflict, ConflictResolution, UpdateResult
    from orchestrator.state.documents.log_reader import DocumentChange
    from orchestrator.state.transfer.copying import CopyResult

__all__ = [
    "AdapterReport",
    "AdapterSettings",
    "Backoff",
    "Checkpoint",
    "Config",
    "ConfigError",
    "Conflict",
    "ConflictResolution",
    "ConflictStrategy",
    "CopyResult",
    "Council",
    "CouncilError",
    "Document",
    "DocumentChange",
    "DocumentUpdate",
    "Event",
    "FailureClass",
    "Key",
    "LockHeld",
    "LockInfo",
    "LockLayer",
    "LockParty",
    "LockStatus",
    "LockUnavailable",
    "LogChunk",
    "Note",
    "OrchestratorReport",
    "Plugins",
    "PredictedConflict",
    "PreservedWork",
    "Problem",
    "ProjectPaths",
    "RecordedEvent",
    "RefusedError",
    "RequestTimeout",
    "RestorePlan",
    "RestoreResult",
    "RunReport",
    "RunStatus",
    "RunVerification",
    "SessionContext",
    "SessionDetails",
    "SessionReport",
    "SessionStatus",
    "SetupStep",
    "StateLost",
    "StoreUnavailable",
    "Task",
    "TaskDetails",
    "TaskReport",
    "TaskSettings",
    "TaskStatus",
    "TaskSummary",
    "TaskVerification",
    "UnreadableDocument",
    "UpdateResult",
    "VerificationReport",
    "VersionConflict",
    "Violation",
    "WorktreeSettings",
    "adopt_state",
    "copy_state",
]

if not TYPE_CHECKING:  # type checkers see the imports above, and report unknown names
    __getattr__ = lazy_names(
        __name__,
        {
            "api.council": ("Council",),
            "api.topics.changes": ("PreservedWork",),
            "api.topics.logs": ("LogChunk",),
            "api.topics.state": ("ProjectPaths",),
            "config.schema": ("AdapterSettings", "Config", "Task"),
            "domain.settings.run_settings": ("Backoff", "SetupStep", "TaskSettings", "WorktreeSettings"),
            "domain.documents.conflicts": ("ConflictStrategy", "DocumentUpdate"),
            "domain.sessions.contexts": ("SessionContext", "SessionStatus", "TaskSummary"),
            "domain.settings.failures": ("FailureClass",),
            "domain.runs.statuses": ("TaskStatus",),
            "domain.sessions.notes": ("Note",),
            "domain.sessions.predicted_conflicts": ("PredictedConflict",),
            "domain.workflow.violations": ("Violation",),
            "engine.phases.verification": ("TaskVerification", "RunVerification"),
            "engine.session_api.details": ("SessionDetails",),
            "engine.reports.report": ("AdapterReport", "OrchestratorReport", "RunReport", "RunStatus", "SessionReport"),
            "engine.scheduler.restore": ("RestoreResult",),
            "engine.reports.task_details": ("TaskDetails",),
            "engine.reports.task_report": ("TaskReport",),
            "errors": (
                "ConfigError",
                "CouncilError",
                "LockHeld",
                "LockUnavailable",
                "Problem",
                "RefusedError",
                "RequestTimeout",
                "StateLost",
                "StoreUnavailable",
                "UnreadableDocument",
                "VersionConflict",
            ),
            "domain.documents.stored": ("LockInfo",),
            "locking.lock_overview": ("LockLayer", "LockStatus", "LockParty"),
            "plugins": ("Plugins",),
            "protocols": ("Document", "Event", "Key", "RecordedEvent", "VerificationReport"),
            "state.documents.checkpoints": ("Checkpoint", "RestorePlan"),
            "state.documents.conflicts": ("UpdateResult", "Conflict", "ConflictResolution"),
            "state.transfer.copying": ("CopyResult",),
            "state.documents.log_reader": ("DocumentChange",),
            "api.transfer": ("adopt_state", "copy_state"),
        },
    )


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
