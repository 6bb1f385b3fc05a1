"""The leftovers of a run that may be deleted, determined from facts alone."""

from __future__ import annotations

import pytest

from orchestrator.domain.runs.leftovers import (
    STALE_FILE_SECONDS,
    LeftoverStatus,
    WorktreeContents,
    assess_hub,
    assess_orphan,
    assess_worktree,
    classify_worktree,
    is_stale_file,
)
from orchestrator.domain.runs.model import Attempt, TaskDocument
from orchestrator.domain.runs.statuses import FINAL_STATUSES, TaskStatus
from orchestrator.domain.settings.quantities import format_size_short


def document(status: TaskStatus = TaskStatus.FAILED) -> TaskDocument:
    """Return a task with ended, interrupted and preserved attempts."""
    attempts = (
        Attempt(number=1, adapter="x", base="b", started=1.0, ended=2.0),
        Attempt(number=2, adapter="x", base="b", started=3.0),
        Attempt(number=3, adapter="x", base="b", started=5.0, ended=6.0, is_kept=True),
    )
    return TaskDocument(status=status, attempts=attempts)


@pytest.mark.parametrize(
    ("attempt", "is_check", "held"),
    [
        (1, False, WorktreeContents.NOTHING),
        (2, False, WorktreeContents.UNSAVED),
        (3, False, WorktreeContents.KEPT),
        (4, False, WorktreeContents.UNKNOWN),
        (3, True, WorktreeContents.NOTHING),
        (4, True, WorktreeContents.NOTHING),
    ],
)
def test_worktree_is_classified(attempt: int, is_check: bool, held: WorktreeContents) -> None:
    """No finding for collected worktrees and those of checks; without a record the state is unknown."""
    assert classify_worktree(document(), attempt, is_check=is_check) is held
    assert classify_worktree(None, attempt, is_check=is_check) is (
        WorktreeContents.NOTHING if is_check else WorktreeContents.UNKNOWN
    )


@pytest.mark.parametrize("held", WorktreeContents)
@pytest.mark.parametrize("status", TaskStatus)
def test_only_saved_work_of_ended_tasks_is_removed(status: TaskStatus, held: WorktreeContents) -> None:
    """Leftovers that a resume needs are never removed, and unsaved work only on request."""
    verdict, _ = assess_worktree("run", document(status), held)
    assert (verdict is LeftoverStatus.NEEDED) == (status not in FINAL_STATUSES)
    assert (verdict is LeftoverStatus.LEFT_OVER) == (status in FINAL_STATUSES and held is WorktreeContents.NOTHING)
    assert assess_worktree("run", None, held)[0] is LeftoverStatus.PRESERVED
    assert (assess_orphan(held)[0] is LeftoverStatus.LEFT_OVER) == (held is WorktreeContents.NOTHING)


@pytest.mark.parametrize(("refs", "worktrees"), [(1, 0), (0, 1), (None, 0)])
def test_hub_with_work_is_kept(refs: int | None, worktrees: int) -> None:
    """And if its state is unknown."""
    assert assess_hub("/r/.git", refs, worktrees)[0] is LeftoverStatus.PRESERVED
    assert assess_hub("/r/.git", 0, 0)[0] is LeftoverStatus.LEFT_OVER


def test_recent_leftover_is_not_stale() -> None:
    """Nor is one with a time in the future, after a clock jump."""
    assert is_stale_file(1000.0, 1001.0 + STALE_FILE_SECONDS)
    assert not is_stale_file(1000.0, 999.0 + STALE_FILE_SECONDS)
    assert not is_stale_file(1000.0, 500.0)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "1.0KB"),
        (4096, "4.1KB"),
        (9960, "10KB"),
        (999_499, "999KB"),
        (999_500, "1.0MB"),
        (250_000_000, "250MB"),
        (3 * 10**15, "3000TB"),
    ],
)
def test_sizes_are_formatted(size: int, shown: str) -> None:
    """Two or three digits and a unit."""
    assert format_size_short(size) == shown
