"""What one step of a task along its lifecycle is recorded with: documents, and events that tell it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.domain.runs.lifecycle import Trigger, apply_trigger
from orchestrator.domain.runs.model import TaskDocument, TaskStatus
from orchestrator.domain.scheduling.claims import ReleaseReason
from orchestrator.domain.workflow.routing import close_open_visit, phase_events
from orchestrator.engine.state.sanitize import sanitize
from orchestrator.protocols import Event, JsonObject, Key, Write

if TYPE_CHECKING:
    from orchestrator.config.model import TaskSpec
    from orchestrator.domain.security.secrets import Redactor

#: The event that each change of a task is recorded with.
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


#: What each status in which a task is nobody's makes of the claim on it.
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


class TaskUpdate(NamedTuple):
    """What an event says of a task, and which fields of its document change; and what else is written with that."""

    details: JsonObject
    changes: Mapping[str, Any]
    writes: Sequence[Write] = ()
    events: Sequence[tuple[str, JsonObject]] = ()
    """Their types, and what they say beside the run."""
    tasks: Mapping[str, TaskSpec] = {}
    """The tasks that are added to the run, behind this one: what its plan became."""


class Transition(NamedTuple):
    """One step of a task along its lifecycle, and what a commit records it with."""

    after: TaskDocument
    writes: Sequence[Write]
    events: Sequence[Event]


def build_transition(
    key: Key,
    before: TaskDocument,
    version: int,
    trigger: Trigger,
    update: TaskUpdate,
    now: float,
    redactor: Redactor,
) -> Transition:
    """Return what a task's step is recorded with, under the key of its document, which is at a version now."""
    run, _, task = key.id.partition("/")
    changed = close_open_visit(apply_trigger(f"task {task!r}", before, trigger, **update.changes), now)
    after = TaskDocument.model_validate(sanitize(changed.model_dump(mode="json"), redactor))
    attempt = {"attempt": after.attempt.number} if after.attempts else {}
    own = (TASK_EVENTS[trigger], {"task": task, **attempt, **update.details})
    phases = [(event, {"task": task, **facts}) for event, facts in phase_events(before.phases, after.phases)]
    # In the order in which a person would tell it: what was handed over ends the phase, which moves the task.
    told = [own, *phases, *update.events] if trigger is Trigger.START else [*update.events, *phases, own]
    write = Write(key, version, after.model_dump(mode="json"))
    events = [Event(event, sanitize({"run": run, **facts}, redactor)) for event, facts in told]
    return Transition(after, [write, *update.writes], events)
