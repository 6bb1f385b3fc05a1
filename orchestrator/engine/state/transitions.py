"""Build the documents and events that record one lifecycle step of a task. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.domain.events.base import RunEvent, TaskEvent
from orchestrator.domain.runs.model import TaskDocument, apply_trigger
from orchestrator.domain.runs.statuses import Trigger
from orchestrator.domain.workflow.routing import close_open_visit, phase_events
from orchestrator.protocols import Commit, Event, JsonObject, Key, Write

if TYPE_CHECKING:
    from orchestrator.domain.security.secrets import Redactor
    from orchestrator.domain.settings.run_settings import TaskSpec

#: Fields of documents and events with text from other programs.
_FOREIGN_TEXT_FIELDS = frozenset(
    {
        "reason",
        "feedback",
        "paths",
        "discarded",
        "disabled_reason",
        "changes",
        "worktree",
        "last_message",
        "note",
        "command",
        "failed_tests",
    }
)


class TaskUpdate(NamedTuple):
    """A lifecycle step: trigger, event, document changes, additional writes."""

    trigger: Trigger
    event: TaskEvent
    changes: Mapping[str, Any] = {}
    writes: Sequence[Write] = ()
    events: Sequence[TaskEvent] = ()
    """Further events."""
    tasks: Mapping[str, TaskSpec] = {}
    """The subtasks from its plan, inserted after this task."""


def build_transition(
    key: Key,
    before: TaskDocument,
    version: int,
    update: TaskUpdate,
    now: float,
    redactor: Redactor,
) -> tuple[TaskDocument, Commit]:
    """Return a task's document after a step, and the commit that records the step.

    `key` and `version` identify the task's document.
    """
    trigger = update.trigger
    if type(update.event) is not trigger.event:
        raise TypeError(f"trigger {trigger} records {trigger.event.__name__}, not {type(update.event).__name__}")
    run, _, task = key.id.partition("/")
    changed = close_open_visit(apply_trigger(f"task {task!r}", before, trigger, **update.changes), now)
    after = TaskDocument.model_validate(sanitize(changed.model_dump(mode="json"), redactor))
    attempt = {"attempt": after.attempt.number} if after.attempts else {}
    task_event = update.event.within(**attempt)
    phases = phase_events(before.phases, after.phases)
    # In causal order: a handoff ends its phase, which changes the task.
    ordered = (
        [task_event, *phases, *update.events] if trigger is Trigger.START else [*update.events, *phases, task_event]
    )
    write = Write(key, version, after.model_dump(mode="json"))
    events = [record_event(event.within(task=task), run, redactor) for event in ordered]
    return after, Commit([write, *update.writes], events)


def record_event(event: RunEvent, run: str, redactor: Redactor) -> Event:
    """Return the record of a run's event, without secrets."""
    recorded = Event.of(event.within(run=run))
    return Event(recorded.type, sanitize(recorded.data, redactor))


def sanitize(value: JsonObject, redactor: Redactor) -> JsonObject:
    """Return a value without secrets in program output.

    Council's own names and ids are kept, even if they look like secrets.
    """
    return {key: _item(key, item, redactor) for key, item in value.items()}


def _item(key: str, item: Any, redactor: Redactor) -> Any:
    if isinstance(item, str):  # truncated program output may end in an unpaired surrogate, which no store accepts
        item = item.encode(errors="replace").decode()
    if isinstance(item, float) and not math.isfinite(item):
        return None
    if key in _FOREIGN_TEXT_FIELDS:
        return redactor.json(item)
    if isinstance(item, list):
        return [sanitize(one, redactor) if isinstance(one, dict) else one for one in item]
    return item
