"""The pure decisions, by tables."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from orchestrator.domain.dispatch import Board, Start, decide
from orchestrator.domain.lifecycle import TRANSITIONS, Trigger, advance
from orchestrator.domain.model import FINAL, Attempt, RunDocument, TaskDocument, TaskStatus
from orchestrator.domain.outcome import Built, Exit, Failed, Interrupted, Outcome, Unchanged, judge
from orchestrator.domain.retry import Backoff, retry_delay
from orchestrator.engine.report import ReportPlaces, RunStatus, report
from orchestrator.errors import InvalidTransition

DIAMOND = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}


def started(board: Board, free: int, now: float = 0.0) -> list[str]:
    """Return the tasks that a decision starts."""
    return [action.task for action in decide(board, free, now)]


@pytest.mark.parametrize(("status", "trigger"), [*itertools.product(TaskStatus, Trigger)])
def test_every_pair_of_status_and_trigger(status: TaskStatus, trigger: Trigger) -> None:
    """A row leads to its status; a missing row raises; a final status is left only by a rewritten target."""
    task = TaskDocument(status=status)
    if (status, trigger) in TRANSITIONS:
        assert status not in FINAL or trigger is Trigger.LOSE
        assert advance("task", task, trigger, reason="why") == TaskDocument(
            status=TRANSITIONS[status, trigger], reason="why"
        )
    else:
        with pytest.raises(InvalidTransition) as raised:
            advance("task 'x'", task, trigger)
        assert (raised.value.state, raised.value.trigger) == (status, trigger)


def test_every_status_is_reachable() -> None:
    """No status of the table is a room without a door."""
    reached, before = {TaskStatus.PENDING}, set[TaskStatus]()
    while reached != before:
        before = set(reached)
        reached |= {after for (status, _), after in TRANSITIONS.items() if status in before}
    assert reached == set(TaskStatus)


def test_starts_in_the_order_of_the_file_within_capacity() -> None:
    """Ready tasks start in the file's order, never more than are free."""
    board = Board({"c": (), "a": (), "b": ()})
    assert decide(board, 2, 0.0) == [Start("c"), Start("a")]
    assert started(board, 0) == []
    assert started(board, 5) == ["b"]
    assert started(board, 5) == []


def test_a_need_must_have_landed_not_just_ended() -> None:
    """A dependent starts when all that it needs has landed."""
    board = Board(DIAMOND)
    assert started(board, 9) == ["a"]
    board.landed("a")
    assert started(board, 9) == ["b", "c"]
    board.landed("b")
    assert started(board, 9) == []
    board.landed("c")
    assert started(board, 9) == ["d"]


def test_a_need_that_is_named_twice_counts_once() -> None:
    """`needs: [a, a]` does not wait for a second landing."""
    board = Board({"a": (), "b": ("a", "a")})
    started(board, 9)
    board.landed("a")
    assert started(board, 9) == ["b"]


def test_what_needs_a_failed_task_is_blocked_by_it() -> None:
    """The block goes on through the graph, each task naming the need beside it."""
    board = Board(DIAMOND | {"free": ()})
    assert started(board, 1) == ["a"]
    board.ended("a")
    assert board.blocked == {"b": "a", "c": "a", "d": "c"}
    assert started(board, 9) == ["free"]
    assert not board.has_work()


def test_a_blocked_task_stays_blocked_when_its_other_need_lands() -> None:
    """One need in vain is enough."""
    board = Board({"a": (), "b": (), "c": ("a", "b")})
    started(board, 9)
    board.ended("a")
    board.landed("b")
    assert started(board, 9) == []


def test_a_waiting_task_starts_at_its_time() -> None:
    """A task that was put off is neither early nor forgotten."""
    board = Board({"a": (), "b": ()})
    assert started(board, 9) == ["a", "b"]
    board.wait("a", until=10.0)
    assert board.next_time() == 10.0
    assert board.has_work()
    assert started(board, 9, now=9.99) == []
    assert started(board, 9, now=10.0) == ["a"]
    assert board.next_time() is None


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
def test_the_board_of_a_run_under_way(
    statuses: dict[str, TaskStatus], starts: list[str], blocked: dict[str, str]
) -> None:
    """A board that is made from documents goes on where they stand."""
    full = {task: statuses.get(task, TaskStatus.PENDING) for task in DIAMOND}
    board = Board.of(DIAMOND, full)
    assert started(board, 9) == starts
    assert board.blocked == blocked


@pytest.mark.parametrize(("failures", "delay"), [(1, 2.0), (2, 6.0), (3, 18.0), (4, 50.0), (5, 50.0), (5_000, 50.0)])
def test_backoff_grows_to_its_limit(failures: int, delay: float) -> None:
    """Without jitter a wait is `initial`, times `factor` each time, up to `max`."""
    assert retry_delay(Backoff(initial=2.0, factor=3.0, max=50.0, jitter=False), failures) == delay


def test_jitter_spreads_between_nothing_and_the_full_wait() -> None:
    """With jitter waits differ and stay within the same limit."""
    drawn = [retry_delay(Backoff(initial=2.0, factor=2.0, max=5.0, jitter=True), 4) for _ in range(200)]
    assert all(0 <= delay <= 5.0 for delay in drawn)
    assert max(drawn) - min(drawn) > 2.0


ENDED_WELL = Exit("exit", 0, None, None)


@pytest.mark.parametrize(
    ("exit_", "commit", "refused", "outcome"),
    [
        (ENDED_WELL, "c", None, Built("c")),
        (ENDED_WELL, None, None, Unchanged()),
        (ENDED_WELL, "c", "too big", Failed("invalid", "too big")),
        (Exit("exit", 3, None, None), "c", None, Failed("crashed", "the program ended with exit code 3")),
        (Exit("exit", None, 9, None), "c", None, Failed("crashed", "the program was ended by signal 9")),
        (Exit("stop", 0, None, None), "c", None, Interrupted("the run was stopped")),
        (Exit("orphaned", None, 9, None), "c", None, Interrupted("the run was stopped")),
    ],
)
def test_outcomes_are_judged_by_facts(exit_: Exit, commit: str | None, refused: str | None, outcome: Outcome) -> None:
    """A good exit with a change is built, without one is no change; anything else failed or was cut off."""
    assert judge(exit_, commit, refused, 60.0) == outcome


def test_a_time_limit_names_itself_and_a_missing_program_is_final() -> None:
    """A timeout may be retried, a program that can't start may not."""
    timed_out = judge(Exit("timeout", None, 15, None), "c", None, 90.0)
    assert isinstance(timed_out, Failed)
    assert (timed_out.failure, timed_out.final) == ("timeout", False)
    assert "90 s" in timed_out.reason
    missing = judge(Exit("exit", None, None, "no such file"), None, None, 90.0)
    assert isinstance(missing, Failed)
    assert missing.final


def test_a_report_names_what_blocks() -> None:
    """A blocked task says which need it waited for, and the run is incomplete with exit code 1."""
    run = RunDocument(
        id="r", config="c", repo="/r", is_url=False, base="main", target="t", capacity=1, adapters={},
        tasks=("a", "b"), start="0" * 40, hub="/h", started=0.0,
    )  # fmt: skip
    attempt = Attempt(number=1, base="0" * 40, started=0.0)
    tasks = {
        "a": TaskDocument(status=TaskStatus.FAILED, attempts=(attempt,), reason="it broke", branch="kept"),
        "b": TaskDocument(),
    }
    places = ReportPlaces(Path("/logs"), Path("/trusted"))
    made = report(run, tasks, {"a": (), "b": ("a",)}, places=places, status=None)
    assert (made.status, made.exit_code, made.to_json()["exit"]) == (RunStatus.INCOMPLETE, 1, 1)
    assert [(task.state, task.reason) for task in made.tasks] == [
        ("failed", "it broke"),
        ("blocked", "needs 'a', which did not land"),
    ]
    assert [task.log for task in made.tasks] == ["/logs/a.1.stderr", None]
