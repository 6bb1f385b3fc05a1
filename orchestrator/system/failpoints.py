"""Failpoints: named points, after each persisted or external step, where a crash test can end the process.

Disabled unless `COUNCIL_FAILPOINTS` is set when the process starts; even then an unarmed failpoint costs one dictionary
lookup. The syntax is `name=kill` or `name=kill@N` (the N-th time it is reached), separated by commas. `kill` sends
SIGKILL to this process: no `finally`, no flush, as when memory runs out. At `git.started` and `git.ended` it kills the
git command instead. `stop` sends SIGSTOP; the process continues on SIGCONT.
"""

from __future__ import annotations

import os
import re
import signal
from typing import Final

FAILPOINTS: Final = frozenset(
    {
        "git.starting",  # a git command is about to be started
        "git.started",  # the git command runs, and has done nothing or a part
        "git.ended",  # the git command has done all, and is killed before it reports success
        "run.seeded",  # the run and its tasks are in the store
        "run.leader_elected",  # this process is the run's owner, under a new epoch
        "claims.taken_over",  # this process has the claims of a gone orchestrator, whose work is not saved yet
        "run.finished",  # the run's end is in the store
        "run.removed",  # the documents of an old run are deleted
        "run.taken_over",  # this process is the run's owner, to restore a checkpoint
        "checkpoint.created",  # a checkpoint is in the store
        "checkpoint.restored",  # the state is as it was, in the store
        "attempt.recorded",  # the attempt is in the store, nothing of it exists yet
        "slot.partly_made",  # a slot's folder exists, its checkout does not
        "slot.moved",  # an acquired slot is at another commit than recorded
        "worktree.partly_made",  # the session's folder has its slot, and nothing else
        "worktree.created",  # the worktree is ready
        "session.spawned",  # the supervisor runs, the CLI perhaps
        "session.ended",  # all of the session's processes are gone, nothing is collected
        "work.staged",  # the agent's work is in our index
        "work.committed",  # the agent's work is a commit on the attempt's branch
        "adapter.cooling_down",  # the cooldown of an adapter is in the store
        "sink.sent",  # a sink has received events, the store does not know
        "request.recorded",  # a person's request is in the store
        "request.applied",  # the request was applied, but is still in the store
        "attempt.ended",  # the attempt's end is in the store, its worktree is still there
        "phase.checked",  # the `until` of a phase has been checked, the store does not know
        "handoff.taken",  # the handoff of a phase is read and valid, the store does not know
        "phase.finished",  # the store knows that no phase is left for a task
        "work.recorded",  # the store knows the commit: the task is queued
        "plan.subtasks",  # the tasks of a plan are in the store, the plan's task waits for them
        "worktree.removed",  # the session's folder is gone, its slot is not clean
        "slot.partly_clean",  # some of a session's changes in its slot are reverted
        "slot.clean",  # all of them are, but this is not recorded yet
        "landing.merged",  # the merge commit exists, nothing refers to it
        "landing.checking",  # the store knows that the merge is being checked
        "check.ended",  # a check's processes are gone, its worktree is still there
        "landing.checked",  # the merge has passed, the store does not know
        "base.checked",  # the checks of the base have ended, the store does not know
        "landing.rejected",  # the rejection is in the store
        "landing.intended",  # the intent is in the store
        "landing.pushed",  # the target has moved, the store does not know
        "landing.recorded",  # the task is landed in the store
        "legacy.begun",  # a part of an import from an older layout is in the store
        "legacy.imported",  # the whole import is in the store
        "state.appended",  # commits are at the end of the log, the end mark is not updated
        "state.published",  # the end mark is updated, subscribers are not notified
        "state.rolled",  # a new segment exists, and is empty
        "state.snapshot_staged",  # a new snapshot is complete, but not the current one
        "state.snapshot_written",  # the new snapshot is the current one
        "state.packed",  # a segment of the log exists twice, packed and unpacked
        "state.load_staged",  # a segment of a load is complete, others follow
        "state.load_finished",  # all segments of a load are complete, but not a log yet
        "state.loaded",  # the loaded segments are the log, in a folder of their own
        "state.load_put",  # a loaded segment is in its final folder
        "state.pruned",  # the rest of old segments exists next to these
        "views.written",  # new views are complete, but not in their place
        "views.replaced",  # new views are in use, the old ones still exist
        "recovery.session_reaped",  # the processes of an interrupted attempt are gone
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
    """Arm exactly the failpoints in `spec`. Raises ValueError for invalid syntax or unknown names."""
    armed = _parse(spec)
    _armed.clear()
    _armed.update(armed)


def is_triggered(name: str) -> bool:
    """Return whether a crash test armed this failpoint for this time."""
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
