"""Build the documents and events that record one lifecycle step of a task. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.domain.runs.lifecycle import Trigger, apply_trigger
from orchestrator.domain.runs.model import TaskDocument, TaskStatus
from orchestrator.domain.scheduling.claims import ReleaseReason
from orchestrator.domain.workflow.routing import close_open_visit, phase_events
from orchestrator.protocols import Commit, Event, JsonObject, Key, Write

if TYPE_CHECKING:
    from orchestrator.config.model import TaskSpec
    from orchestrator.domain.security.secrets import Redactor

#: Event type by trigger.
TASK_EVENTS: Mapping[Trigger, str] = {
    Trigger.START: "task.started",
    Trigger.RETRY: "task.retrying",
    Trigger.HOLD: "task.postponed",
    Trigger.INTERRUPT: "task.interrupted",
    Trigger.FAIL: "task.failed",
    Trigger.IDLE: "task.no_change",
    Trigger.BUILD: "task.queued",
    Trigger.ADVANCE: "task.advanced",
    Trigger.EXPAND: "task.expanded",
    Trigger.REPEAT: "task.phase_repeated",
    Trigger.ASK: "task.waiting",
    Trigger.APPROVE: "task.approved",
    Trigger.SEND_BACK: "task.rejected",
    Trigger.QUEUE: "task.queued",
    Trigger.FINISH: "task.done",
    Trigger.CHECK: "task.checking",
    Trigger.REQUEUE: "task.requeued",
    Trigger.BOUNCE: "task.retrying",
    Trigger.REJECT: "task.failed",
    Trigger.INTEND: "task.landing",
    Trigger.UNDO: "task.landing_aborted",
    Trigger.DEFER: "task.deferred",
    Trigger.CONFLICT: "task.conflict",
    Trigger.ADOPT: "task.landed",
    Trigger.LAND: "task.landed",
    Trigger.LOSE: "task.failed",
    Trigger.DISTRUST: "task.failed",
    Trigger.CANCEL: "task.cancelled",
    Trigger.IGNORE: "task.ignored",
    Trigger.REVIVE: "task.retry_requested",
}


#: How the claim on a task ends, by the status in which the task has no owner.
CLAIM_RELEASES: Mapping[TaskStatus, ReleaseReason] = {
    TaskStatus.PENDING: ReleaseReason.ABANDONED,
    TaskStatus.WAITING: ReleaseReason.ABANDONED,
    TaskStatus.DONE: ReleaseReason.COMPLETE,
    TaskStatus.CANCELLED: ReleaseReason.ABANDONED,
    TaskStatus.LANDED: ReleaseReason.COMPLETE,
    TaskStatus.NO_CHANGE: ReleaseReason.COMPLETE,
    TaskStatus.CONFLICT: ReleaseReason.FAILED,
    TaskStatus.FAILED: ReleaseReason.FAILED,
}

#: Fields of documents and events with foreign text.
_FOREIGN_TEXT_FIELDS = frozenset(
    {"reason", "feedback", "paths", "discarded", "disabled_reason", "changes", "worktree", "last_message", "note"}
)


class TaskUpdate(NamedTuple):
    """A lifecycle step of one task: its trigger, event details and document changes, and what else the commit writes.

    For the end of an attempt, `details` has its `outcome` and `reason`.
    """

    trigger: Trigger
    details: Mapping[str, Any] = {}
    changes: Mapping[str, Any] = {}
    writes: Sequence[Write] = ()
    events: Sequence[tuple[str, JsonObject]] = ()
    """Further event types with their details; the run is added."""
    tasks: Mapping[str, TaskSpec] = {}
    """The subtasks that its plan was expanded to, inserted after this task."""


def build_transition(
    key: Key,
    before: TaskDocument,
    version: int,
    update: TaskUpdate,
    now: float,
    redactor: Redactor,
) -> tuple[TaskDocument, Commit]:
    """Return the document of a task after a lifecycle step, and the commit that records the step.

    `key` and `version` are those of the task's document.
    """
    trigger = update.trigger
    run, _, task = key.id.partition("/")
    changed = close_open_visit(apply_trigger(f"task {task!r}", before, trigger, **update.changes), now)
    after = TaskDocument.model_validate(sanitize(changed.model_dump(mode="json"), redactor))
    attempt = {"attempt": after.attempt.number} if after.attempts else {}
    task_event = (TASK_EVENTS[trigger], {"task": task, **attempt, **update.details})
    phases = [(event, {"task": task, **facts}) for event, facts in phase_events(before.phases, after.phases)]
    # In causal order: a handoff ends its phase, and that moves the task.
    event_facts = (
        [task_event, *phases, *update.events] if trigger is Trigger.START else [*update.events, *phases, task_event]
    )
    write = Write(key, version, after.model_dump(mode="json"))
    events = [Event(event, sanitize({"run": run, **facts}, redactor)) for event, facts in event_facts]
    return after, Commit([write, *update.writes], events)


def sanitize(value: JsonObject, redactor: Redactor) -> JsonObject:
    """Remove secrets from program output.

    Names and ids of our own stay, whatever they look like.
    """
    return {key: _item(key, item, redactor) for key, item in value.items()}


def _item(key: str, item: Any, redactor: Redactor) -> Any:
    if isinstance(item, str):  # truncated program output may end in half a surrogate pair, which no store accepts
        item = item.encode(errors="replace").decode()
    if isinstance(item, float) and not math.isfinite(item):
        return None
    if key in _FOREIGN_TEXT_FIELDS:
        return redactor.json(item)
    if isinstance(item, list):
        return [sanitize(one, redactor) if isinstance(one, dict) else one for one in item]
    return item
