"""The model of the live table of a run, updated with each commit. Draws nothing.

The cost of a frame depends on the size of the screen, not on the number of tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain

from orchestrator.cli.live.session_activity import SessionActivity
from orchestrator.cli.render.next_steps import status_steps
from orchestrator.cli.render.table_model import (
    RETRY_LABEL,
    RemainingWork,
    RunTotals,
    TableFrame,
    TaskRow,
    activity_label,
    choose_rows,
    estimate_time_left,
    longest_chains,
    totals_line,
)
from orchestrator.cli.render.text import format_elapsed, one_line, printable
from orchestrator.domain.events.runs import RunCapacityLimited, RunFinished, RunHalted, RunInterrupted, RunLeaderElected
from orchestrator.domain.runs.metrics import ActiveTime
from orchestrator.domain.runs.model import AdapterDocument, RunDocument, TaskDocument
from orchestrator.domain.runs.statuses import (
    ACTIVE_STATUSES,
    FINAL_STATUSES,
    LANDING_STATUSES,
    STARTABLE_STATUSES,
    SUCCESS_STATUSES,
    UNSUCCESSFUL_STATUSES,
    USER_STATUSES,
    TaskStatus,
)
from orchestrator.domain.scheduling.active_time import compute_active_time
from orchestrator.domain.scheduling.claims import OrchestratorLease
from orchestrator.domain.scheduling.dispatch import DispatchBoard, with_subtasks
from orchestrator.engine.reports.report import RunRecord
from orchestrator.engine.reports.task_report import (
    TaskReport,
    describe_failed_need,
    describe_missing_needs,
    report_task,
)
from orchestrator.engine.state.records import parse_entry, run_key, spec_key
from orchestrator.protocols import CommitRecord, Event, JsonObject

_BUILT = LANDING_STATUSES | {TaskStatus.LANDED}
#: The groups of tasks that wait for a user.
_USER_ACTIVITIES = tuple(sorted(status.record.activity for status in USER_STATUSES))
_NOT_LANDED = tuple(status.record.activity for status in TaskStatus if status in UNSUCCESSFUL_STATUSES)
#: The shortest remaining time that is shown, in seconds: a shorter one is outdated before a user reads it.
_MIN_TIME_LEFT = 1.0


class _SpendingTotals:
    """Tokens and cost (US dollars) of all attempts."""

    def __init__(self) -> None:
        self.tokens, self._cost, self._priced = 0, 0.0, 0

    def add(self, task: TaskDocument, times: int) -> None:
        """Add the attempts of a task `times` times; -1 removes them."""
        for attempt in task.attempts:
            self.tokens += times * (attempt.input_tokens + attempt.output_tokens)
            if attempt.cost is not None:
                self._cost += times * attempt.cost
                self._priced += times

    @property
    def cost(self) -> float | None:
        """US dollars; None if no attempt has a known cost."""
        return self._cost if self._priced else None


class _TaskTimings:
    """The average durations of sessions, and of checks and landing, in seconds.

    Checks and landings run one at a time.
    """

    def __init__(self) -> None:
        self._built: dict[str, float] = {}
        self._in_all = 0.0
        self._queued: dict[str, float] = {}
        self._last = self._landing = 0.0
        self._landed = 0

    def change(self, task: str, after: TaskDocument, time: float) -> None:
        """Record that a task has had its current status since `time`."""
        if after.status is TaskStatus.QUEUED:
            self._queued.setdefault(task, time)
        elif after.status not in LANDING_STATUSES and (queued := self._queued.pop(task, None)) is not None:
            self._landing += time - max(queued, self._last)
            self._landed += 1
            self._last = time

    def built(self, task: str, document: TaskDocument) -> None:
        """Record the session time of a task, if it has been built."""
        if document.status in _BUILT:
            seconds = sum(one.duration(one.started) for one in document.attempts)
            self._in_all += seconds - self._built.get(task, 0.0)
            self._built[task] = seconds

    def build(self) -> float | None:
        """Return the average session time of a task; None if no task has been built yet."""
        return self._in_all / len(self._built) if self._built else None

    def land(self) -> float:
        """Return the average time of a task's checks and landing; 0 if unknown."""
        return self._landing / self._landed if self._landed else 0.0


class LiveRun:
    """The displayed state of a run; `activity` receives the activity of its sessions."""

    def __init__(self, record: RunRecord, attempts: Mapping[str, int]) -> None:
        """Start from the current record of a run.

        `attempts` is the number of attempts that each task may have.
        """
        self.run, self._entries, self._attempts = record.run, dict(record.entries), dict(attempts)
        self._adapters: dict[str, AdapterDocument] = dict(record.adapters)
        self._board = DispatchBoard.of(record.entries, {task: one.status for task, one in record.tasks.items()})
        self._chains = longest_chains(record.entries)
        self._order = {task: number for number, task in enumerate(record.run.tasks)}
        self._orchestrators = {one.owner.id: one for one in record.orchestrators}
        self._capacity = record.run.capacity
        self._tasks: dict[str, TaskDocument] = {}
        self._changed: dict[str, float] = {}
        self._groups: dict[str, dict[str, None]] = {
            name: {} for name in (*(status.record.activity for status in TaskStatus), RETRY_LABEL)
        }
        self._over: dict[str, None] = {}
        self._spending, self._pace = _SpendingTotals(), _TaskTimings()
        self.activity = SessionActivity(self._tasks, self._groups[TaskStatus.RUNNING.record.activity])
        self.is_finished = False
        """Whether the run has ended, is interrupted or is halted."""
        for task, document in sorted(record.tasks.items(), key=lambda item: _last_change(item[1])):
            self._set(task, document, _last_change(document))

    def apply(self, record: CommitRecord) -> None:
        """Apply a commit."""
        prefix = f"{self.run.id}/"
        if (grown := record.documents.get(run_key(self.run.id))) is not None and grown[1] is not None:
            self._grow(RunDocument.model_validate(grown[1]), record)
        for key, (_, value) in record.documents.items():
            name = key.id.removeprefix(prefix)
            if name == key.id or value is None:
                continue
            if key.kind == "task" and name in self._order:
                self._change(name, TaskDocument.model_validate(value), record.time)
            elif key.kind == "adapter":
                self._adapters[name] = AdapterDocument.model_validate(value)
            elif key.kind == "orchestrator":
                self._orchestrators[name] = OrchestratorLease.model_validate(value)
        for event in record.events:
            if event.data.get("run") == self.run.id:
                self._happened(event)

    def _grow(self, run: RunDocument, record: CommitRecord) -> None:
        """Add the tasks of an expanded plan.

        The commit that records the expansion has the specs of all of them.
        """
        self.run = run
        new = [task for task in run.tasks if task not in self._order]
        specs = [record.documents.get(spec_key(run.id, task)) for task in new]
        if not new or any(one is None or one[1] is None for one in specs):
            return
        for task, one in zip(new, specs, strict=True):
            value: JsonObject = one[1] if one is not None and one[1] is not None else {}
            self._entries[task], self._attempts[task] = parse_entry(value), value["attempts"]
            self._tasks[task] = TaskDocument()
            self._groups[activity_label(self._tasks[task])][task] = None
            self._changed[task] = record.time
        self._order = {task: number for number, task in enumerate(run.tasks)}
        self._arrange()

    def _arrange(self) -> None:
        """Recompute the dependencies between tasks."""
        self._entries = with_subtasks(self._entries, self._tasks)
        self._board = DispatchBoard.of(self._entries, {name: one.status for name, one in self._tasks.items()})
        self._chains = longest_chains(self._entries)

    def _happened(self, event: Event) -> None:
        match event.type:
            case RunLeaderElected.type:
                self._capacity, self.is_finished = self.run.capacity, False
            case RunCapacityLimited.type if not self._groups[
                TaskStatus.RUNNING.record.activity
            ]:  # otherwise the limit is momentary
                self._capacity = event.data["sessions"]
            case RunFinished.type | RunInterrupted.type | RunHalted.type:
                self.is_finished = True

    def _change(self, task: str, after: TaskDocument, time: float) -> None:
        before, parts = self._tasks[task].status, self._tasks[task].subtasks
        if before is not after.status:
            self._pace.change(task, after, time)
            if before in FINAL_STATUSES and after.status in SUCCESS_STATUSES:
                self._board.retry(task)  # tasks that it blocked now wait only for their other needs
            if after.status in SUCCESS_STATUSES:
                self._board.landed(task)
            elif after.status in FINAL_STATUSES:
                self._board.ended(task)
            elif before in FINAL_STATUSES:
                self._board.retry(task)
        self._set(task, after, time)
        if (
            before in SUCCESS_STATUSES and after.status not in SUCCESS_STATUSES
        ):  # tasks that could start after it may be blocked again
            self._board = DispatchBoard.of(self._entries, {name: one.status for name, one in self._tasks.items()})
        if after.subtasks != parts:
            self._arrange()

    def _set(self, task: str, after: TaskDocument, time: float) -> None:
        before = self._tasks.get(task)
        if before is not None:
            del self._groups[activity_label(before)][task]
            self._over.pop(task, None)
            self._spending.add(before, -1)
            if len(before.attempts) != len(after.attempts) or after.status is TaskStatus.NO_CHANGE:
                self.activity.reset(task)
        self._tasks[task], self._changed[task] = after, time
        self._groups[activity_label(after)][task] = None
        self._spending.add(after, 1)
        self._pace.built(task, after)
        self.activity.update(task, before, after)
        if after.status in FINAL_STATUSES:
            self._over[task] = None

    @property
    def _blocked(self) -> Mapping[str, str]:
        """The tasks that can no longer start, each with a need that will not land."""
        blocked = self._board.blocked.items()  # the board does not know which tasks have started on built work
        return {task: need for task, need in blocked if self._tasks[task].status in STARTABLE_STATUSES}

    def frame(self, now: float, room: int) -> TableFrame:
        """Return the frame at `now`, with at most `room` lines besides the totals.

        `now` is in wall-clock seconds.
        """
        has_more = len(self._tasks) > room
        chosen = self._chosen(max(room - has_more, 0))
        active = self._active(now)
        rows = [self._row(task, now, active) for task in sorted(chosen, key=self._order.__getitem__)]
        return TableFrame(rows, self._more(chosen) if has_more and room else "", totals_line(self.totals(now)))

    def _active(self, now: float) -> ActiveTime:
        return compute_active_time(self._orchestrators.values(), self._changed.values(), now)

    def _chosen(self, room: int) -> list[str]:
        working = chain.from_iterable(self._groups[name] for name in ("landing", "checks", "build"))
        blocked = self._blocked
        pending = chain.from_iterable(
            self._groups[name] for name in (*_USER_ACTIVITIES, "queued", RETRY_LABEL, "waiting")
        )
        waiting = chain((task for task in pending if task not in blocked), blocked)
        return choose_rows(working, waiting, reversed(self._over), room)

    def _more(self, chosen: Sequence[str]) -> str:
        shown = Counter(self._activity(task) for task in chosen)
        counts = Counter({name: len(tasks) for name, tasks in self._groups.items()})
        counts.update("blocked" for _ in self._blocked)
        counts.subtract(activity_label(self._tasks[task]) for task in self._blocked)
        left = [f"{count - shown[name]} {name}" for name, count in counts.items() if count > shown[name]]
        return f"and {', '.join(left)}" if left else ""

    def _activity(self, task: str) -> str:
        return activity_label(self._tasks[task], is_blocked=task in self._blocked)

    def _row(self, task: str, now: float, active: ActiveTime) -> TaskRow:
        document, need = self._tasks[task], self._blocked.get(task)
        report = report_task(
            task,
            document,
            self._entries[task].adapter if self.run.merges is None else None,
            "",
            obstacle=None if need is None else describe_failed_need(need),
        )
        elapsed = ""
        if document.attempts and document.status not in STARTABLE_STATUSES | USER_STATUSES:
            end = self._changed[task] if document.status in FINAL_STATUSES else now
            elapsed = format_elapsed(active.between(document.attempt.started, end))
        return TaskRow(
            task=printable(task),
            activity=self._activity(task),
            adapter=printable(report.adapter or ""),
            attempt=f"{report.attempts}/{max(self._attempts[task], report.attempts)}" if report.attempts else "",
            elapsed=elapsed,
            changes=self.activity.changes(task),
            words=printable(one_line(self._words(report))),
            phase=printable(report.phase or "") if document.status is TaskStatus.RUNNING else "",
        )

    def _words(self, report: TaskReport) -> str:
        """Return the text at the end of a row: last message, landed commit, or reason."""
        if report.landed is not None:
            flaky = "; a check is FLAKY" if report.flaky_checks else ""
            return f"{report.landed[:10]} on {self.run.target}{flaky}"
        if report.status == TaskStatus.RUNNING:
            return self.activity.last_message(report.id)
        if report.status in USER_STATUSES:
            commands = ", or ".join(f"`{step.command}`" for step in status_steps(report, is_shown=True))
            return f"{commands}: {report.last_message or ''}"
        if words := report.reason or report.last_message:
            return words
        return describe_missing_needs(self._entries[report.id].missing_needs(self._tasks))

    def totals(self, now: float) -> RunTotals:
        """Return the totals at `now` (wall-clock seconds)."""
        count = {name: len(tasks) for name, tasks in self._groups.items()}
        blocked = len(self._blocked)
        transcripts = self.activity.transcripts
        running = [transcripts[task] for task in self._groups["build"] if task in transcripts]
        costs = [cost for cost in (self._spending.cost, *(one.cost for one in running)) if cost is not None]
        return RunTotals(
            landed=count["landed"],
            running=sum(count[status.record.activity] for status in ACTIVE_STATUSES),
            queued=count["queued"],
            waiting=count["waiting"] + count[RETRY_LABEL] - blocked,
            blocked=blocked,
            failed=len(self._over) - count["landed"] - count["done"],
            sessions=count["build"],
            capacity=self._capacity,
            changes=self.activity.total_changes,
            tokens=self._spending.tokens + sum(one.input_tokens + one.output_tokens for one in running),
            cost=sum(costs) if costs else None,
            elapsed=self._active(now).between(self.run.started, now),
            left=self._left(now),
            done=count["done"],
            asked=sum(count[name] for name in _USER_ACTIVITIES),
            ended={name: count[name] for name in _NOT_LANDED if count.get(name)},
        )

    def _left(self, now: float) -> float | None:
        """Return the estimated remaining seconds; None without a basis for an estimate."""
        build, learned = self._pace.build(), self._adapters.values()
        is_held = any(one.disabled_reason is not None or one.is_cooling_down(now) for one in learned)
        if build is None or self.is_finished or is_held or any(self._groups[name] for name in _USER_ACTIVITIES):
            return None
        pending = [self._chains[task] for name in ("waiting", RETRY_LABEL) for task in self._groups[name]
                   if task not in self._blocked]  # fmt: skip
        ahead = RemainingWork(
            build=build,
            land=self._pace.land(),
            working=[(self._chains[task], now - self._tasks[task].attempt.started) for task in self._groups["build"]],
            waiting=len(pending),
            landing=sum(len(self._groups[status.record.activity]) for status in LANDING_STATUSES),
            chain=max(pending, default=0),
            capacity=self._capacity,
        )
        left = estimate_time_left(ahead)
        return left if left >= _MIN_TIME_LEFT else None


def _last_change(task: TaskDocument) -> float:
    """Return the time of a task's last change; 0 without attempts.

    It is in wall-clock seconds.
    """
    return (task.attempt.ended or task.attempt.started) if task.attempts else 0.0
