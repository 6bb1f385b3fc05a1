"""Requests to a run from another process.

They are recorded in the store, and the leader of the run handles them.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping, Sequence
from typing import Final

from orchestrator.domain.events.runs import RequestCompleted, RequestSubmitted
from orchestrator.domain.events.tasks import TaskApproved, TaskCancelled, TaskIgnored, TaskRejected, TaskRetryRequested
from orchestrator.domain.runs.model import AdapterDocument, RequestAction, RunDocument, RunRequest, TaskDocument
from orchestrator.domain.runs.phases import PhaseTrigger
from orchestrator.domain.runs.statuses import (
    ACTIVE_STATUSES,
    FINAL_STATUSES,
    RETRYABLE_STATUSES,
    TRANSITIONS,
    TaskStatus,
    Trigger,
)
from orchestrator.domain.security.secrets import has_secret_key
from orchestrator.domain.sessions.messages import MAX_MESSAGE_CHARS, MAX_TASK_CHARS, UserMessage
from orchestrator.domain.settings.names import entry_of_adapter
from orchestrator.domain.settings.phase_settings import Phase
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.workflow.routing import change_last_visit, find_first_incomplete, restart_task
from orchestrator.domain.workflow.violations import Violation
from orchestrator.engine.phases.expansion import (
    expand_task,
    expansion_changes,
    expansion_event,
    landed_subtasks,
    superseded_subtasks,
)
from orchestrator.engine.phases.prompts import render_rejection
from orchestrator.engine.reports.report import RunRecord
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.merge_run import MERGE_TASK
from orchestrator.engine.state.records import read_requests, request_key
from orchestrator.engine.state.reload import can_reload
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import ClaimLost, RefusedError, VersionConflict
from orchestrator.protocols import Commit, Event, Store, Write
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: The maximum length of a note on an approval or rejection, in characters.
MAX_NOTE_LENGTH: Final = 10_000
#: Statuses that a reload does not change: an attempt or a landing reads the new specification later.
_RELOADED: Final = frozenset({TaskStatus.PENDING, TaskStatus.QUEUED})
#: The errors if another orchestrator has just started or ended a task.
_OVERTAKEN: Final = (ClaimLost, VersionConflict)


def check_request(
    action: RequestAction,
    tasks: Sequence[str],
    record: RunRecord,
    *,
    include_waiting: bool = False,
    is_live: bool,
) -> None:
    """Raise RefusedError for a request that the state of its tasks does not allow.

    A retry accepts blocked tasks together with the failed tasks that they need. With `include_waiting`, it also accepts
    tasks that wait to start or to land, blocked or not, because reloading settings does not change their status.
    `is_live` means that a process is active in the run.
    """
    if action is RequestAction.RETRY and record.run.merges is not None:
        raise _explain_merge_retry(record.run, record.tasks[MERGE_TASK].status)
    blocked = record.blocked() if action is RequestAction.RETRY and not include_waiting else {}
    for task in tasks:
        status = record.tasks[task].status
        if action in {RequestAction.APPROVE, RequestAction.REJECT}:
            if status is not TaskStatus.AWAITING_APPROVAL:
                message = f"task {task!r} does not wait for approval (state: {status.record.label})"
                raise RefusedError(message, f"`council status --run {record.run.id}` lists the tasks that do")
        elif action is not RequestAction.RETRY:
            _check_unfinished(action, task, record)
        elif task in blocked:
            missing = [need for need in record.failed_needs(task) if need not in tasks]
            if missing:
                message = f"task {task!r} waits for {', '.join(map(repr, missing))}, which did not land"
                gone = [need for need in missing if record.tasks[need].status not in RETRYABLE_STATUSES]
                remedy = f"start a new run: {', '.join(map(repr, gone))} can't be retried"
                retry = f"`council retry {' '.join(map(shlex.quote, missing))} --run {record.run.id}`"
                raise RefusedError(message, remedy if gone else retry)
        elif status not in RETRYABLE_STATUSES and not (include_waiting and status in _RELOADED):
            raise _explain_not_retryable(task, status, record, is_live=is_live)


def _check_unfinished(action: RequestAction, task: str, record: RunRecord) -> None:
    status = record.tasks[task].status
    if status in FINAL_STATUSES and action is not RequestAction.CANCEL:  # nothing is left to cancel
        message = f"task {task!r} has already ended (state: {status.record.label})"
        raise RefusedError(message, f"there is nothing to {action}")
    if action is RequestAction.RELEASE and not record.run.is_held(task):
        raise RefusedError(f"task {task!r} is not held", f"`council queue {record.run.id}` lists held tasks")


def _explain_merge_retry(run: RunDocument, status: TaskStatus) -> RefusedError:
    """Return the error that a merge task can't be retried, and how to merge again."""
    if status is TaskStatus.LANDED:
        return RefusedError(f"run {run.merges} is merged into {run.target!r}", "there is nothing to retry")
    remedy = f"`council merge {run.merges}` merges again"
    if status is TaskStatus.CONFLICT:
        branch = f"council/{run.merges}"
        remedy = f"`git switch {branch} && git merge {run.target}`, resolve the conflicts, commit; then {remedy}"
    return RefusedError(f"run {run.id} is a merge of run {run.merges} and starts no sessions", remedy)


def _explain_not_retryable(task: str, status: TaskStatus, record: RunRecord, *, is_live: bool) -> RefusedError:
    """Return the error that an unblocked task can't be retried, with its remedy."""
    run = record.run
    if status is TaskStatus.LANDED:
        return RefusedError(f"task {task!r} has landed", "revert its commit and start a new run to do it again")
    if status.record.waits_for_user:
        steps = status.record.next_steps
        remedy = ", ".join(f"{word} `{command.format(task)} --run {run.id}`" for word, command in steps)
        return RefusedError(f"task {task!r} is {status.record.label}", remedy)
    if status in FINAL_STATUSES:
        return RefusedError(f"task {task!r} is {status.record.label}", "start a new run to do it again")
    remedy = "cancel it first, or wait"
    if not is_live:
        remedy = f"no process is active in the run: continue it with `council resume {run.id}`"
        if status in _RELOADED and can_reload(run, record.entries[task]):
            reload = f"`council retry {shlex.quote(task)} --reload --run {run.id}`"
            remedy += f" (to apply changes of the file first: {reload})"
    state = "interrupted" if status in ACTIVE_STATUSES and not is_live else status.replace("_", " ")
    return RefusedError(f"task {task!r} has not ended (state: {state})", remedy)


def check_adapters_to_enable(record: RunRecord, adapters: Sequence[str], now: float) -> Sequence[str]:
    """Return the adapters to enable.

    These are the named ones, or all that are disabled or cooling down; a name without an account means all accounts.
    Raises RefusedError for unknown adapters, and if there is nothing to enable.
    """
    unavailable = {
        name
        for name, document in record.adapters.items()
        if document.disabled_reason is not None or document.is_cooling_down(now)
    }
    known = ", ".join(record.run.adapters)
    accounts = {name: [one for one in unavailable if entry_of_adapter(one) == name] for name in adapters}
    adapters = [each for name in adapters for each in accounts[name] or [name]]
    for name in adapters:
        if name not in record.run.adapters:
            raise RefusedError(f"run {record.run.id} has no adapter {name!r}", f"use one of: {known}")
        if name not in unavailable:
            raise RefusedError(
                f"adapter {name!r} of run {record.run.id} is neither disabled nor cooling down",
                "there is nothing to enable",
            )
    if not unavailable:
        raise RefusedError(
            f"no adapter of run {record.run.id} is disabled or cooling down", "there is nothing to enable"
        )
    return list(adapters) or sorted(unavailable)


def check_reason(reason: str) -> None:
    """Raise RefusedError for an empty reason, or one that contains a secret."""
    if not reason.strip():
        raise RefusedError("the reason is empty", "enter the reason")
    if has_secret_key(reason):
        raise RefusedError("the reason would be recorded, but it seems to contain a secret key", "remove the key")


def check_encoding(what: str, text: str) -> None:
    """Raise RefusedError for a text that the terminal did not pass as UTF-8, which no store accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RefusedError(f"the {what} is not valid UTF-8", "enter it again, or pass it from a UTF-8 file") from None


def check_note(note: str | None) -> None:
    """Raise RefusedError for a note that is empty, too long, or contains a secret."""
    if note is None:
        return
    if not note.strip():
        raise RefusedError("the note is empty", "enter a note, or omit `--note`")
    check_encoding("note", note)
    if len(note) > MAX_NOTE_LENGTH:
        raise RefusedError(f"the note has {len(note)} characters", f"shorten it to at most {MAX_NOTE_LENGTH}")
    if has_secret_key(note):
        raise RefusedError("the note would be recorded, but it seems to contain a secret key", "remove the key")


def check_message(text: str, earlier: Sequence[UserMessage]) -> None:
    """Raise RefusedError for a message that is empty, too long, or contains a secret."""
    if not text.strip():
        raise RefusedError("the message is empty", "enter the text after the task")
    check_encoding("message", text)
    if len(text) > MAX_MESSAGE_CHARS:
        raise RefusedError(f"the message has {len(text)} characters", f"shorten it to at most {MAX_MESSAGE_CHARS}")
    if sum(len(message.text) for message in earlier) + len(text) > MAX_TASK_CHARS:
        message = f"all messages of the task would have more than {MAX_TASK_CHARS} characters"
        raise RefusedError(message, "commit a file with the text, and name it in a message")
    if has_secret_key(text):
        raise RefusedError("the message would be recorded, but it seems to contain a secret key", "remove the key")


def check_phase(run: str, task: str, phase: str, known: Sequence[str], document: TaskDocument) -> None:
    """Raise RefusedError for a phase that is unknown or follows an incomplete phase."""
    if phase not in known:
        remedy = f"use one of: {', '.join(known)}" if known else "it has no workflow: omit `--from`"
        raise RefusedError(f"task {task!r} has no phase {phase!r}", remedy)
    incomplete = find_first_incomplete(known, phase, document)
    if incomplete is not None:
        message = f"phase {incomplete!r} of task {task!r} precedes {phase!r} and is not complete"
        raise RefusedError(message, f"`council retry {task} --from {incomplete} --run {run}`")


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
    """Record a request; the current or next leader of the run handles it."""
    request = RunRequest(
        id=secrets.token_hex(4),
        action=action,
        tasks=tuple(tasks),
        asked=clock.now(),
        reason=reason,
        phase=phase,
        adapters=tuple(adapters),
    )
    write, event = request_record(run, request)
    await store.commit(Commit([write], [Event.of(event)]))
    failpoint("request.recorded")
    return request


def request_record(run: str, request: RunRequest) -> tuple[Write, RequestSubmitted]:
    """Return the document and the event that submit a request."""
    event = RequestSubmitted(run=run, request=request.id, action=request.action, tasks=request.tasks)
    return Write(request_key(run, request.id), 0, request.model_dump(mode="json")), event


async def is_handled(store: Store, run: str, request: RunRequest) -> bool:
    """Return True if a request has been handled."""
    return await store.get(request_key(run, request.id)) is None


class RequestHandler:
    """Applies requests to a run in which only other processes may be active."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def pending(self) -> list[RunRequest]:
        """Return the pending requests, oldest first."""
        return await read_requests(self._ledger.writer.store, self._ledger.run.id)

    async def apply(self, request: RunRequest) -> None:
        """Apply a request, and record that it was completed."""
        for task in request.tasks:
            await self._apply(request, task)
        if request.action is RequestAction.IGNORE:
            await self._record_ignored(request)
        for adapter in request.adapters:
            self._show_adapter(adapter, await self._ledger.adapters.enable(adapter))
        failpoint("request.applied")
        await self.complete(request)

    async def complete(self, request: RunRequest) -> None:
        """Record that a request was completed."""
        writer, key = self._ledger.writer, request_key(self._ledger.run.id, request.id)
        if (stored := await writer.store.get(key)) is not None:
            event = writer.event(RequestCompleted(request=request.id))
            await writer.commit(Commit([Write(key, stored.version, None)], [event]))

    async def _apply(self, request: RunRequest, task: str) -> None:
        match request.action:
            case RequestAction.RETRY:
                for subtask in await subtasks_to_cancel(self._ledger, task, request.phase):
                    await self._cancel(subtask)
                is_changed = await retry_task(self._ledger, task, request.phase)
            case RequestAction.APPROVE:
                is_changed = await approve_phase(self._ledger, task, request.reason)
            case RequestAction.REJECT:
                is_changed = await reject_phase(self._ledger, task, request.reason)
            case RequestAction.HOLD:
                await self._ledger.run_state.hold(task, request.reason)
                return
            case RequestAction.RELEASE:
                await self._ledger.run_state.release(task)
                return
            case RequestAction.BUMP:
                await self._ledger.run_state.bump(task)
                return
            case _:
                await self._cancel(task)
                return
        if is_changed:
            self._show_task(task)

    async def _record_ignored(self, request: RunRequest) -> None:
        """Record the reason to ignore cancelled tasks.

        Tasks that landed in the meantime stay landed.
        """
        for task in request.tasks:
            if self._ledger.task(task).status is TaskStatus.CANCELLED:
                changes = {"reason": f"ignored: {request.reason}", "ignored_reason": request.reason}
                await self._ledger.change(task, Trigger.IGNORE, TaskIgnored(reason=request.reason), **changes)

    async def _cancel(self, task: str) -> None:
        await cancel_task(self._ledger, task)

    def _show_task(self, task: str) -> None:
        """Update this process after a task was changed to continue."""

    def _show_adapter(self, adapter: str, document: AdapterDocument) -> None:
        """Update this process with the new state of an adapter."""


async def cancel_task(ledger: Ledger, task: str) -> bool:
    """Cancel a task that waits or that another orchestrator owns.

    Its work remains on its branch. Return False if it has ended, or is landing: its owner completes the landing.
    """
    while await _is_ours_to_cancel(ledger, task):
        document = ledger.task(task)
        branch, reason = document.branch, "on request"
        if document.commit is not None:
            branch = ledger.work_branch(task)
        cancelled = TaskCancelled(reason=reason, branch=branch)
        try:
            await ledger.change(task, Trigger.CANCEL, cancelled, reason=reason, branch=branch)
        except _OVERTAKEN:
            await ledger.tasks.refresh(task)
        else:
            return True
    return False


async def _is_ours_to_cancel(ledger: Ledger, task: str) -> bool:
    """Return True if a task can be cancelled in its current state.

    Its claim is taken from any owner first.
    """
    while (ledger.task(task).status, Trigger.CANCEL) in TRANSITIONS:
        if not ledger.is_claimed_elsewhere(task):
            return True
        if not await ledger.claim(task, is_requested=True) and ledger.is_claimed_elsewhere(task):
            return False
    return False


async def subtasks_to_cancel(ledger: Ledger, task: str, phase: str | None) -> tuple[str, ...]:
    """Return the subtasks of an earlier plan that a retry must cancel."""
    document = ledger.task(task)
    if document.status not in RETRYABLE_STATUSES:
        return ()
    return superseded_subtasks(
        ledger, ledger.definitions.workflow((await ledger.definitions.spec(task)).workflow), document, phase
    )


async def retry_task(ledger: Ledger, task: str, phase: str | None = None) -> bool:
    """Retry an ended task from a phase, with the full number of attempts.

    Return False if it has not ended.
    """
    workflow = ledger.definitions.workflow((await ledger.definitions.spec(task)).workflow)
    cleared = dict.fromkeys(("commit", "built_by", "start", "base", "conflict", "feedback"))
    while (document := ledger.task(task)).status in RETRYABLE_STATUSES:
        restart = restart_task(workflow, document, phase)
        if superseded_subtasks(ledger, workflow, document, phase):
            restart["subtasks"] = landed_subtasks(ledger, document)
        reset = {
            "refused": None,
            "failures": 0,
            "bounces": 0,
            "visits_before_retry": len(document.phases),
            "reason": None,
            "paths": (),
        }
        try:
            changes = {"ignored_reason": None, **reset, **cleared, **restart}
            await ledger.change(task, Trigger.REQUEST_RETRY, TaskRetryRequested(), **changes)
        except _OVERTAKEN:
            await ledger.tasks.refresh(task)
        else:
            return True
    return False


async def approve_phase(ledger: Ledger, task: str, note: str | None) -> bool:
    """Approve the result of a task's phase.

    Return False if the task does not wait for approval.
    """
    document, spec = ledger.task(task), await ledger.definitions.spec(task)
    if document.status is not TaskStatus.AWAITING_APPROVAL:
        return False
    workflow = ledger.definitions.workflow(spec.workflow)
    phase = workflow.phase(document.phases[-1].phase)
    expansion = await _expand_approved_plan(ledger, task, spec, phase)
    if isinstance(expansion, Sequence):  # the run has changed, and the plan no longer fits
        return await reject_phase(ledger, task, "; ".join(map(str, expansion)))
    next_phases = workflow.after(phase.name)
    phases = change_last_visit(document, PhaseTrigger.APPROVE, note=note)
    changes = {"phases": phases, "phase": next_phases[0].name if next_phases else None, "reason": None}
    changes |= expansion_changes(ledger, task, expansion)
    events = [expansion_event(phase, expansion)] if expansion else []
    approved = TaskApproved(phase=phase.name, note=note)
    update = TaskUpdate(Trigger.APPROVE, approved, changes, events=events, tasks=expansion)
    await ledger.change_all({task: update})
    return True


async def _expand_approved_plan(
    ledger: Ledger, task: str, spec: TaskSpec, phase: Phase
) -> Mapping[str, TaskSpec] | Sequence[Violation]:
    """Return the tasks of an approved plan, or the violations that prevent it."""
    name = ledger.task(task).phases[-1].handoff
    if phase.expand is None or name is None:
        return {}
    _, handoff = (await ledger.definitions.handoffs(task))[name]
    return await expand_task(ledger, task, spec, phase, handoff.data, handoff.attempt)


async def reject_phase(ledger: Ledger, task: str, note: str | None) -> bool:
    """Repeat a phase whose result a user rejected.

    Return False if the task does not wait for approval.
    """
    document = ledger.task(task)
    if document.status is not TaskStatus.AWAITING_APPROVAL:
        return False
    visit = document.phases[-1]
    reason = "rejected by a user" if note is None else f"rejected by a user: {note}"
    changes = {
        "phases": change_last_visit(document, PhaseTrigger.REJECT, note=note, reason=reason),
        "phase": visit.phase,
        "start": visit.commit or document.start,
        "base": visit.base if visit.commit else document.base,
        "feedback": render_rejection(note),
        "reason": reason,
    }
    rejected = TaskRejected(phase=visit.phase, note=note, reason=reason)
    await ledger.change(task, Trigger.REJECT_RESULT, rejected, **changes)
    return True
