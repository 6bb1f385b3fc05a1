"""What a person asks of a run from another process: recorded in the store, dealt with by the run's owner."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping, Sequence
from typing import Final

from orchestrator.config.model import TaskSpec
from orchestrator.domain.runs.lifecycle import TRANSITIONS, Trigger
from orchestrator.domain.runs.model import (
    FINAL_STATUSES,
    RETRYABLE_STATUSES,
    RequestAction,
    RunDocument,
    RunRequest,
    TaskDocument,
    TaskStatus,
)
from orchestrator.domain.runs.phases import PhaseTrigger
from orchestrator.domain.security.secrets import has_secret_key
from orchestrator.domain.workflow.routing import Phase, change_last_visit, find_first_incomplete, restart_task
from orchestrator.domain.workflow.violations import Violation
from orchestrator.engine.phases.expansion import (
    describe_expansion,
    expand_task,
    expansion_changes,
    landed_parts,
    superseded_parts,
)
from orchestrator.engine.phases.prompts import render_rejection
from orchestrator.engine.reports.report import RunRecord
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.merge_run import MERGE_TASK
from orchestrator.engine.state.records import request_key
from orchestrator.engine.state.reload import TASKS_KEY
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import ClaimLost, RefusedError, VersionConflict
from orchestrator.protocols import Commit, Event, Store, Write
from orchestrator.repo.worktrees.hub import work_branch_name
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: Characters of what a person says of what they approve or reject.
MAX_NOTE_LENGTH: Final = 10_000
#: States in which a task takes over what its file says and stays: an attempt or a landing of it reads that later.
_RELOADED: Final = frozenset({TaskStatus.PENDING, TaskStatus.QUEUED})
#: Another orchestrator has just begun a task, or ended it.
_OVERTAKEN: Final = (ClaimLost, VersionConflict)


def check_request(
    action: RequestAction,
    tasks: Sequence[str],
    record: RunRecord,
    *,
    even_waiting: bool = False,
    is_live: bool,
) -> None:
    """Refuse what can't be done for tasks in their present state; `is_live`: a process is active in the run.

    A retry accepts blocked tasks together with the failed ones that they need. With `even_waiting` also tasks that wait
    to start or to land, for a reload that leaves them in their state.
    """
    if action is RequestAction.RETRY and record.run.merges is not None:
        raise _explain_merge_retry(record.run, record.tasks[MERGE_TASK].status)
    blocked = record.blocked() if action is RequestAction.RETRY else {}
    for task in tasks:
        status = record.tasks[task].status
        if action in {RequestAction.APPROVE, RequestAction.REJECT}:
            if status is not TaskStatus.WAITING:
                what = f"task {task!r} does not wait for approval (state: {status})"
                raise RefusedError(what, "`council status` names those that do")
        elif action is not RequestAction.RETRY:
            if status in FINAL_STATUSES and action is not RequestAction.CANCEL:  # nothing is left to cancel
                state = status.replace("_", " ")
                raise RefusedError(f"task {task!r} has already ended (state: {state})", f"there is nothing to {action}")
        elif task in blocked:
            missing = [need for need in record.failed_needs(task) if need not in tasks]
            if missing:
                what = f"task {task!r} waits for {', '.join(map(repr, missing))}, which did not land"
                raise RefusedError(what, f"`council retry {' '.join(map(shlex.quote, missing))}`")
        elif status not in RETRYABLE_STATUSES and not (even_waiting and status in _RELOADED):
            raise _explain_not_retryable(task, status, may_reload=TASKS_KEY not in record.run.given, is_live=is_live)


def _explain_merge_retry(run: RunDocument, status: TaskStatus) -> RefusedError:
    """Return why the task of a merge run can't be retried, and how to merge again."""
    if status is TaskStatus.LANDED:
        return RefusedError(f"run {run.merges} is merged into {run.target!r}", "there is nothing to retry")
    remedy = f"`council merge {run.merges}` merges again"
    if status is TaskStatus.CONFLICT:
        branch = f"council/{run.merges}"
        remedy = f"`git switch {branch} && git merge {run.target}`, resolve the conflicts, commit; then {remedy}"
    return RefusedError(f"run {run.id} is a merge of run {run.merges}, which starts no session", remedy)


def _explain_not_retryable(task: str, status: TaskStatus, *, may_reload: bool, is_live: bool) -> RefusedError:
    """Return why a task that is not blocked can't be tried again, and what to do instead."""
    match status:
        case TaskStatus.LANDED:
            return RefusedError(f"task {task!r} has landed", "revert its commit and start a new run to do it again")
        case TaskStatus.DONE:
            return RefusedError(f"task {task!r} is done", "start a new run to do it again")
        case TaskStatus.WAITING:
            remedy = f"`council approve {task}`, or `council reject {task}` has its phase done again"
            return RefusedError(f"task {task!r} waits for approval", remedy)
    remedy = "cancel it first, or wait"
    if not is_live:
        remedy = "no process is active in the run: `council resume` continues it"
        if may_reload and status in _RELOADED:
            remedy += f" (with changes of the file: `council retry {shlex.quote(task)} --reload` first)"
    return RefusedError(f"task {task!r} has not ended (state: {status})", remedy)


def check_reopening(record: RunRecord, adapters: Sequence[str], now: float) -> Sequence[str]:
    """Return those of a run's adapters that are to be reopened: the named ones, or all that can't be used now.

    RefusedError for one that the run does not have, and where there is nothing to reopen.
    """
    shut = {name for name, one in record.adapters.items() if one.closed is not None or (one.parked_until or 0.0) > now}
    known = ", ".join(record.run.adapters)
    for name in adapters:
        if name not in record.run.adapters:
            raise RefusedError(f"run {record.run.id} has no adapter {name!r}", f"name one of: {known}")
        if name not in shut:
            raise RefusedError(f"adapter {name!r} of run {record.run.id} is in use", "there is nothing to reopen")
    if not shut:
        raise RefusedError(f"no adapter of run {record.run.id} is stopped or paused", "there is nothing to reopen")
    return list(adapters) or sorted(shut)


def check_reason(reason: str) -> None:
    """Refuse what says nothing, and what may not be recorded."""
    if not reason.strip():
        raise RefusedError("the reason is empty", "say why nobody is to try the task")
    if has_secret_key(reason):
        raise RefusedError("the reason holds what looks like a secret key, and is recorded", "leave it out")


def check_note(note: str | None) -> None:
    """Refuse what may not be recorded, and what would be too much to tell a session."""
    if note is None:
        return
    if not note.strip():
        raise RefusedError("the note is empty", "say something, or leave `--note` out")
    if len(note) > MAX_NOTE_LENGTH:
        raise RefusedError(f"the note has {len(note)} characters", f"say it in {MAX_NOTE_LENGTH}")
    if has_secret_key(note):
        raise RefusedError("the note holds what looks like a secret key, and is recorded", "leave it out")


def check_phase(task: str, phase: str, known: Sequence[str], document: TaskDocument) -> None:
    """Refuse to go on from a phase that is none of those `known` of a task, or that others have to precede."""
    if phase not in known:
        remedy = f"name one of: {', '.join(known)}" if known else "it has no workflow: leave `--from` out"
        raise RefusedError(f"task {task!r} has no phase {phase!r}", remedy)
    left = find_first_incomplete(known, phase, document)
    if left is not None:
        what = f"phase {left!r} of task {task!r} comes before {phase!r} and is not complete"
        raise RefusedError(what, f"`council retry {task} --from {left}`")


async def submit_request(
    store: Store,
    clock: Clock,
    run: str,
    action: RequestAction,
    tasks: Sequence[str],
    reason: str | None = None,
    phase: str | None = None,
    adapters: Sequence[str] = (),
) -> RunRequest:
    """Record a request; whoever owns the run, or does so next, deals with it."""
    asked = RunRequest(
        id=secrets.token_hex(4),
        action=action,
        tasks=tuple(tasks),
        asked=clock.now(),
        reason=reason,
        phase=phase,
        adapters=tuple(adapters),
    )
    event = Event("request.submitted", {"run": run, "request": asked.id, "action": str(action), "tasks": list(tasks)})
    await store.commit(Commit([Write(request_key(run, asked.id), 0, asked.model_dump(mode="json"))], [event]))
    failpoint("request.recorded")
    return asked


async def is_answered(store: Store, run: str, request: RunRequest) -> bool:
    """Whether a request has been dealt with."""
    return await store.get(request_key(run, request.id)) is None


async def apply_request(ledger: Ledger, request: RunRequest) -> None:
    """Do what was asked of a run in which this process is at nothing; others may be."""
    for task in request.tasks:
        match request.action:
            case RequestAction.RETRY:
                for part in await parts_to_cancel(ledger, task, request.phase):
                    await cancel_task(ledger, part)
                await retry_task(ledger, task, request.phase)
            case RequestAction.APPROVE:
                await approve_phase(ledger, task, request.reason)
            case RequestAction.REJECT:
                await reject_phase(ledger, task, request.reason)
            case _:
                await cancel_task(ledger, task)
    await record_ignored(ledger, request)
    for adapter in request.adapters:
        await ledger.reopen(adapter)
    failpoint("request.applied")
    await ledger.answer(request)


async def cancel_task(ledger: Ledger, task: str) -> bool:
    """End a task that waits for a session or to land, or is another orchestrator's; what it built stays on its branch.

    False if it is over, or being landed: whoever has begun that brings it to its end.
    """
    while await _is_ours_to_cancel(ledger, task):
        document = ledger.task(task)
        branch, reason = document.branch, "on request"
        if document.commit is not None:
            branch = work_branch_name(ledger.run.id, task, str(document.building_attempt.number))
        facts = {"reason": reason, "branch": branch}
        try:
            await ledger.change(task, Trigger.CANCEL, facts, **facts)
        except _OVERTAKEN:
            await ledger.refresh(task)
        else:
            return True
    return False


async def _is_ours_to_cancel(ledger: Ledger, task: str) -> bool:
    """Whether a task can be cancelled where it is now; it is taken from whoever has it."""
    while (ledger.task(task).status, Trigger.CANCEL) in TRANSITIONS:
        if not ledger.is_claimed_elsewhere(task):
            return True
        if not await ledger.claim(task, is_asked=True) and ledger.is_claimed_elsewhere(task):
            return False
    return False


async def record_ignored(ledger: Ledger, request: RunRequest) -> None:
    """Note of tasks that were cancelled why nobody is to try them; what has landed by then has."""
    for task in request.tasks if request.action is RequestAction.IGNORE else ():
        if ledger.task(task).status is TaskStatus.CANCELLED:
            changes = {"reason": f"ignored: {request.reason}", "ignored": request.reason}
            await ledger.change(task, Trigger.IGNORE, {"reason": request.reason}, **changes)


async def parts_to_cancel(ledger: Ledger, task: str, phase: str | None) -> tuple[str, ...]:
    """Return what of an earlier plan is to be cancelled where a task is tried again from a phase on."""
    document = ledger.task(task)
    if document.status not in RETRYABLE_STATUSES:
        return ()
    return superseded_parts(ledger, ledger.workflow((await ledger.spec(task)).workflow), document, phase)


async def retry_task(ledger: Ledger, task: str, phase: str | None = None) -> bool:
    """Have a task that is over tried again, from a phase on, with all of its attempts before it; False if it is not."""
    workflow = ledger.workflow((await ledger.spec(task)).workflow)
    work = {"commit": None, "built": None, "start": None, "base": None, "feedback": None}
    while (document := ledger.task(task)).status in RETRYABLE_STATUSES:
        again = restart_task(workflow, document, phase)
        if superseded_parts(ledger, workflow, document, phase):
            again["expanded"] = landed_parts(ledger, document)
        fresh = {"refused": None, "failures": 0, "bounces": 0, "revived": len(document.phases), "reason": None, "paths": ()}
        try:
            await ledger.change(task, Trigger.REVIVE, {}, ignored=None, **fresh, **work, **again)
        except _OVERTAKEN:
            await ledger.refresh(task)
        else:
            return True
    return False


async def approve_phase(ledger: Ledger, task: str, note: str | None) -> bool:
    """Let a task go on from what a person has approved; False if it waits for nobody."""
    document, spec = ledger.task(task), await ledger.spec(task)
    if document.status is not TaskStatus.WAITING:
        return False
    workflow = ledger.workflow(spec.workflow)
    phase = workflow.phase(document.phases[-1].phase)
    tasks = await _expand_approved_plan(ledger, task, spec, phase)
    if isinstance(tasks, Sequence):  # what the run has come to meanwhile is in its way
        return await reject_phase(ledger, task, "; ".join(map(str, tasks)))
    following = workflow.after(phase.name)
    phases = change_last_visit(document, PhaseTrigger.APPROVE, note=note)
    changes = {"phases": phases, "phase": following[0].name if following else None, "reason": None}
    changes |= expansion_changes(ledger, task, tasks)
    facts = {"phase": phase.name, "note": note}
    events = [("task.expanded", {"task": task, **describe_expansion(phase, tasks)})] if tasks else []
    update = TaskUpdate(facts, changes, events=events, tasks=tasks)
    await ledger.change_all(Trigger.APPROVE, {task: update})
    return True


async def _expand_approved_plan(
    ledger: Ledger, task: str, spec: TaskSpec, phase: Phase
) -> Mapping[str, TaskSpec] | Sequence[Violation]:
    """Return the tasks that a plan becomes which is approved, or why it can't."""
    name = ledger.task(task).phases[-1].handoff
    if phase.expand is None or name is None:
        return {}
    _, handoff = (await ledger.handoffs(task))[name]
    return await expand_task(ledger, task, spec, phase, handoff.data, handoff.attempt)


async def reject_phase(ledger: Ledger, task: str, note: str | None) -> bool:
    """Have a phase done again whose result a person has not approved; False if it waits for nobody."""
    document = ledger.task(task)
    if document.status is not TaskStatus.WAITING:
        return False
    visit = document.phases[-1]
    reason = "a person did not approve it" if note is None else f"a person did not approve it: {note}"
    changes = {
        "phases": change_last_visit(document, PhaseTrigger.REJECT, note=note, reason=reason),
        "phase": visit.phase,
        "start": visit.commit or document.start,
        "base": visit.base if visit.commit else document.base,
        "feedback": render_rejection(note),
        "reason": reason,
    }
    await ledger.change(task, Trigger.SEND_BACK, {"phase": visit.phase, "note": note, "reason": reason}, **changes)
    return True
