"""Decide whether leftovers may be deleted: worktrees, hubs, refs, files, logs.

Recovery at the start of a run and `council clean` both use `classify_worktree`, so that they are consistent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto

from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.statuses import FINAL_STATUSES

#: Seconds after which a temporary file is no longer in use; git commands that create one take a minute or two.
STALE_FILE_SECONDS = 3600.0


class WorktreeContents(StrEnum):
    """Whether the worktree of an attempt has content that exists nowhere else."""

    NOTHING = auto()  #: none: used by checks, or the content was collected
    UNSAVED = auto()  #: the attempt was interrupted before its content was collected
    KEPT = auto()  #: preserved on purpose: some files must not or could not be committed
    UNKNOWN = auto()  #: no matching attempt is recorded


def classify_worktree(document: TaskDocument | None, attempt: int, *, is_check: bool) -> WorktreeContents:
    """Classify a worktree by the state of its task (None: missing or damaged)."""
    if is_check:
        return WorktreeContents.NOTHING
    attempts = () if document is None else document.attempts
    recorded = next((each for each in attempts if each.number == attempt), None)
    if recorded is None:
        return WorktreeContents.UNKNOWN
    if recorded.is_kept:
        return WorktreeContents.KEPT
    return WorktreeContents.UNSAVED if recorded.ended is None else WorktreeContents.NOTHING


class LeftoverKind(StrEnum):
    """The kind of a leftover."""

    WORKTREE = auto()
    SLOT = auto()  #: a worktree slot of the pool
    REFS = auto()
    HUB = auto()
    TEMPORARY = auto()
    LOGS = auto()
    RUN = auto()  #: the record of a finished run, with its output


class LeftoverStatus(StrEnum):
    """Whether a leftover may be deleted."""

    LEFT_OVER = auto()  #: yes: nothing needs it, and no work is lost
    PRESERVED = auto()  #: only on request: it may have content that exists nowhere else
    READY = auto()  #: only on request: the next run starts faster with it
    NEEDED = auto()  #: no: its run can be resumed


@dataclass(frozen=True, slots=True)
class Leftover:
    """A leftover of a run; `name` is a path, a prefix of refs, or the id of a run."""

    kind: LeftoverKind
    name: str
    status: LeftoverStatus
    reason: str
    hub: str | None = None
    """The folder of the internal repositories to which it belongs."""
    run: str | None = None
    task: str | None = None
    bytes: int = 0
    """Its size on disk."""


_REASONS = {
    WorktreeContents.NOTHING: (LeftoverStatus.LEFT_OVER, "task finished, and its work is saved"),
    WorktreeContents.UNSAVED: (LeftoverStatus.PRESERVED, "interrupted, with unsaved work"),
    WorktreeContents.KEPT: (LeftoverStatus.PRESERVED, "contains files that are not in any commit"),
    WorktreeContents.UNKNOWN: (LeftoverStatus.PRESERVED, "no matching attempt is recorded"),
}


def assess_worktree(run: str, document: TaskDocument | None, contents: WorktreeContents) -> tuple[LeftoverStatus, str]:
    """Return the cleanup status of an inactive run's worktree, with the reason."""
    if document is None:
        return LeftoverStatus.PRESERVED, "the record of its task is damaged"
    if document.status not in FINAL_STATUSES:
        return LeftoverStatus.NEEDED, f"needed by `council resume {run}`"
    return _REASONS[contents]


def assess_orphan(contents: WorktreeContents) -> tuple[LeftoverStatus, str]:
    """Return the cleanup status of a worktree of a run without state, with the reason."""
    status = LeftoverStatus.LEFT_OVER if contents is WorktreeContents.NOTHING else LeftoverStatus.PRESERVED
    return status, "the state of its run no longer exists"


def assess_slot_state(*, is_clean: bool, has_session: bool) -> tuple[LeftoverStatus, str] | None:
    """Return the cleanup status of an unlocked worktree slot, with the reason.

    None if its session decides.
    """
    if is_clean:
        return LeftoverStatus.READY, "clean, for the next session"
    return None if has_session else (LeftoverStatus.LEFT_OVER, "not cleaned after its session ended")


def assess_hub(gone: str, refs: int | None, worktrees: int) -> tuple[LeftoverStatus, str]:
    """Return the cleanup status of an unusable hub, with the reason.

    `gone` names the deleted project; `refs` counts refs with unmerged work, None if unreadable.
    """
    if refs is None:
        return LeftoverStatus.PRESERVED, f"{gone} no longer exists; its repositories are unreadable"
    if refs or worktrees:
        return (
            LeftoverStatus.PRESERVED,
            f"{gone} no longer exists; unmerged work (refs: {refs}, worktrees: {worktrees})",
        )
    return LeftoverStatus.LEFT_OVER, f"{gone} no longer exists; no unmerged work"


def assess_run(
    run: str, ended: str, branches: int | None, worktrees: int, *, is_finished: bool, include_interrupted: bool
) -> tuple[LeftoverStatus, str]:
    """Return the cleanup status of an inactive run's record, with the reason.

    `ended` is the day on which it ended or was interrupted. `branches` counts branches with unmerged work (None:
    unreadable), `worktrees` worktrees that may have some. A run that can be resumed is deleted only with
    `include_interrupted`.
    """
    if not is_finished and not include_interrupted:
        return LeftoverStatus.NEEDED, f"can be continued: `council resume {run}`"
    when = f"{'ended' if is_finished else 'interrupted'} on {ended}"
    if branches is None:
        return LeftoverStatus.PRESERVED, f"{when}; its branches are unreadable"
    if branches or worktrees:
        return (
            LeftoverStatus.PRESERVED,
            f"{when}; unmerged work (branches: {branches}, worktrees: {worktrees})",
        )
    return LeftoverStatus.LEFT_OVER, f"{when}; no unmerged work"


def is_unchanged(earlier: Leftover, now: Leftover) -> bool:
    """Return True if a run has no new work since a decision about its record."""
    same_end = earlier.reason.partition(";")[0] == now.reason.partition(";")[0]
    return same_end and now.status in {earlier.status, LeftoverStatus.LEFT_OVER}


def is_stale_file(modified: float, now: float) -> bool:
    """Return True if a temporary file is too old to be in use.

    Times are wall-clock seconds.
    """
    return now - modified > STALE_FILE_SECONDS
