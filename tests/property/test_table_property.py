"""The live table updated by records equals one rebuilt from all documents."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli.live.model import LiveRun
from orchestrator.domain.runs.model import Attempt, RunDocument, TaskDocument, apply_trigger
from orchestrator.domain.runs.statuses import FINAL_STATUSES, SUCCESS_STATUSES, TRANSITIONS, TaskStatus, Trigger
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.engine.reports.report import RunRecord
from orchestrator.protocols import CommitRecord, Key

COMMIT = "0123456789" * 4


def step(task: TaskDocument, trigger: Trigger, now: float) -> TaskDocument:
    """Return a task after a possible event, with its record."""
    changes: dict[str, Any] = {}
    match trigger:
        case Trigger.START:
            attempt = Attempt(adapter="x", number=len(task.attempts) + 1, base=COMMIT, started=now)
            changes["attempts"] = (*task.attempts, attempt)
        case Trigger.LAND | Trigger.ADOPT:
            changes["landed"] = COMMIT
        case Trigger.DROP:
            changes["landed"] = None
        case _ if task.status is TaskStatus.RUNNING:
            changes["attempts"] = task.with_attempt(ended=now, input_tokens=10, cost=0.5)
    return apply_trigger("a task", task, trigger, **changes)


@st.composite
def runs(draw: st.DrawFn) -> dict[str, DispatchEntry]:
    """Draw tasks that may need earlier ones."""
    names = [f"t{number}" for number in range(draw(st.integers(1, 7)))]
    return {
        name: DispatchEntry(tuple(draw(st.lists(st.sampled_from(names[:number]), unique=True))) if number else ())
        for number, name in enumerate(names)
    }


@given(runs(), st.data())
def test_records_and_documents_give_the_same_table(entries: dict[str, DispatchEntry], data: st.DataObject) -> None:
    """After each change: the same counts, rows and phases, and every task counted once."""
    run = RunDocument(
        id="run", config="c", repo="/r", is_url=False, base="main", target="main", capacity=2, session_memory=1,
        adapters={}, tasks=tuple(entries), start=COMMIT, hub="/h", started=0.0,
    )  # fmt: skip
    tasks = {task: TaskDocument() for task in entries}
    limits = dict.fromkeys(entries, 3)
    view = LiveRun(RunRecord(run, dict(tasks), entries, {}), limits)
    for now in range(1, data.draw(st.integers(2, 25))):
        name = data.draw(st.sampled_from(sorted(tasks)))
        may_start = all(tasks[need].status in SUCCESS_STATUSES for need in entries[name].needs)
        triggers = [
            trigger
            for status, trigger in TRANSITIONS
            if status is tasks[name].status and trigger is not Trigger.DROP
            if may_start or tasks[name].status in FINAL_STATUSES or trigger is Trigger.CANCEL
        ]
        if not triggers:
            continue
        tasks[name] = step(tasks[name], data.draw(st.sampled_from(triggers)), float(now))
        document = tasks[name].model_dump(mode="json")
        view.apply(CommitRecord(now, float(now), {Key("task", f"run/{name}"): (1, document)}, []))
        check(view, LiveRun(RunRecord(run, dict(tasks), entries, {}), limits), len(entries))
    landed = [name for name, one in tasks.items() if one.status is TaskStatus.LANDED]
    if landed:
        name = data.draw(st.sampled_from(landed))
        tasks[name] = step(tasks[name], Trigger.DROP, 99.0)
        view.apply(CommitRecord(99, 99.0, {Key("task", f"run/{name}"): (1, tasks[name].model_dump(mode="json"))}, []))
        check(view, LiveRun(RunRecord(run, dict(tasks), entries, {}), limits), len(entries))


def check(kept: LiveRun, made: LiveRun, count: int) -> None:
    """Compare both tables."""
    one, other = kept.totals(100.0), made.totals(100.0)
    counts, others = (
        (both.landed, both.done, both.running, both.queued, both.waiting, both.asked, both.blocked, both.failed)
        for both in (one, other)
    )
    assert (counts, one.tokens, one.cost) == (others, other.tokens, other.cost)
    assert sum(counts) == count
    assert visible_rows(kept) == visible_rows(made)
    for room in range(count):
        frame = kept.frame(100.0, room)
        assert len(frame.rows) == max(room - 1, 0)
    assert set(kept.activity.working()) == set(made.activity.working())


def visible_rows(view: LiveRun) -> list[tuple[str, ...]]:
    """Return the rows without the need that blocks a task, which may be any of several."""
    rows = view.frame(100.0, 20).rows
    return [(row.task, row.activity, row.phase, row.attempt, row.words * (row.activity != "blocked")) for row in rows]
