"""Pure decisions of the domain, by tables."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.domain.runs.model import AdapterDocument, Attempt, RunDocument, TaskDocument, apply_trigger
from orchestrator.domain.runs.outcome import (
    Built,
    Failed,
    Interrupted,
    Outcome,
    ProcessExit,
    ResourcesExhausted,
    SessionLimits,
    classify_outcome,
)
from orchestrator.domain.runs.retry import (
    COOLDOWN_BACKOFF,
    MAX_COOLDOWN,
    compute_cooldown_end,
    decide_retry,
    retry_delay,
)
from orchestrator.domain.runs.statuses import (
    FINAL_STATUSES,
    RETRYABLE_STATUSES,
    SUCCESS_STATUSES,
    TRANSITIONS,
    TaskStatus,
    Trigger,
)
from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry
from orchestrator.domain.settings.failures import (
    RETRIED_BY_DEFAULT,
    RETRYABLE,
    FailureClass,
    FailurePolicy,
    get_failure_policy,
)
from orchestrator.domain.settings.run_settings import Backoff
from orchestrator.engine.reports.report import AdapterReport, RunRecord, RunReport, RunStatus, build_report
from orchestrator.errors import InvalidTransition, RefusedError
from orchestrator.system.clock import format_local_time

DIAMOND = {"a": DispatchEntry(), "b": DispatchEntry(("a",)), "c": DispatchEntry(("a",)), "d": DispatchEntry(("b", "c"))}


def started(board: DispatchBoard, free: int, now: float = 0.0) -> list[str]:
    """Return the tasks that a decision starts."""
    return board.choose_tasks(free, now)


@pytest.mark.parametrize(("status", "trigger"), [*itertools.product(TaskStatus, Trigger)])
def test_transition_exists_for_expected_pairs_only(status: TaskStatus, trigger: Trigger) -> None:
    """A missing pair raises; only people and target checks change a final status."""
    task = TaskDocument(status=status)
    if (status, trigger) in TRANSITIONS:
        leaves = TRANSITIONS[status, trigger] is not status
        by_others = {Trigger.DROP} if status in SUCCESS_STATUSES else {Trigger.REQUEST_RETRY, Trigger.ADOPT}
        assert status not in FINAL_STATUSES or not leaves or trigger in by_others
        assert trigger is not Trigger.REQUEST_RETRY or status in RETRYABLE_STATUSES
        assert apply_trigger("task", task, trigger, reason="why") == TaskDocument(
            status=TRANSITIONS[status, trigger], reason="why"
        )
    else:
        with pytest.raises(InvalidTransition) as raised:
            apply_trigger("task 'x'", task, trigger)
        assert (raised.value.state, raised.value.trigger) == (status, trigger)


def test_every_status_is_reachable() -> None:
    """Every status of the table has a way in."""
    reached, before = {TaskStatus.PENDING}, set[TaskStatus]()
    while reached != before:
        before = set(reached)
        reached |= {after for (status, _), after in TRANSITIONS.items() if status in before}
    assert reached == set(TaskStatus)


def test_tasks_start_in_file_order_within_capacity() -> None:
    """At most the free capacity is used."""
    board = DispatchBoard({"c": DispatchEntry(), "a": DispatchEntry(), "b": DispatchEntry()})
    assert board.choose_tasks(2, 0.0) == ["c", "a"]
    assert started(board, 0) == []
    assert started(board, 5) == ["b"]
    assert started(board, 5) == []


def test_need_must_have_landed() -> None:
    """All needs of a dependent must have landed."""
    board = DispatchBoard(DIAMOND)
    assert started(board, 9) == ["a"]
    board.landed("a")
    assert started(board, 9) == ["b", "c"]
    board.landed("b")
    assert started(board, 9) == []
    board.landed("c")
    assert started(board, 9) == ["d"]


def test_need_named_twice_counts_once() -> None:
    """`needs: [a, a]` waits for one landing."""
    board = DispatchBoard({"a": DispatchEntry(), "b": DispatchEntry(("a", "a"))})
    started(board, 9)
    board.landed("a")
    assert started(board, 9) == ["b"]


def test_dependent_of_a_failed_task_is_blocked() -> None:
    """Blocks propagate through the graph; each task names its direct need."""
    board = DispatchBoard(DIAMOND | {"free": DispatchEntry()})
    assert started(board, 1) == ["a"]
    board.ended("a")
    assert board.blocked == {"b": "a", "c": "a", "d": "c"}
    assert started(board, 9) == ["free"]
    assert not board.forecast.has_work()


def test_blocked_task_stays_blocked_when_another_need_lands() -> None:
    """One failed need is enough."""
    board = DispatchBoard({"a": DispatchEntry(), "b": DispatchEntry(), "c": DispatchEntry(("a", "b"))})
    started(board, 9)
    board.ended("a")
    board.landed("b")
    assert started(board, 9) == []


def test_waiting_task_starts_at_its_time() -> None:
    """Neither earlier nor later."""
    board = DispatchBoard({"a": DispatchEntry(), "b": DispatchEntry()})
    assert started(board, 9) == ["a", "b"]
    board.wait("a", until=10.0)
    assert board.forecast.next_time() == 10.0
    assert board.forecast.has_work()
    assert started(board, 9, now=9.99) == []
    assert started(board, 9, now=10.0) == ["a"]
    assert board.forecast.next_time() is None


@pytest.mark.parametrize(
    ("statuses", "starts", "blocked"),
    [
        ({}, ["a"], {}),
        ({"a": TaskStatus.LANDED}, ["b", "c"], {}),
        ({"a": TaskStatus.LANDED, "b": TaskStatus.QUEUED}, ["c"], {}),
        ({"a": TaskStatus.LANDED, "b": TaskStatus.LANDING, "c": TaskStatus.RUNNING}, [], {}),
        ({"a": TaskStatus.LANDED, "b": TaskStatus.LANDED, "c": TaskStatus.LANDED}, ["d"], {}),
        ({"a": TaskStatus.LANDED, "b": TaskStatus.CONFLICT}, ["c"], {"d": "b"}),
        ({"a": TaskStatus.NO_CHANGE}, [], {"b": "a", "c": "a", "d": "c"}),
    ],
)
def test_board_of_an_active_run_is_restored(
    statuses: dict[str, TaskStatus], starts: list[str], blocked: dict[str, str]
) -> None:
    """A board built from task documents continues with their statuses."""
    full = {task: statuses.get(task, TaskStatus.PENDING) for task in DIAMOND}
    board = DispatchBoard.of(DIAMOND, full)
    assert started(board, 9) == starts
    assert board.blocked == blocked


@pytest.mark.parametrize(("failures", "delay"), [(1, 2.0), (2, 6.0), (3, 18.0), (4, 50.0), (5, 50.0), (5_000, 50.0)])
def test_backoff_grows_to_its_limit(failures: int, delay: float) -> None:
    """Without jitter the wait is `initial` times `factor` for each attempt, up to `max`."""
    assert retry_delay(Backoff(initial=2.0, factor=3.0, max=50.0, jitter=False), failures) == delay


def test_jitter_is_between_zero_and_the_full_wait() -> None:
    """The limit is that of the wait without jitter."""
    drawn = [retry_delay(Backoff(initial=2.0, factor=2.0, max=5.0, jitter=True), 4) for _ in range(200)]
    assert all(0 <= delay <= 5.0 for delay in drawn)
    assert max(drawn) - min(drawn) > 2.0


@pytest.mark.parametrize(
    ("failure", "failures", "delay"),
    [
        (FailureClass.CRASHED, 1, 2.0),
        (FailureClass.CRASHED, 2, 4.0),
        (FailureClass.CRASHED, 3, None),
        (FailureClass.NO_CHANGE, 1, None),
        (FailureClass.RATE_LIMITED, 1, None),
    ],
)
def test_decide_retry_follows_the_class_and_the_number_of_attempts(
    failure: FailureClass, failures: int, delay: float | None
) -> None:
    """Retryable classes wait longer for each attempt until none is left; other classes end the task."""
    backoff = Backoff(initial=2.0, factor=2.0, max=300.0, jitter=False)
    assert decide_retry(failure, failures, 3, {FailureClass.CRASHED}, backoff) == delay


@pytest.mark.parametrize(
    ("until", "cooldowns", "waits"),
    [
        (None, 1, 30.0),
        (None, 3, 120.0),
        (None, 50, 3600.0),
        (500.0, 1, 500.0),
        (-500.0, 1, 1.0),
        (-500.0, 2, 30.0),
        (10.0, 4, 120.0),
        (1e12, 1, MAX_COOLDOWN),
    ],
)
def test_cooldown_lasts_at_least_until_the_reported_end(until: float | None, cooldowns: int, waits: float) -> None:
    """A reported end counts, but less after each time that it proved wrong."""
    now = 1_000_000.0
    assert compute_cooldown_end(now, None if until is None else now + until, cooldowns) == now + waits
    assert COOLDOWN_BACKOFF.initial == 30.0


@pytest.mark.parametrize("failure", FailureClass)
def test_every_failure_class_has_a_policy(failure: FailureClass) -> None:
    """A usage limit parks the adapter, a missing login or program disables it, other classes follow the task."""
    fixed = {
        FailureClass.RATE_LIMITED: FailurePolicy.COOLDOWN,
        FailureClass.AUTH: FailurePolicy.DISABLE,
        FailureClass.MISSING: FailurePolicy.DISABLE,
    }
    for retried in (frozenset(FailureClass), frozenset[FailureClass](), RETRIED_BY_DEFAULT):
        expected = fixed.get(failure, FailurePolicy.RETRY if failure in retried else FailurePolicy.FAIL)
        assert get_failure_policy(failure, retried) is expected
    others = {FailureClass.CHECKS_FAILED, FailureClass.CONFLICT, FailureClass.OUT_OF_SCOPE, FailureClass.REJECTED}
    assert (failure in RETRYABLE) == (failure not in {*fixed, *others})


ENDED_WELL = ProcessExit(0, None, "exit", None)
BUSY = Failed(FailureClass.OVERLOADED, "too busy")
CRASHED = FailureClass.CRASHED


@pytest.mark.parametrize(
    ("exit_", "commit", "refused", "verdict", "outcome"),
    [
        (ENDED_WELL, "c", None, None, Built("c")),
        (ENDED_WELL, "c", None, BUSY, Built("c")),
        (
            ENDED_WELL,
            None,
            None,
            None,
            Failed(FailureClass.NO_CHANGE, "the program succeeded but changed nothing"),
        ),
        (ENDED_WELL, None, None, BUSY, BUSY),
        (ENDED_WELL, "c", "too big", None, Failed(FailureClass.REFUSED, "too big")),
        (ProcessExit(3, None, "exit", None), "c", None, None, Failed(CRASHED, "the program ended with exit code 3")),
        (ProcessExit(3, None, "exit", None), "c", "too big", BUSY, BUSY),
        (ProcessExit(None, 9, "exit", None), "c", None, None, Failed(CRASHED, "the program got signal 9")),
        (ProcessExit(0, None, "stop", None), "c", None, BUSY, Interrupted("the run was stopped")),
        (ProcessExit(None, 9, "orphaned", None), "c", None, None, Interrupted("the run was stopped")),
        (
            ProcessExit(None, None, "exit", "no memory", exhausted=True),
            None,
            None,
            None,
            ResourcesExhausted("the program could not be started: no memory"),
        ),
        (
            ProcessExit(None, None, "exit", "/x: No such file or directory", missing=True),
            None,
            None,
            None,
            Failed(FailureClass.MISSING, "the program was not found: /x: No such file or directory"),
        ),
    ],
)
def test_outcome_is_determined(
    exit_: ProcessExit, commit: str | None, refused: str | None, verdict: Failed | None, outcome: Outcome
) -> None:
    """A zero exit with a change is built; a reported failure counts, a reported success does not; the rest failed."""
    assert classify_outcome(exit_, SessionLimits(60.0), commit, refused, verdict) == outcome


def test_exit_code_is_explained_by_the_last_line_of_stderr() -> None:
    failed, limits = ProcessExit(2, None, "exit", None), SessionLimits(60.0)
    result = classify_outcome(failed, limits, None, None, None, errors="started\n sh: no such file \n\n")
    assert result == Failed(CRASHED, "the program ended with exit code 2: sh: no such file")
    ruled = classify_outcome(failed, limits, None, None, None, errors="  | OSError: no room\n  +-----------\n")
    assert ruled == Failed(CRASHED, "the program ended with exit code 2: | OSError: no room")
    cut = classify_outcome(failed, limits, None, None, None, errors="x" * 999)
    assert cut == Failed(CRASHED, f"the program ended with exit code 2: {'x' * 300}")
    assert classify_outcome(failed, limits, None, None, BUSY, errors="no\n") == BUSY


@pytest.mark.parametrize(("commit", "refused"), [("c", None), (None, None), ("c", "it contains a secret")])
def test_reported_failure_counts_despite_changes(commit: str | None, refused: str | None) -> None:
    """Despite a zero exit as well; a stop remains a stop."""
    limits = SessionLimits(60.0)
    assert (
        classify_outcome(ProcessExit(0, None, "exit", None), limits, commit, refused, BUSY, reported_failure=True)
        == BUSY
    )
    assert isinstance(
        classify_outcome(ProcessExit(0, None, "stop", None), limits, commit, refused, BUSY, reported_failure=True),
        Interrupted,
    )


def test_unfinished_session_failed_despite_changes() -> None:
    """A zero exit without the closing line of the program is a failure; text alone does not count."""
    limits = SessionLimits(60.0)
    cut = replace(BUSY, unfinished=True)
    assert classify_outcome(ProcessExit(0, None, "exit", None), limits, "c", None, cut) == cut
    assert classify_outcome(ProcessExit(0, None, "exit", None), limits, "c", None, BUSY) == Built("c")


@pytest.mark.parametrize(
    ("exit_", "failure", "fragment"),
    [
        (ProcessExit(None, 15, "timeout", None), FailureClass.TIMEOUT, "90 s"),
        (ProcessExit(0, None, "idle_timeout", None), FailureClass.IDLE_TIMEOUT, "7 s"),
        (ProcessExit(None, None, "exit", "no such file"), FailureClass.INVALID, "no such file"),
    ],
)
def test_limit_and_missing_program_are_named(exit_: ProcessExit, failure: FailureClass, fragment: str) -> None:
    """The failure has the class, and its reason names the setting to change."""
    judged = classify_outcome(exit_, SessionLimits(90.0, 7.0), "c", None, BUSY)
    assert isinstance(judged, Failed)
    assert judged.failure is failure
    assert fragment in judged.reason


def record(tasks: dict[str, TaskDocument], entries: dict[str, DispatchEntry], **adapters: AdapterDocument) -> RunRecord:
    """Return the record of a run with these tasks."""
    run = RunDocument(
        id="r", config="c", repo="/r", is_url=False, base="main", target="t", capacity=1, session_memory=1,
        adapters={}, tasks=tuple(tasks), start="0" * 40, hub="/h", started=0.0,
    )  # fmt: skip
    return RunRecord(run, tasks, entries, adapters)


def reported(made: RunRecord, status: RunStatus | None) -> RunReport:
    """Report the run as of second 100."""
    return build_report(
        made,
        logs=Path("/logs"),
        repository=Path("/trusted"),
        has_ended=status is None,
        is_live=status is RunStatus.RUNNING,
        now=100.0,
    )


def test_report_names_the_blocking_task() -> None:
    """It names the missing need; the run is incomplete with exit code 1."""
    attempt = Attempt(number=1, adapter="x", base="0" * 40, started=0.0, outcome="crashed")
    tasks = {
        "a": TaskDocument(status=TaskStatus.FAILED, attempts=(attempt,), reason="it broke", branch="kept"),
        "b": TaskDocument(),
    }
    made = reported(record(tasks, {"a": DispatchEntry(), "b": DispatchEntry(("a",))}), None)
    assert (made.status, made.exit_code, made.to_json()["exit"]) == (RunStatus.INCOMPLETE, 1, 1)
    assert [(task.status, task.failure, task.reason) for task in made.tasks] == [
        ("failed", "crashed", "it broke"),
        ("blocked", None, "needs 'a', which did not land"),
    ]
    assert [task.log for task in made.tasks] == ["/logs/a.1.stderr", None]


def test_report_names_unavailable_adapters() -> None:
    """With the end of a cooldown; a disabled adapter blocks its tasks once nothing runs."""
    entries = {"a": DispatchEntry(adapter="shut"), "b": DispatchEntry(adapter="parked")}
    tasks = {"a": TaskDocument(), "b": TaskDocument()}
    parked, past = AdapterDocument(cooldown_until=200.0, cooldowns=1), AdapterDocument(cooldown_until=99.0, cooldowns=1)
    made = record(tasks, entries, shut=AdapterDocument(disabled_reason="log in"), parked=parked, past=past)
    live, over = reported(made, RunStatus.RUNNING), reported(made, None)
    assert live.adapters == [AdapterReport("shut", None, "log in"), AdapterReport("parked", 200.0, None)]
    assert [task.status for task in live.tasks] == ["pending", "pending"]
    assert [task.status for task in over.tasks] == ["blocked", "pending"]
    assert "log in" in str(over.tasks[0].reason)


def test_report_names_all_awaited_adapters() -> None:
    """Fixing one disabled adapter is enough to continue; cooldowns are named with their ends in any case."""
    entries = {
        "both": DispatchEntry(adapter="shut", fallback=("barred",)),
        "parked": DispatchEntry(adapter="parked"),
        "late": DispatchEntry(adapter="shut", fallback=("later", "parked", "parked")),
        "open": DispatchEntry(adapter="parked", fallback=("past",)),
        "needy": DispatchEntry(("parked",), "parked"),
        "failed": DispatchEntry(adapter="parked"),
    }
    tasks = {task: TaskDocument() for task in entries} | {"failed": TaskDocument(status=TaskStatus.FAILED, reason="no")}
    learned = {name: AdapterDocument(cooldown_until=until) for name, until in (("parked", 200.0), ("later", 300.0))}
    stopped = {name: AdapterDocument(disabled_reason=why) for name, why in (("shut", "log in"), ("barred", "no key"))}
    made = record(tasks, entries, **learned, **stopped, past=AdapterDocument(cooldown_until=99.0))
    live, over = ({task.id: task for task in reported(made, one).tasks} for one in (RunStatus.RUNNING, None))
    assert over["both"].status == "blocked"
    assert all(part in str(over["both"].reason) for part in ("'shut': log in", "'barred': no key", "fix one of them"))
    first, second = format_local_time(200.0), format_local_time(300.0)
    for tasks_by_id in (live, over):
        assert {task.id: task.reason for task in tasks_by_id.values() if task.id != "both"} == {
            "parked": f"waits for adapter 'parked' until {first}",
            "late": f"waits for adapter 'parked' until {first}, or for 'later' until {second}; "
            "'shut' is disabled: log in",
            "open": None,
            "needy": "waits for 'parked'",
            "failed": "no",
        }
        assert tasks_by_id["late"].status == "pending"


@pytest.mark.parametrize(
    ("named", "many", "remedy"),
    [
        ("task9", 1, "did you mean 'task0'?"),
        ("nope", 2, "use one of: task0, task1"),
        ("nope", 7, "use one of: task0, task1, task2, task3, task4 and 2 more, see `council status --run r`"),
    ],
)
def test_unknown_task_is_rejected(named: str, many: int, remedy: str) -> None:
    run = record({f"task{number}": TaskDocument() for number in range(many)}, {}).run
    with pytest.raises(RefusedError) as refused:
        run.check_task(named)
    assert refused.value.remedy == remedy
