"""Named places where a crash test may end the process: after each persisted or outward step.

Off unless `COUNCIL_FAILPOINTS` is set when the process starts, and then one dictionary look-up is all that a
disarmed one costs. The syntax is `name=kill` or `name=kill@N` (at the N-th time it is reached), separated by
commas. `kill` is SIGKILL to ourselves: no `finally`, no flush, as when the machine's memory runs out. At `git.started`
and `git.ended` it is the git command that is killed. `stop` in its place is SIGSTOP: we continue at SIGCONT.
"""

from __future__ import annotations

import os
import re
import signal
from typing import Final

FAILPOINTS: Final = frozenset(
    {
        "git.starting",  # a git command is about to be started
        "git.started",  # it is, and has done nothing or a part
        "git.ended",  # it has done all, and is killed before it says so
        "run.seeded",  # the run and its tasks are in the store
        "run.leader_elected",  # this process is the run's owner, under a new epoch
        "claims.taken_over",  # the claims of an orchestrator that is gone are this one's, nothing of its work is saved
        "run.finished",  # the run's end is in the store
        "run.removed",  # the documents of an old run are deleted
        "run.taken_over",  # this process is the run's owner, to restore a checkpoint
        "checkpoint.created",  # a checkpoint is in the store
        "checkpoint.restored",  # the state is as it was, in the store
        "attempt.recorded",  # the attempt is in the store, nothing of it exists yet
        "slot.partly_made",  # a place's folder exists, its checkout does not
        "slot.moved",  # a place that was taken is at another commit than recorded
        "worktree.partly_made",  # the session's folder has its place, and nothing else
        "worktree.created",  # the worktree is ready
        "session.spawned",  # the supervisor runs, the CLI perhaps
        "session.ended",  # all of the session's processes are gone, nothing is collected
        "work.staged",  # what the agent left is in our index
        "work.committed",  # it is a commit on the attempt's branch
        "adapter.cooling_down",  # the store knows that an adapter can't be used now
        "sink.sent",  # a sink has got events, the store does not know
        "request.recorded",  # a person's request is in the store
        "request.applied",  # it was done, the store still asks for it
        "attempt.ended",  # the attempt's end is in the store, its worktree is still there
        "phase.checked",  # what a phase is done until has been tried, the store does not know
        "handoff.taken",  # what a phase handed over is read and valid, the store does not know
        "phase.finished",  # the store knows that no phase is left for a task
        "work.recorded",  # the store knows the commit: the task is queued
        "plan.expanded",  # what a plan became are tasks in the store, its own task waits for them
        "worktree.removed",  # the session's folder is gone, its place is not clean
        "slot.partly_clean",  # some of what a session changed in its place is as it was before
        "slot.clean",  # all of it is, nobody knows yet
        "landing.merged",  # the merge commit exists, nothing refers to it
        "landing.checking",  # the store knows that the merge is being checked
        "check.ended",  # a check's processes are gone, its worktree is still there
        "landing.checked",  # the merge has passed, the store does not know
        "base.checked",  # the checks of the base have ended, the store does not know
        "landing.rejected",  # the store knows that it does not pass
        "landing.intended",  # the intent is in the store
        "landing.pushed",  # the target has moved, the store does not know
        "landing.recorded",  # the task is landed in the store
        "legacy.begun",  # a part of what is imported from an older layout is in the store
        "legacy.imported",  # all of it is
        "state.appended",  # commits stand at the end of the log, the mark does not say so
        "state.published",  # it does, and nobody was told
        "state.rolled",  # a new segment is there, with nothing in it
        "state.snapshot_staged",  # a snapshot is whole, beside the one that counts
        "state.snapshot_written",  # it counts
        "state.packed",  # a segment of the log is there twice, packed and not
        "state.load_staged",  # a segment of what is loaded is whole, others are to come
        "state.load_finished",  # all of them are, they are no log yet
        "state.loaded",  # they count, in a folder of their own
        "state.load_put",  # a segment of them is in its place
        "state.pruned",  # what is left of old segments is there, and so are they
        "views.written",  # views are up to date, and do not say so
        "views.replaced",  # views made anew are in their place, the old ones are still there
        "recovery.session_reaped",  # a cut-off attempt's processes are gone
        "recovery.attempt_returned",  # that attempt's task waits again
        "recovery.landing_settled",  # a cut-off landing was finished or undone
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
    """Arm what `spec` names, and nothing else. Raises ValueError for what it does not understand."""
    armed = _parse(spec)
    _armed.clear()
    _armed.update(armed)


def is_triggered(name: str) -> bool:
    """Whether a crash test asked for a signal here, at this time."""
    if not _armed or name not in _armed:
        return False
    left, number = _armed[name]
    _armed[name] = left - 1, number
    return left == 1


def failpoint(name: str) -> None:
    """Die or stop here if a crash test asked for it; otherwise nothing."""
    if is_triggered(name):
        os.kill(os.getpid(), _armed[name][1])


arm(os.environ.get("COUNCIL_FAILPOINTS", ""))
