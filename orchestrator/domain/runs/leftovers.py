"""What is left over and may go: worktrees, repositories of our own, refs, temporary files, logs. Judged by facts alone.

Recovery at a run's start and cleaning later ask the same `holding`, so that they agree on what may be deleted.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto

from orchestrator.domain.runs.model import FINAL_STATUSES, TaskDocument

#: Seconds after which a temporary file is of nobody who lives; each git command that makes one has a minute or two.
STALE_FILE_SECONDS = 3600.0


class WorktreeContents(StrEnum):
    """What the worktree of an attempt holds that is nowhere else."""

    NOTHING = auto()  #: it is of checks, or what it held was collected
    UNSAVED = auto()  #: its attempt was cut off before that
    KEPT = auto()  #: it stays on purpose: it holds what may not or could not be committed
    UNKNOWN = auto()  #: no attempt is recorded that it could be of


def classify_worktree(document: TaskDocument | None, attempt: int, *, is_check: bool) -> WorktreeContents:
    """Tell what a worktree holds, by the state of its task (None: that is missing or damaged)."""
    if is_check:
        return WorktreeContents.NOTHING
    attempts = () if document is None else document.attempts
    found = next((one for one in attempts if one.number == attempt), None)
    if found is None:
        return WorktreeContents.UNKNOWN
    if found.is_kept:
        return WorktreeContents.KEPT
    return WorktreeContents.UNSAVED if found.ended is None else WorktreeContents.NOTHING


class LeftoverKind(StrEnum):
    """What something that is left over is."""

    WORKTREE = auto()
    PLACE = auto()  #: a checkout that sessions took turns in
    REFS = auto()
    HUB = auto()
    TEMPORARY = auto()
    LOGS = auto()
    RUN = auto()  #: the record of one that is over, with what it printed


class LeftoverStatus(StrEnum):
    """Whether something may go."""

    LEFT_OVER = auto()  #: nothing needs it, and nothing in it is lost
    KEPT = auto()  #: only if that is asked for: it holds what may be nowhere else
    READY = auto()  #: only if that is asked for: the next run begins sooner with it
    NEEDED = auto()  #: no: the run that it is of can be resumed


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that a run left: `place` is its path, for refs what they begin with."""

    kind: LeftoverKind
    place: str
    standing: LeftoverStatus
    reason: str
    hub: str | None = None
    """The folder of the repositories of our own that it is in."""
    run: str | None = None
    task: str | None = None
    bytes: int = 0
    """What it takes on disk."""


_REASONS = {
    WorktreeContents.NOTHING: (LeftoverStatus.LEFT_OVER, "its task is over, and what it held is saved"),
    WorktreeContents.UNSAVED: (LeftoverStatus.KEPT, "it was cut off, and what it holds is not saved"),
    WorktreeContents.KEPT: (LeftoverStatus.KEPT, "it holds what is in no commit"),
    WorktreeContents.UNKNOWN: (LeftoverStatus.KEPT, "no attempt is recorded that it could be of"),
}


def judge_worktree(run: str, document: TaskDocument | None, held: WorktreeContents) -> tuple[LeftoverStatus, str]:
    """Return whether the worktree of a run that nobody is at work in may go, and why."""
    if document is None:
        return LeftoverStatus.KEPT, "the record of its task is damaged"
    if document.status not in FINAL_STATUSES:
        return LeftoverStatus.NEEDED, f"`council resume {run}` goes on from it"
    return _REASONS[held]


def judge_orphan(held: WorktreeContents) -> tuple[LeftoverStatus, str]:
    """Return whether the worktree of a run that no state knows any more may go, and why."""
    standing = LeftoverStatus.LEFT_OVER if held is WorktreeContents.NOTHING else LeftoverStatus.KEPT
    return standing, "the state of its run does not exist any more"


def judge_slot(*, is_clean: bool, has_session: bool) -> tuple[LeftoverStatus, str] | None:
    """Return whether a place that nobody has the lock of may go, and why; None if its session decides about that."""
    if is_clean:
        return LeftoverStatus.READY, "clean, for the next session"
    return None if has_session else (LeftoverStatus.LEFT_OVER, "its session is gone, and nobody cleaned it")


def judge_hub(gone: str, refs: int | None, worktrees: int) -> tuple[LeftoverStatus, str]:
    """Return whether repositories of our own that nobody can use any more may go, and why.

    `gone` is what they were for; `refs` counts those that keep work, None if they can't be read.
    """
    if refs is None:
        return LeftoverStatus.KEPT, f"{gone} is gone; what it holds can't be read"
    if refs or worktrees:
        return LeftoverStatus.KEPT, f"{gone} is gone; it holds work (refs: {refs}, worktrees: {worktrees})"
    return LeftoverStatus.LEFT_OVER, f"{gone} is gone, and it holds no work"


def judge_run(
    run: str, ended: str, branches: int | None, worktrees: int, *, is_over: bool, even_cut_off: bool
) -> tuple[LeftoverStatus, str]:
    """Return whether the record of a run that nobody is at work in may go, and why.

    `ended` is the day on which it did, or was cut off, `branches` counts those that keep work (None: they can't be
    read), `worktrees` those of which the same may be true. One that can be resumed goes only if that is wanted
    (`even_cut_off`).
    """
    if not is_over and not even_cut_off:
        return LeftoverStatus.NEEDED, f"`council resume {run}` goes on with it"
    when = f"it {'ended' if is_over else 'was cut off'} on {ended}"
    if branches is None:
        return LeftoverStatus.KEPT, f"{when}; what it holds can't be read"
    if branches or worktrees:
        return (
            LeftoverStatus.KEPT,
            f"{when}; it holds work that did not land (branches: {branches}, worktrees: {worktrees})",
        )
    return LeftoverStatus.LEFT_OVER, f"{when}; it holds no work that did not land"


def is_unchanged(judged: Leftover, now: Leftover) -> bool:
    """Whether a run's record that was judged may still go: nothing has come to it, though work of it may be gone."""
    same_end = judged.reason.partition(";")[0] == now.reason.partition(";")[0]
    return same_end and now.standing in {judged.standing, LeftoverStatus.LEFT_OVER}


def is_stale_file(modified: float, now: float) -> bool:
    """Whether a temporary file that was last changed then is of nobody who lives (wall-clock seconds)."""
    return now - modified > STALE_FILE_SECONDS
