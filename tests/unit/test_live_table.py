"""The live table: rows, totals, time left and layout, without a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.segment import Segment

from orchestrator.api.topics.activity import ObservedSession
from orchestrator.cli.live.model import LiveRun
from orchestrator.cli.render.rich_tables import count_wrapped_rows, frame_lines
from orchestrator.cli.render.table_model import (
    RemainingWork,
    TableFrame,
    TaskRow,
    activity_label,
    choose_rows,
    estimate_time_left,
    format_estimate,
    longest_chains,
)
from orchestrator.cli.render.text import format_count, format_elapsed
from orchestrator.domain.runs.model import AdapterDocument, Attempt, RunDocument, TaskDocument
from orchestrator.domain.runs.phases import PhaseRecord, PhaseStatus
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.engine.reports.report import RunRecord, build_report
from orchestrator.protocols import CommitRecord, Event, Key
from orchestrator.repo.git.change_counts import Changes
from orchestrator.sessions.output.transcript import Transcript
from tests.unit.test_metrics import orchestrator

COMMIT = "0123456789" * 4


def attempt(number: int = 1, **facts: Any) -> Attempt:
    return Attempt(number=number, base=COMMIT, **{"adapter": "fake", "started": 10.0, **facts})


BUILT = attempt(ended=30.0, outcome="built")
CRASHED = attempt(ended=30.0, outcome="crashed")
PLANNED = PhaseRecord(phase="plan", status=PhaseStatus.COMPLETED, attempts=(1,))


def view(entries: Mapping[str, DispatchEntry], attempts: int = 3, capacity: int = 2) -> LiveRun:
    run = RunDocument(
        id="run", config="c", repo="/r", is_url=False, base="main", target="main", capacity=capacity, session_memory=1,
        adapters={}, tasks=tuple(entries), start=COMMIT, hub="/h", started=0.0,
    )  # fmt: skip
    record = RunRecord(run, {task: TaskDocument() for task in entries}, entries, {})
    return LiveRun(record, dict.fromkeys(entries, attempts))


def record(task: str, document: TaskDocument, at: float = 30.0) -> CommitRecord:
    return CommitRecord(1, at, {Key("task", f"run/{task}"): (1, document.model_dump(mode="json"))}, [])


def event(type_: str, at: float = 30.0, **data: Any) -> CommitRecord:
    return CommitRecord(1, at, {}, [Event(type_, {"run": "run", **data})])


def tasks(count: int, **facts: Any) -> dict[str, DispatchEntry]:
    return {f"t{number}": DispatchEntry(adapter="fake", **facts) for number in range(count)}


def row(frame: TableFrame, task: str) -> TaskRow:
    return next(one for one in frame.rows if one.task == task)


@pytest.mark.parametrize(
    ("document", "is_blocked", "expected"),
    [
        (TaskDocument(), False, "waiting"),
        (TaskDocument(), True, "blocked"),
        (TaskDocument(attempts=(BUILT,)), False, "retry"),
        (TaskDocument(status=TaskStatus.RUNNING), False, "build"),
        (TaskDocument(status=TaskStatus.QUEUED), False, "queued"),
        (TaskDocument(status=TaskStatus.CHECKING), False, "checks"),
        (TaskDocument(status=TaskStatus.LANDING), True, "landing"),
        (TaskDocument(status=TaskStatus.NO_CHANGE), False, "no change"),
        (TaskDocument(status=TaskStatus.AWAITING_APPROVAL), False, "approval"),
        (TaskDocument(status=TaskStatus.DONE), False, "done"),
        (TaskDocument(attempts=(BUILT,), phases=(PLANNED,)), False, "waiting"),
        (TaskDocument(attempts=(CRASHED,), phases=(PLANNED,)), False, "retry"),
    ],
)
def test_status_has_its_label(document: TaskDocument, is_blocked: bool, expected: str) -> None:
    """The label depends on the task document and on whether its needs can still land."""
    assert activity_label(document, is_blocked=is_blocked) == expected


def test_every_status_has_a_label() -> None:
    """No status is left without one."""
    assert {activity_label(TaskDocument(status=status)) for status in TaskStatus} >= {"landed", "conflict", "failed"}


def test_row_shows_the_known_facts() -> None:
    """All columns are of the newest attempt."""
    shown = view(tasks(1))
    first = attempt(1, ended=12.0, outcome="crashed", reason="the program ended\nwith exit code 3")
    shown.apply(record("t0", TaskDocument(attempts=(first,), failures=1, reason=first.reason), 12.0))
    waits = shown.frame(13.0, 10).rows[0]
    assert (waits.activity, waits.attempt, waits.elapsed) == ("retry", "1/3", "")
    assert waits.words == "the program ended: with exit code 3"
    second = TaskDocument(status=TaskStatus.RUNNING, attempts=(first, attempt(2, started=20.0)), failures=1)
    shown.apply(record("t0", second))
    shown.activity.on_transcript(ObservedSession("t0", 1, "fake"), Transcript(last_message="too late"))
    shown.activity.on_changes(ObservedSession("t0", 1, "fake"), Changes(9, 9, 9))
    assert shown.frame(20.0, 10).rows[0].words == ""
    shown.activity.on_transcript(
        ObservedSession("t0", 2, "fake"), Transcript(last_message="Reading it", input_tokens=1500, cost=0.5)
    )
    shown.activity.on_changes(ObservedSession("t0", 2, "fake"), Changes(1, 12, 3))
    frame = shown.frame(95.0, 10)
    assert frame.rows == [TaskRow("t0", "build", "fake", "2/3", "1:15", Changes(1, 12, 3), "Reading it")]
    assert frame.totals == "0 landed · 1 running · 1:35 · 1 of 2 sessions · +12 -3 · 1.5k tokens · $0.50"


def test_unlanded_tasks_are_counted_by_status() -> None:
    """As in `status`: conflicts and cancelled tasks are not failures."""
    shown = view(tasks(3))
    ends = (TaskStatus.FAILED, TaskStatus.CONFLICT, TaskStatus.CANCELLED)
    for number, status in enumerate(ends):
        shown.apply(record(f"t{number}", TaskDocument(status=status, attempts=(BUILT,), reason="no")))
    totals = shown.frame(40.0, 10).totals
    assert "1 conflict · 1 failed · 1 cancelled" in totals or "1 failed · 1 conflict · 1 cancelled" in totals, totals


def test_counts_follow_the_records() -> None:
    """Dependents of a failed task are blocked until it is retried."""
    entries = {**tasks(3), "child": DispatchEntry(("t0",)), "grandchild": DispatchEntry(("child",))}
    shown = view(entries)
    shown.apply(record("t0", TaskDocument(status=TaskStatus.FAILED, attempts=(BUILT,), reason="no")))
    shown.apply(record("t1", TaskDocument(status=TaskStatus.LANDED, attempts=(BUILT,), landed=COMMIT)))
    totals = shown.totals(40.0)
    assert (totals.landed, totals.failed, totals.blocked, totals.waiting) == (1, 1, 2, 1)
    assert row(shown.frame(40.0, 10), "child").words == "needs 't0', which did not land"
    assert row(shown.frame(40.0, 10), "t1").words == "0123456789 on main"
    shown.apply(record("t0", TaskDocument(attempts=(BUILT,))))
    totals = shown.totals(40.0)
    assert (totals.landed, totals.failed, totals.blocked, totals.waiting) == (1, 0, 0, 4)


def test_row_shows_phase_and_adapter() -> None:
    """Each phase has its own attempts; the phase name replaces `build`."""
    shown = view(tasks(1))
    plan = PLANNED.model_copy(update={"status": PhaseStatus.IN_PROGRESS, "attempts": (1, 2)})
    two = (BUILT, attempt(2, adapter="planner", phase="plan"))
    shown.apply(record("t0", TaskDocument(status=TaskStatus.RUNNING, attempts=two, phases=(plan,))))
    one = shown.frame(40.0, 10).rows[0]
    assert (one.activity, one.phase, one.adapter, one.attempt) == ("build", "plan", "planner", "1/3")
    assert shown.activity.working() == [ObservedSession("t0", 2, "planner")]
    drawn = "".join(segment.text for line in frame_lines(shown.frame(40.0, 10), 100) for segment in line)
    assert "plan  " in drawn
    assert "build" not in drawn


def test_row_awaiting_approval_has_the_command() -> None:
    """It is counted separately, before queued tasks; no time left is shown."""
    shown = view({**tasks(6), "asks": DispatchEntry(adapter="fake")})
    shown.apply(record("t0", TaskDocument(status=TaskStatus.LANDED, attempts=(BUILT,), landed=COMMIT)))
    assert shown.totals(40.0).left is not None
    asks = PLANNED.model_copy(update={"status": PhaseStatus.AWAITING_APPROVAL})
    said = attempt(ended=30.0, outcome="completed", last_message="Here it is.")
    shown.apply(record("asks", TaskDocument(status=TaskStatus.AWAITING_APPROVAL, attempts=(said,), phases=(asks,))))
    one = row(shown.frame(40.0, 3), "asks")
    assert (one.activity, one.words) == (
        "approval",
        "`council approve asks`, or `council reject asks --note TEXT`: Here it is.",
    )
    totals = shown.totals(40.0)
    assert (totals.asked, totals.waiting, totals.left) == (1, 5, None)
    assert "1 to be approved" in shown.frame(40.0, 3).totals


def test_done_task_unblocks_others_and_is_not_a_failure() -> None:
    """It has a count of its own; its dependents do not wait for a landing."""
    shown = view({**tasks(1), "child": DispatchEntry(("t0",))})
    assert row(shown.frame(40.0, 10), "child").words == "waits for 't0'"
    shown.apply(record("t0", TaskDocument(status=TaskStatus.DONE, attempts=(BUILT,), phases=(PLANNED,))))
    assert row(shown.frame(40.0, 10), "child").words == ""
    totals = shown.totals(40.0)
    assert (totals.landed, totals.done, totals.failed, totals.blocked) == (0, 1, 0, 0)
    assert shown.frame(40.0, 10).totals.startswith("0 landed · 1 done · 0 running")


def test_lines_are_counted_once() -> None:
    """Lines of the commit replace those of the session; a new attempt starts at zero."""
    shown = view(tasks(2))
    for task in ("t0", "t1"):
        shown.apply(record(task, TaskDocument(status=TaskStatus.RUNNING, attempts=(attempt(),))))
        shown.activity.on_changes(ObservedSession(task, 1, "fake"), Changes(1, 10, 1))
    assert shown.totals(30.0).changes == Changes(2, 20, 2)
    assert shown.activity.uncounted_commits(10) == {}
    shown.apply(record("t0", TaskDocument(status=TaskStatus.LANDED, attempts=(BUILT,), landed=COMMIT)))
    assert shown.activity.uncounted_commits(10) == {"t0": COMMIT}
    shown.activity.on_changes(ObservedSession("t0", 1, "fake"), Changes(9, 9, 9))  # a slow scan
    shown.activity.count("t0", Changes(2, 30, 0))
    assert shown.activity.uncounted_commits(10) == {}
    shown.apply(record("t1", TaskDocument(status=TaskStatus.RUNNING, attempts=(BUILT, attempt(2)))))
    assert shown.totals(30.0).changes == Changes(2, 30, 0)


def test_built_work_is_counted_again_once() -> None:
    """A session may end between two scans: its work is scanned until it was counted or has landed."""
    shown = view(tasks(1))
    shown.apply(record("t0", TaskDocument(status=TaskStatus.RUNNING, attempts=(attempt(),))))
    assert shown.activity.built() == []
    shown.apply(record("t0", TaskDocument(status=TaskStatus.QUEUED, attempts=(BUILT,))))
    assert (shown.activity.built(), shown.activity.working()) == ([ObservedSession("t0", 1, "fake")], [])
    shown.apply(record("t0", TaskDocument(status=TaskStatus.CHECKING, attempts=(BUILT,))))
    shown.activity.on_changes(ObservedSession("t0", 1, "fake"), Changes(1, 2, 0))
    assert shown.activity.built() == []
    assert shown.frame(40.0, 5).rows[0].changes == Changes(1, 2, 0)


@pytest.mark.parametrize("branch", ["council/run/t0/1", None])
def test_work_of_a_failed_session_is_counted_again_once(branch: str | None) -> None:
    shown = view(tasks(1))
    shown.apply(record("t0", TaskDocument(status=TaskStatus.RUNNING, attempts=(attempt(),))))
    shown.activity.on_changes(ObservedSession("t0", 1, "fake"), Changes(1, 2, 0))
    crashed = attempt(ended=30.0, outcome="crashed", branch=branch)
    shown.apply(record("t0", TaskDocument(status=TaskStatus.FAILED, attempts=(crashed,), branch=branch)))
    assert shown.activity.built() == ([] if branch is None else [ObservedSession("t0", 1, "fake")])
    assert shown.frame(40.0, 5).rows[0].changes == (Changes() if branch is None else Changes(1, 2, 0))


def test_resumed_run_counts_active_time_and_capacity() -> None:
    """`elapsed` is the active time of processes; the capacity is limited by the machine."""
    shown = view(tasks(1), capacity=8)
    for number, since, ended in ((1, 0.0, 20.0), (2, 1000.0, None)):
        joined = orchestrator(number, since, since, ended=ended).model_dump(mode="json")
        shown.apply(CommitRecord(number, since, {Key("orchestrator", f"run/{number}"): (1, joined)}, []))
    shown.apply(event("run.leader_elected", 1000.0))
    shown.apply(event("run.capacity_limited", 1001.0, sessions=3))
    shown.apply(CommitRecord(2, 1002.0, {}, [Event("run.capacity_limited", {"run": "another", "sessions": 1})]))
    totals = shown.totals(1030.0)
    assert (totals.elapsed, totals.capacity, shown.is_finished) == (50.0, 3, False)
    shown.apply(record("t0", TaskDocument(status=TaskStatus.RUNNING, attempts=(attempt(),))))
    shown.apply(event("run.capacity_limited", sessions=1))  # memory is short for a while
    assert shown.totals(1030.0).capacity == 3
    shown.apply(event("run.finished"))
    assert shown.is_finished


def test_sessions_of_other_processes_do_not_use_our_capacity() -> None:
    """Each process has its own capacity."""
    shown = view(tasks(3), capacity=2)
    for number in range(3):
        assert "of 2 sessions" in shown.frame(50.0, 5).totals
        shown.apply(record(f"t{number}", TaskDocument(status=TaskStatus.RUNNING, attempts=(attempt(),))))
    assert shown.frame(50.0, 5).totals.endswith(" · 3 sessions")


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        (RemainingWork(60, 0, [], waiting=10, landing=0, chain=1, capacity=2), 300),  # concurrently
        (RemainingWork(60, 0, [], waiting=10, landing=0, chain=8, capacity=10), 480),  # one after another
        (RemainingWork(60, 30, [], waiting=10, landing=10, chain=1, capacity=10), 600),  # landings
        (
            RemainingWork(60, 10, [(3, 45.0)], waiting=2, landing=0, chain=2, capacity=4),
            155,
        ),  # the chain of the running task
        (
            RemainingWork(60, 0, [(1, 90.0)], waiting=0, landing=0, chain=0, capacity=4),
            0,
        ),  # it exceeded the average
        (RemainingWork(60, 5, [], waiting=0, landing=2, chain=0, capacity=4), 10),
        (RemainingWork(0, 0, [], waiting=0, landing=0, chain=0, capacity=0), 0),
    ],
)
def test_time_left_is_the_greatest_of_three_bounds(ahead: RemainingWork, expected: float) -> None:
    """Total work over capacity, the longest chain of needs, and sequential landings."""
    assert estimate_time_left(ahead) == expected


def test_time_left_is_shown_only_if_known() -> None:
    """Not before the first built task, with an unavailable adapter, or at the end."""
    shown = view({**tasks(3), "last": DispatchEntry(("t2",))}, capacity=1)
    assert shown.totals(30.0).left is None
    shown.apply(record("t0", TaskDocument(status=TaskStatus.QUEUED, attempts=(BUILT,)), 30.0))
    assert shown.totals(30.0).left == 60  # three tasks of 20 s
    shown.apply(record("t0", TaskDocument(status=TaskStatus.LANDED, attempts=(BUILT,), landed=COMMIT), 40.0))
    assert shown.totals(40.0).left == 60 + 0  # the chain of two takes as long: 2 * (20 + 10)
    for learned in (AdapterDocument(cooldown_until=100.0), AdapterDocument(disabled_reason="log in")):
        shown.apply(CommitRecord(1, 1.0, {Key("adapter", "run/fake"): (1, learned.model_dump(mode="json"))}, []))
        assert shown.totals(50.0).left is None
    assert "left" not in shown.frame(50.0, 5).totals
    shown.apply(CommitRecord(1, 1.0, {Key("adapter", "run/fake"): (1, AdapterDocument().model_dump(mode="json"))}, []))
    assert shown.frame(50.0, 5).totals.endswith("about 1 min left · 0 of 1 sessions")


def test_chains_follow_needs() -> None:
    """The longest path from a task to its last dependent, counting all tasks on it."""
    entries = {
        "a": DispatchEntry(),
        "b": DispatchEntry(("a",)),
        "c": DispatchEntry(("b", "a")),
        "d": DispatchEntry(("a",)),
        "e": DispatchEntry(),
    }
    assert longest_chains(entries) == {"a": 3, "b": 2, "c": 1, "d": 1, "e": 1}


@pytest.mark.parametrize(
    ("working", "waiting", "over", "room", "expected"),
    [
        ("ab", "cd", "ef", 9, "abefcd"),  # all fit
        ("abcd", "ef", "gh", 3, "abc"),  # active tasks first
        ("ab", "cdefg", "hijkl", 6, "abhicd"),  # halves
        ("ab", "c", "hijkl", 6, "abhijc"),  # unused rows go to changed tasks
        ("ab", "cdefg", "h", 6, "abhcde"),
        ("ab", "cd", "ef", 0, ""),
    ],
)
def test_visible_rows_are_active_or_recently_changed(
    working: str, waiting: str, over: str, room: int, expected: str
) -> None:
    """Active tasks first, then half each to the last changed and to the next ones."""
    assert "".join(choose_rows(working, waiting, over, room)) == expected


def test_long_run_is_summarized() -> None:
    """Rows keep file order; hidden tasks are counted once."""
    shown = view(tasks(100), capacity=2)
    for number in range(50):
        landed = TaskDocument(status=TaskStatus.LANDED, attempts=(BUILT,), landed=COMMIT)
        shown.apply(record(f"t{number}", landed, 30.0 + number))
    shown.apply(record("t77", TaskDocument(status=TaskStatus.RUNNING, attempts=(attempt(),))))
    shown.apply(record("t60", TaskDocument(attempts=(BUILT,), reason="no")))
    shown.apply(record("t3", TaskDocument(status=TaskStatus.FAILED, attempts=(BUILT,), reason="lost")))
    frame = shown.frame(99.0, 8)
    assert [one.task for one in frame.rows] == ["t3", "t48", "t49", "t50", "t51", "t60", "t77"]
    assert frame.more == "and 46 waiting, 47 landed"
    assert shown.frame(99.0, 0).rows == []
    assert len(shown.frame(99.0, 200).rows) == 100
    assert shown.frame(99.0, 200).more == ""


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "about 5 s"), (38, "about 40 s"), (55, "about 55 s"), (56, "about 1 min"), (200, "about 4 min"),
     (3601, "about 1 h 10 min"), (7200, "about 2 h"), (7201, "about 2 h 10 min")],
)  # fmt: skip
def test_time_left_is_formatted(seconds: float, expected: str) -> None:
    """Rounded up, and no more precise than the estimate."""
    assert format_estimate(seconds) == expected


def test_durations_and_amounts_are_formatted() -> None:
    """Clock notation, and numbers as people write them."""
    assert [format_elapsed(one) for one in (-1, 0.9, 42, 723, 3723)] == ["0:00", "0:00", "0:42", "12:03", "1:02:03"]
    assert [format_count(one) for one in (0, 950, 12_345, 4_500_000)] == ["0", "950", "12.3k", "4.5M"]


@pytest.mark.parametrize("width", [1, 10, 20, 45, 60, 80, 120, 200])
def test_lines_fit_the_terminal(width: int) -> None:
    """For any text including wide characters; columns are dropped before words, without trailing blanks."""
    rows = [
        TaskRow("t" * 50, "build", "adapter" * 5, "1/3", "0:01", Changes(1, 2, 3), "漢字" * 100),
        TaskRow("x", "x", "x", "x", "x", Changes(), ""),
    ]
    lines = [Segment.get_line_length(line) for line in frame_lines(TableFrame(rows, "and 3 landed", "0 landed"), width)]
    assert len(lines) == 5
    assert max(lines) <= width
    texts = ["".join(part.text for part in line) for line in frame_lines(TableFrame(rows, "", "totals"), width)]
    assert all(text == text.rstrip() for text in texts)
    if width >= 80:
        assert all(cell_len(text) <= width for text in texts)
        assert "漢" in texts[1]


def test_narrower_terminal_wraps_counted_rows() -> None:
    assert count_wrapped_rows([80, 40, 0, 41], 40) == 2 + 1 + 1 + 2


def test_terminal_sequences_are_escaped() -> None:
    """Escape sequences and markup are displayed literally."""
    shown = view({"t0": DispatchEntry(adapter="fake")})
    shown.apply(record("t0", TaskDocument(status=TaskStatus.RUNNING, attempts=(attempt(),))))
    shown.activity.on_transcript(
        ObservedSession("t0", 1, "fake"),
        Transcript(last_message="\x1b]0;owned\x07\x1b[31m[red]stop[/red]\u202e\r\x9b2J"),
    )
    line = frame_lines(shown.frame(20.0, 5), 120)[1]
    text = "".join(part.text for part in line)
    assert text.isprintable()
    assert "[red]stop[/red]" in text


def test_ten_thousand_tasks_are_redrawn_quickly() -> None:
    """With all of them recorded a change and a redraw take milliseconds; a redraw parses no documents."""
    entries = {
        f"t{number}": DispatchEntry((f"t{number - 1}",) if number % 3 else (), "fake") for number in range(10_000)
    }
    shown = view(entries, capacity=16)
    for number in range(5_000):
        landed = TaskDocument(status=TaskStatus.LANDED, attempts=(BUILT,), landed=COMMIT)
        shown.apply(record(f"t{number}", landed, 30.0 + number))
    for number in range(5_000, 5_016):
        shown.apply(record(f"t{number}", TaskDocument(status=TaskStatus.RUNNING, attempts=(attempt(),))))

    def redraw() -> float:
        began = time.thread_time()
        shown.apply(record("t5000", TaskDocument(status=TaskStatus.RUNNING, attempts=(attempt(),))))
        assert len(frame_lines(shown.frame(9_000.0, 48), 160)) == 50
        return time.thread_time() - began

    assert min(redraw() for _ in range(10)) < 0.020


def test_subtasks_have_rows_after_their_task() -> None:
    """The task waits for them, is blocked by a failed one, and its row names it."""
    shown = view(tasks(2))
    planned = TaskDocument(attempts=(BUILT,), subtasks=("t0-a", "t0-b"))
    run = shown.run.model_copy(update={"tasks": ("t0", "t0-a", "t0-b", "t1")})
    spec = {"adapter": "fake", "attempts": 2, "needs": []}
    documents = {
        Key("task", "run/t0"): (2, planned.model_dump(mode="json")),
        Key("run", "run"): (2, run.model_dump(mode="json")),
        **{Key("spec", f"run/t0-{name}"): (1, spec) for name in "ab"},
        **{Key("task", f"run/t0-{name}"): (1, TaskDocument().model_dump(mode="json")) for name in "ab"},
    }
    shown.apply(CommitRecord(1, 30.0, documents, []))
    assert [one.task for one in shown.frame(31.0, 10).rows] == ["t0", "t0-a", "t0-b", "t1"]
    shown.apply(record("t0-a", TaskDocument(status=TaskStatus.RUNNING, attempts=(attempt(1, started=31.0),)), 31.0))
    assert row(shown.frame(40.0, 10), "t0-a").attempt == "1/2"
    shown.apply(record("t0-a", TaskDocument(status=TaskStatus.FAILED, attempts=(BUILT,)), 41.0))
    assert row(shown.frame(42.0, 10), "t0").activity == "blocked"


@pytest.mark.parametrize(
    "document",
    [
        TaskDocument(),
        TaskDocument(status=TaskStatus.RUNNING, attempts=(attempt(),), reason="of an earlier attempt"),
        TaskDocument(status=TaskStatus.FAILED, attempts=(BUILT, CRASHED), failures=2, reason="it crashed"),
        TaskDocument(status=TaskStatus.LANDED, attempts=(BUILT,), landed=COMMIT, reason="already there"),
    ],
)
def test_row_agrees_with_the_report_of_the_run(document: TaskDocument) -> None:
    """The table and `status` show one projection: the adapter, the counted attempts and the reason."""
    failed = TaskDocument(status=TaskStatus.FAILED, attempts=(CRASHED,), failures=1)
    shown = view({"need": DispatchEntry(adapter="fake"), "t0": DispatchEntry(("need",), "fake")})
    shown.apply(record("need", failed))
    shown.apply(record("t0", document))
    entries = {"need": DispatchEntry(adapter="fake"), "t0": DispatchEntry(("need",), "fake")}
    report = build_report(
        RunRecord(shown.run, {"need": failed, "t0": document}, entries, {}),
        logs=Path("/logs"), repository=Path("/r"), has_ended=False, is_live=True, now=40.0,
    ).tasks[1]  # fmt: skip
    one = row(shown.frame(40.0, 10), "t0")
    assert one.adapter == report.adapter
    assert one.attempt == (f"{report.attempts}/3" if report.attempts else "")
    assert one.words == (f"{COMMIT[:10]} on main" if report.landed else report.reason or "")
    assert (one.activity == "blocked") == (report.status == "blocked")
