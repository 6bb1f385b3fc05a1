"""Describe events in sentences for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from orchestrator.cli.render.text import one_line, pluralize, printable, salvage_name
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.errors import join_names
from orchestrator.protocols import Event, JsonObject
from orchestrator.system.instants import format_local_time

#: How an event reads; its own fields fill the gaps.
EVENT_MESSAGES: Mapping[str, str] = {
    "run.created": "run {run} lands on {target}",
    "run.imported": "imported from {source}",
    "legacy.imported": "imported {tasks} tasks from {sources}",
    "legacy.file_skipped": "not imported as it is: {path}: {reason}",
    "run.capacity_limited": "no more than {sessions} sessions at once: {reason}",
    "run.waiting": "nothing is left to do{before} but to wait for {awaited}",
    "run.paused": "nothing starts for {retry_in:g} s: {reason}",
    "repository.changed": "in your repository, not by council, while {sessions} ran: {changes}",
    "plugin.skipped": "left out: {reason}",
    "sink.failing": "sink {sink} fails and will be tried again: {reason}",
    "sink.recovered": "sink {sink} is told again",
    "sink.undelivered": "sink {sink} has yet to get {left} events: `council resume {run}` delivers them",
    "tracker.failing": "tracker {tracker} fails and will be tried again: {reason}",
    "tracker.recovered": "tracker {tracker} is told again",
    "tracker.undelivered": "tracker {tracker} has yet to get {left} events: `council resume {run}` delivers them",
    "views.failing": "the readable copies of the state can't be written: {reason}",
    "adapter.cooling_down": "adapter {adapter} pauses until {until}: {reason}",
    "adapter.disabled": (
        "adapter {adapter} is stopped: {reason}: fix that, then `council adapters enable {adapter} --run {run}`"
    ),
    "adapter.enabled": "adapter {adapter} is used again",
    "budget.low": "the budget of {of} is nearly used up: {reason}",
    "budget.exhausted": "the budget of {of} is used up: {reason}",
    "budget.untracked": "{of} has printed so much that what it uses up is not known before its end",
    "budget.price_unknown": "what {adapter} costs is not known, and not counted: add {model} to `prices`",
    "base.checking": "running the checks on {branch} ({commit:.10}) before the next session: {checks}",
    "base.passed": "{branch} ({commit:.10}) passes its checks",
    "base.failure_allowed": "checks may fail on the base from now on",
    "run.worker_left": "process {pid} left the run: {headline}",
    "run.halted": "halted: {headline}",
    "run.budget_changed": "the run has other limits now",
    "run.file_changed": "{file} has changed, the run keeps what it recorded: {changed}",
    "task.reloaded": "takes {keys} from the file",
    "run.interrupted": "interrupted: `council resume {run}` goes on",
    "run.removed": "its record was removed, checkpoint {checkpoint} brings it back",
    "run.taken_over": "taken over by process {pid}, to restore a checkpoint",
    "checkpoint.restored": "checkpoint {checkpoint} was restored",
    "run.target_unreachable": "the target can't be looked at: {reason}",
    "task.started": "started (session {attempt}, {adapter})",
    "task.retrying": "failed: {reason}; another try follows",
    "task.interrupted": "interrupted: {reason}",
    "task.postponed": "put off: {reason}",
    "task.cancelled": "cancelled",
    "task.ignored": "ignored: {reason}",
    "task.retry_requested": "will be tried again",
    "task.failed": "failed: {reason}",
    "task.no_change": "changed nothing",
    "task.queued": "built, waits to land",
    "task.checking": "merged, checks run",
    "task.requeued": "can't land now: {reason}",
    "task.deferred": "can't land now: {reason}",
    "task.conflict": "{reason}",
    "task.ownership_extended": "owns what else it changed, too",
    "task.out_of_scope_allowed": "changed what it does not own, and may",
    "task.landed": "landed as {landed:.10}",
    "task.expanded": "its plan became tasks: {count}",
    "task.phase_repeated": "{reason}; another round follows",
    "task.waiting": "a person is to approve this: `council approve {task}`, or `council reject {task} --note TEXT`",
    "task.approved": "phase {phase} is approved{noted}",
    "task.rejected": "phase {phase} is sent back{noted}",
    "task.done": "done",
    "task.changes_discarded": "a phase that is to change nothing changed this, it was discarded: {paths}",
    "phase.entered": "phase {phase} begins",
    "phase.awaiting": "phase {phase} waits for approval",
    "phase.completed": "phase {phase} is complete",
    "phase.failed": "phase {phase} has failed",
    "phase.skipped": "phase {phase} is skipped: {reason}",
    "phase.cancelled": "phase {phase} is cancelled",
    "handoff.invalid": "phase {phase} has handed over what is not valid",
    "shared.put": "shared as {key}",
    "task.salvaged": "work that was on no branch is kept as {kept}",
    "task.claim_lost": "taken over by {by}; {left}",
    "task.session_api_failed": "a question of its session could not be answered: {reason}",
    "task.tools_denied": "{reason}",
    "task.host_denied": "its session was refused {host}, which `network.allow` does not cover",
    "claim.acquired": "claimed by {owner}",
    "claims.taken_over": "{swept} worker {orchestrator} ({reason})",
    "run.joined": "process {pid} on {host} joined",
    "task.after_run_failed": "a command after its session failed: {reason}",
    "slot.setup_started": "{place}: setup runs: {commands}",
    "slot.setup_finished": "{place}: setup took {seconds:g} s",
    "slot.teardown_failed": "{place}: a command of its teardown failed: {reason}",
    "run.hooks_skipped": "landings do not run the hooks in {hooks}: {reason}",
    "slot.ports_changed": "{place} got other ports, somebody else has {lost}",
    "task.worktree_preserved": "its worktree stays in {worktree}: {reason}",
    "note.added": "left a note {note} for later sessions",
}


#: Tasks and keys that are named where a file has changed.
_MAX_CHANGES_SHOWN = 5


def event_line(time: float, event: Event) -> str | None:
    """Return an event as a line for people; None if it is not for them."""
    if event.type not in EVENT_MESSAGES:
        return None
    return f"{datetime.fromtimestamp(time, UTC).astimezone():%H:%M:%S} {event_text(event)}"


def event_text(event: Event) -> str:
    """Return an event in words, by its bare name where there are none for it."""
    task = f"{event.data['task']}: " if "task" in event.data else ""
    words = (
        EVENT_MESSAGES[event.type].format_map(_message_fields(event.data))
        if event.type in EVENT_MESSAGES
        else event.type
    )
    return f"{task}{printable(words)}"


def _message_fields(data: JsonObject) -> JsonObject:
    """Return an event's fields as a person reads them: instants as local times, lists as words, one line each."""
    told: JsonObject = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in data.items()
    }
    if told.get("until") is not None:
        told["until"] = format_local_time(told["until"])
    if isinstance(data.get("tasks"), dict) and "keys" in data:
        told["changed"] = describe_file_changes(data["tasks"], data["keys"])
    if "count" in told:
        told["counted"] = pluralize(told["count"], "task")
        told["swept"] = f"took over {told['counted']} from" if told["count"] else "lost"
    told["before"] = f" before {told['until']}" if told.get("until") else ""
    if "approvals" in told:
        who = (told["adapters"], f"somebody to approve {told['approvals']}" if told["approvals"] else "")
        told["awaited"] = ", and for ".join(filter(None, who))
    told["noted"] = f": {one_line(told['note'])}" if told.get("note") else ""
    if "branch" in told:
        told["kept"] = kept = None if told["branch"] is None else salvage_name(told["branch"])
        told["left"] = f"what its session left is kept as {kept}" if kept else "its session left nothing"
    if isinstance(told.get("reason"), str):
        told["headline"] = HaltReason.parse(told["reason"]).headline
        told["reason"] = one_line(told["reason"])
    return told


def describe_file_changes(tasks: Mapping[str, Sequence[str]], keys: Sequence[str]) -> str:
    """Return what a run's file says otherwise than the run, which keeps what it recorded, and how to change that."""
    each = [*(f"{name} ({', '.join(changed)})" for name, changed in tasks.items()), *keys]
    remedy = "`council retry TASK --reload` takes it over for a task" if tasks else "start a new run for that"
    return f"{join_names(each, _MAX_CHANGES_SHOWN)}; {remedy}"
