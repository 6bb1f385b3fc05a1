"""Failpoints: named points at which crash tests kill the process.

Each persisted or external step has one. They are disabled unless `COUNCIL_FAILPOINTS` is set when the process starts;
even then, an unarmed failpoint costs only a dictionary lookup. The syntax is `name=kill` or `name=kill@N` (the N-th
time it is reached), separated by commas. `kill` sends SIGKILL to this process: no `finally`, no flush, as when memory
runs out. At `git.started` and `git.ended` it kills the git command instead. `stop` sends SIGSTOP; the process continues
on SIGCONT.
"""

from __future__ import annotations

import os
import re
import signal
from typing import Final

FAILPOINTS: Final = frozenset(
    {
        "git.starting",  # a git command is about to be started
        "git.started",  # the git command is running and has done nothing or part of its work
        "git.ended",  # the git command has done its work, and is killed before it reports success
        "run.seeded",  # the run and its tasks are in the store
        "run.extended",  # new tasks of trackers are in the store
        "run.leader_elected",  # this process owns the run, with a new epoch
        "claims.taken_over",  # this process has taken the claims of a dead orchestrator, whose work is not saved yet
        "run.finished",  # the run's end is in the store
        "run.removed",  # the documents of an old run are deleted
        "run.taken_over",  # this process owns the run, to restore a checkpoint
        "checkpoint.created",  # a checkpoint is in the store
        "checkpoint.restored",  # the restored state is in the store
        "attempt.recorded",  # the attempt is in the store, but nothing else of it exists yet
        "slot.partly_made",  # a slot's folder exists, but not its checkout
        "slot.moved",  # an acquired slot is at a commit that is not recorded
        "worktree.partly_made",  # the session's folder has its slot and nothing else
        "worktree.created",  # the worktree is ready
        "session.spawned",  # the supervisor is running, the CLI possibly
        "session.ended",  # all of the session's processes have exited, nothing is collected
        "work.staged",  # the agent's work is in our index
        "work.committed",  # the agent's work is a commit on the attempt's branch
        "adapter.cooling_down",  # the cooldown of an adapter is in the store
        "sink.sent",  # a sink has received events, not recorded in the store
        "request.recorded",  # a user's request is in the store
        "message.sent",  # a user's message to a task is in the store
        "message.withdrawing",  # a message came after its task was queued or ended, and is about to be withdrawn
        "message.delivered",  # it is recorded that a running session received it; the session has no answer yet
        "attachment.recorded",  # it is in the store that a user attaches to a task; its session may still run
        "request.applied",  # the request was applied, but is still in the store
        "attempt.ended",  # the attempt's end is in the store, its worktree is still there
        "phase.checked",  # the `until` of a phase has been checked, not recorded in the store
        "handoff.taken",  # the handoff of a phase is read and valid, not recorded in the store
        "phase.finished",  # the store records that a task has no phase left
        "shared_work.pushed",  # a commit is at the remote of a run that spans machines, not recorded in the store
        "work.recorded",  # the store records the commit: the task is queued
        "plan.subtasks",  # a plan's tasks are in the store, and the plan's own task waits for them
        "worktree.removed",  # the session's folder is removed, its slot is not clean
        "slot.partly_clean",  # some of a session's changes in its slot are reverted
        "slot.clean",  # all of them are reverted, but this is not recorded yet
        "landing.merged",  # the merge commit exists, but nothing refers to it
        "landing.checking",  # the store records that the merge is being checked
        "check.leased",  # checks are leased to this process, and have not begun
        "check.ended",  # a check's processes have exited, its worktree still exists
        "check.recorded",  # a passed check is recorded and its lease released, its worktree still exists
        "landing.joined",  # the merges of a batch are one merge, no intent is recorded
        "landing.checked",  # the merge has passed its checks, not recorded in the store
        "base.checked",  # the checks of the base have ended, not recorded in the store
        "stack.rebased",  # a task's work is rebased onto the new work of another task, not recorded in the store
        "stack.recorded",  # the store records the rebase
        "stack.withdrawn",  # the store records that a task waits, because another task ended whose work it is built on
        "landing.rejected",  # the rejection is in the store
        "landing.intended",  # the intent is in the store
        "landing.pushed",  # the target has moved, not recorded in the store
        "landing.recorded",  # the task is landed in the store
        "pull_request.pushed",  # the branch of a pull request is pushed, which is not open yet
        "pull_request.opened",  # the pull request is open, not recorded in the store
        "pull_request.recorded",  # the store records that the pull request is open
        "pull_request.continued",  # the store records that a task continues for its pull request
        "pull_request.cancelled",  # the request to cancel the task of a closed pull request is in the store
        "legacy.begun",  # part of an import from an earlier state format is in the store
        "legacy.imported",  # the whole import is in the store
        "state.appended",  # commits are at the end of the log, the end marker is not updated
        "state.published",  # the end marker is updated, subscribers are not notified
        "state.rolled",  # a new segment exists and is empty
        "state.snapshot_staged",  # a new snapshot is complete, but not the current one
        "state.snapshot_written",  # the new snapshot is the current one
        "state.packed",  # a segment of the log exists twice, packed and unpacked
        "state.load_staged",  # a segment of a load is complete, others follow
        "state.load_finished",  # all segments of a load are complete, but are not a log yet
        "state.loaded",  # the loaded segments are the log, in a separate folder
        "state.load_put",  # a loaded segment is in its final folder
        "state.pruned",  # the pruned rest of old segments exists next to these
        "views.written",  # new views are complete, but not in their final location
        "views.replaced",  # new views are in use, the old ones still exist
        "recovery.session_reaped",  # the processes of an interrupted attempt have exited
        "recovery.attempt_returned",  # the task of an interrupted attempt is pending again
        "recovery.landing_settled",  # an interrupted landing was finished or undone
    }
)

_ARMED_SPEC = re.compile(r"([a-z_.]+)=(kill|stop)(?:@([1-9][0-9]*))?")


_SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def _parse(spec: str) -> dict[str, tuple[int, signal.Signals]]:
    armed = {}
    for part in filter(None, spec.split(",")):
        match = _ARMED_SPEC.fullmatch(part)
        if match is None or match[1] not in FAILPOINTS:
            raise ValueError(f"COUNCIL_FAILPOINTS: {part!r} is not NAME=kill[@N] or NAME=stop[@N] with a known NAME")
        armed[match[1]] = int(match[3] or 1), _SIGNALS[match[2]]
    return armed


_armed: Final = dict[str, tuple[int, signal.Signals]]()


def arm(spec: str) -> None:
    """Arm exactly the failpoints in `spec`. Raises ValueError if it is invalid."""
    armed = _parse(spec)
    _armed.clear()
    _armed.update(armed)


def is_triggered(name: str) -> bool:
    """Return whether a crash test armed this failpoint for the current call."""
    if not _armed or name not in _armed:
        return False
    left, number = _armed[name]
    _armed[name] = left - 1, number
    return left == 1


def failpoint(name: str) -> None:
    """Kill or stop this process if a crash test armed the failpoint."""
    if is_triggered(name):
        os.kill(os.getpid(), _armed[name][1])


arm(os.environ.get("COUNCIL_FAILPOINTS", ""))
