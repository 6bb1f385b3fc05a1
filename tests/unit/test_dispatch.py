"""Dispatch: start order, adapter capacity, path ownership, and retried tasks."""

from __future__ import annotations

import pytest

from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.scheduling.dispatch import AGING_SECONDS, DispatchBoard, DispatchEntry


def started(board: DispatchBoard, free: int = 9, now: float = 0.0) -> list[str]:
    """Return the tasks that a decision starts."""
    return board.choose_tasks(free, now)


def owners(**owns: str) -> dict[str, DispatchEntry]:
    """Return tasks by their owned paths, each with an adapter of its own."""
    return {task: DispatchEntry(adapter=task, owns=(pattern,)) for task, pattern in owns.items()}


def test_higher_priority_starts_first_then_file_order() -> None:
    """Tasks of equal priority start in file order."""
    board = DispatchBoard(
        {
            "a": DispatchEntry(),
            "b": DispatchEntry(priority=2),
            "c": DispatchEntry(priority=-1),
            "d": DispatchEntry(priority=2),
        }
    )
    assert started(board) == ["b", "d", "a", "c"]


def test_additional_workers_start_other_tasks_of_equal_rank_first() -> None:
    """Each begins with every eighth task, and continues with the last tasks of the others; priorities come first."""
    tasks = {f"t{number}": DispatchEntry() for number in range(18)} | {"urgent": DispatchEntry(priority=1)}
    first, second = DispatchBoard(tasks, worker=1), DispatchBoard.of(tasks, {}, worker=2)
    assert started(first) == ["urgent", "t1", "t9", "t17", "t10", "t2", "t11", "t3", "t12"]
    assert started(second, 4) == ["urgent", "t2", "t10", "t11"]


@pytest.mark.parametrize(("age", "first"), [(AGING_SECONDS * 2 - 1, "new"), (AGING_SECONDS * 2 + 1, "old")])
def test_waiting_compensates_priority(age: float, first: str) -> None:
    """`AGING_SECONDS` seconds of waiting outweigh one priority level."""
    board = DispatchBoard(
        {"gate": DispatchEntry(), "old": DispatchEntry(), "new": DispatchEntry(("gate",), priority=2)}
    )
    board.wait("gate", 10**9)
    assert started(board, 0, now=5000.0) == []
    board.landed("gate")
    assert started(board, 1, now=5000.0 + age) == [first]


def test_retry_ages_from_its_due_time() -> None:
    """A task that becomes due queues behind tasks that were ready earlier."""
    board = DispatchBoard({"a": DispatchEntry(), "b": DispatchEntry()})
    assert started(board, 1) == ["a"]
    board.wait("a", 5.0)
    assert started(board, 1, now=9.0) == ["b"]
    assert started(board, 1, now=9.0) == ["a"]


def test_adapter_capacity_limits_its_sessions() -> None:
    """Tasks of other adapters pass; each ended session frees a slot."""
    board = DispatchBoard(
        {"a": DispatchEntry(adapter="x"), "b": DispatchEntry(adapter="x"), "c": DispatchEntry(adapter="y")}, {"x": 1}
    )
    assert started(board) == ["a", "c"]
    board.built("a")
    assert board.adapters.running() == 1
    assert started(board) == ["b"]


def test_status_of_built_work_frees_the_slot_and_keeps_the_paths() -> None:
    """The session has ended, and its work is queued to land."""
    board = DispatchBoard(
        {
            "a": DispatchEntry(adapter="x", owns=("src/",)),
            "b": DispatchEntry(adapter="x", owns=("src/a",)),
            "c": DispatchEntry(adapter="x"),
        },
        {"x": 1},
    )
    assert started(board) == ["a"]
    board.sync_task("a", TaskStatus.QUEUED, 0.0)
    assert (started(board), board.adapters.running()) == (["c"], 1)
    board.sync_task("c", TaskStatus.DONE, 0.0)
    board.sync_task("a", TaskStatus.LANDED, 0.0)
    assert started(board) == ["b"]


def test_adapter_after_a_cooldown_starts() -> None:
    """Others start meanwhile; the longer of two cooldowns counts."""
    board = DispatchBoard({"a": DispatchEntry(adapter="x"), "b": DispatchEntry(adapter="y")})
    board.adapters.start_cooldown("x", 60.0)
    board.adapters.start_cooldown("x", 30.0)
    assert started(board, now=1.0) == ["b"]
    assert (board.forecast.has_work(), board.forecast.next_time()) == (True, 60.0)
    assert started(board, now=59.9) == []
    assert started(board, now=60.0) == ["a"]
    assert board.forecast.next_time() is None


def test_cooldown_is_awaited_only_for_ready_tasks() -> None:
    """Neither an adapter without tasks nor a disabled one sets a wake-up time."""
    board = DispatchBoard({"a": DispatchEntry(adapter="x"), "b": DispatchEntry(adapter="y")})
    board.adapters.start_cooldown("z", 60.0)
    assert started(board) == ["a", "b"]
    board.adapters.start_cooldown("x", 50.0)
    assert board.forecast.next_time() is None
    board.wait("a", 20.0)
    assert board.forecast.next_time() == 50.0
    board.adapters.disable("x", "its login failed")
    assert (board.forecast.next_time(), board.forecast.has_work()) == (None, False)


def test_tasks_of_a_disabled_adapter_are_not_work() -> None:
    """Neither ready nor waiting ones start again; their dependents are left over, not blocked."""
    board = DispatchBoard(
        {"a": DispatchEntry(adapter="x"), "b": DispatchEntry(("a",), adapter="y"), "c": DispatchEntry(adapter="y")}
    )
    board.adapters.disable("x", "its login failed")
    assert started(board) == ["c"]
    assert (board.forecast.has_work(), dict(board.adapters.disabled), board.blocked) == (
        False,
        {"x": "its login failed"},
        {},
    )


@pytest.mark.parametrize("end", ["landed", "ended", "wait"])
def test_paths_are_free_after_their_task_ended(end: str) -> None:
    """Paths are released by landing, by an end and by waiting, but not by being built."""
    board = DispatchBoard(owners(a="src/**", b="src/app.py", c="docs/"))
    assert started(board) == ["a", "c"]
    assert board.forecast.has_work()
    board.built("a")
    assert started(board) == []
    board.wait("a", 99.0) if end == "wait" else getattr(board, end)("a")
    assert started(board) == ["b"]


def test_task_held_by_a_queued_one_is_not_work() -> None:
    """Only a landing could start it, so a scheduler without landings must end."""
    board = DispatchBoard(owners(a="src/**", b="src/app.py"))
    started(board)
    assert board.forecast.has_work()
    board.built("a")
    started(board)
    assert not board.forecast.has_work()
    board.landed("a")
    assert board.forecast.has_work()


def test_first_held_task_reserves_its_paths() -> None:
    """Later overlapping tasks wait, so that it starts once its paths are free."""
    board = DispatchBoard(owners(live="a", held="*", behind="b", other="c/d"))
    assert started(board) == ["live", "other"]
    board.landed("live")
    assert started(board) == ["held"]
    board.landed("held")
    assert started(board) == ["behind"]


def test_better_held_task_takes_over_the_reservation() -> None:
    """Tasks held only by the former reservation start."""
    tasks = owners(live="a", former="*.py", behind="x.py") | {
        "gate": DispatchEntry(),
        "better": DispatchEntry(("gate",), "z", 5, ("a",)),
    }
    tasks["former"] = DispatchEntry(adapter="former", owns=("*.py", "a"))
    board = DispatchBoard(tasks)
    assert started(board) == ["live", "gate"]
    board.landed("gate")
    assert started(board) == ["behind"]


@pytest.mark.parametrize(
    ("what", "later"), [("park", ["held"]), ("close", []), ("ended", [])], ids=["parked", "closed", "cancelled"]
)
def test_held_task_that_can_not_start_reserves_nothing(what: str, later: list[str]) -> None:
    """With a parked or disabled adapter, or cancelled, it holds nobody back."""
    board = DispatchBoard(owners(live="a", held="*", behind="b"))
    assert started(board) == ["live"]
    match what:
        case "park":
            board.adapters.start_cooldown("held", 50.0)
        case "close":
            board.adapters.disable("held", "its login failed")
        case _:
            board.ended("held")
    assert started(board, now=1.0) == ["behind"]
    board.landed("live")
    board.landed("behind")
    assert board.forecast.has_work() is bool(later)
    assert started(board, now=50.0) == later


def test_reservation_outlasts_a_full_adapter() -> None:
    """Overlapping tasks do not start while it waits for adapter capacity."""
    tasks = owners(live="a", held="*", behind="b") | {"full": DispatchEntry(adapter="held", owns=("f/g",))}
    board = DispatchBoard(tasks, {"held": 1})
    assert started(board) == ["live", "full"]
    board.landed("live")
    assert started(board) == []
    assert board.forecast.has_work()
    board.landed("full")
    assert started(board) == ["held"]


def test_retried_task_unblocks_its_dependents() -> None:
    """A dependent with another failed need stays blocked and names that one."""
    board = DispatchBoard(
        {
            "a": DispatchEntry(),
            "b": DispatchEntry(),
            "c": DispatchEntry(("a",)),
            "d": DispatchEntry(("a", "b")),
            "e": DispatchEntry(("c", "d")),
        }
    )
    started(board)
    board.ended("a")
    board.ended("b")
    assert board.blocked == {"c": "a", "d": "a", "e": "d"}
    board.retry("a")
    assert board.blocked == {"d": "b", "e": "d"}
    assert started(board) == ["a"]
    board.landed("a")
    assert started(board) == ["c"]
    board.retry("b")
    assert board.blocked == {}
    assert started(board) == ["b"]


def test_cancelled_blocked_task_ends_itself() -> None:
    """It stops being blocked; once retried it is blocked while its need is."""
    board = DispatchBoard({"a": DispatchEntry(), "b": DispatchEntry(("a",)), "c": DispatchEntry(("b",))})
    started(board)
    board.ended("a")
    board.ended("b")
    assert board.blocked == {"c": "b"}
    board.retry("b")
    assert board.blocked == {"b": "a", "c": "b"}
    board.retry("a")
    assert board.blocked == {}


def test_cancelled_ready_or_waiting_task_does_not_start() -> None:
    board = DispatchBoard({"a": DispatchEntry(), "b": DispatchEntry(), "c": DispatchEntry()})
    assert started(board, 1) == ["a"]
    board.wait("a", 5.0)
    board.ended("a")
    board.ended("b")
    assert board.forecast.next_time() is None
    assert started(board, now=9.0) == ["c"]
    assert not board.forecast.has_work()


def test_board_of_an_active_run_keeps_paths_of_queued_tasks() -> None:
    """After a resume overlapping tasks start only after it landed."""
    board = DispatchBoard.of(owners(a="src/", b="src/*", c="docs"), {"a": TaskStatus.QUEUED}, {})
    assert started(board) == ["c"]
    assert board.adapters.running() == 1
    board.landed("a")
    assert started(board) == ["b"]


def test_landed_dependent_of_a_lost_need_is_not_blocked() -> None:
    """Only tasks that have not landed are blocked."""
    tasks = {"a": DispatchEntry(), "b": DispatchEntry(("a",)), "c": DispatchEntry(("b",))}
    board = DispatchBoard.of(tasks, {"a": TaskStatus.CONFLICT, "b": TaskStatus.LANDED}, {})
    assert board.blocked == {}
    assert started(board) == ["c"]


def test_start_of_a_cancelled_or_retried_task_is_void() -> None:
    board = DispatchBoard({"a": DispatchEntry()})
    assert board.choose_tasks(1, 0.0) == ["a"]
    assert board.adapters.is_running("a")
    board.ended("a")
    assert not board.adapters.is_running("a")
    board.retry("a")
    assert not board.adapters.is_running("a")
    assert board.choose_tasks(1, 0.0) == ["a"]


def test_fallback_adapter_is_used_only_during_a_cooldown() -> None:
    """Tasks that found no capacity there return after the cooldown and use all the capacity there is then."""
    board = DispatchBoard({f"t{one}": DispatchEntry((), "a", 0, (), ("b",)) for one in range(5)}, {"a": 3, "b": 1})
    board.adapters.start_cooldown("a", 10.0)
    assert [(task, board.adapter_of(task)) for task in started(board)] == [("t0", "b")]
    assert board.adapter_of("t1") == "b"
    assert board.forecast.next_time() == 10.0
    assert started(board, now=9.0) == []
    assert [(task, board.adapter_of(task)) for task in started(board, now=10.0)] == [("t1", "a")]
    board.adapters.enable("a")
    assert [(task, board.adapter_of(task)) for task in started(board, now=10.0)] == [("t2", "a"), ("t3", "a")]
    assert board.adapter_of("t0") == "b"
    board.built("t0")
    assert started(board, now=11.0) == []
    board.adapters.start_cooldown("a", 20.0)
    assert [(task, board.adapter_of(task)) for task in started(board, now=11.0)] == [("t4", "b")]


@pytest.mark.parametrize(("is_open", "first"), [(True, []), (False, ["behind"])])
def test_reservation_lasts_while_an_adapter_is_available(is_open: bool, first: list[str]) -> None:
    """Without a fallback its paths are free meanwhile."""
    board = DispatchBoard(owners(live="a") | {"held": DispatchEntry((), "x", 0, ("*",), ("y",))} | owners(behind="b"))
    assert started(board) == ["live"]
    board.adapters.start_cooldown("x", 50.0)
    if not is_open:
        board.adapters.start_cooldown("y", 60.0)
    assert started(board, now=1.0) == first
    for task in ("live", *first):
        board.landed(task)
    assert started(board, now=2.0) == (["held"] if is_open else [])
    assert started(board, now=50.0) == ([] if is_open else ["held"])
    assert board.adapter_of("held") == ("y" if is_open else "x")


def test_common_blocker_is_reported() -> None:
    """The cooldown of all remaining tasks' adapters, unless one waits for an available adapter or a landing."""
    tasks = {
        "a": DispatchEntry(adapter="x", fallback=("y", "z")),
        "b": DispatchEntry(adapter="z"),
        "c": DispatchEntry(("b",), "open"),
    }
    board = DispatchBoard(tasks)
    board.adapters.start_cooldown("x", 50.0)
    assert board.forecast.awaited() == {}
    board.adapters.start_cooldown("y", 30.0)
    board.adapters.disable("z", "its login failed")
    assert board.forecast.awaited() == {"x": 50.0, "y": 30.0}
    assert started(board) == []
    assert board.forecast.awaited() == {"x": 50.0, "y": 30.0}
    assert started(board, now=30.0) == ["a"]
    assert board.forecast.awaited() == {}
    board.wait("a", 31.0)
    assert board.forecast.awaited() == {}


@pytest.mark.parametrize("adapters", [None, ("y",)])
def test_sync_task_of_a_retried_task_waits_for_its_needs(adapters: tuple[str, ...] | None) -> None:
    """Another process may retry a dependent before its need: it starts only after the need landed."""
    statuses = {"a": TaskStatus.FAILED, "b": TaskStatus.CANCELLED}
    board = DispatchBoard.of({"a": DispatchEntry(), "b": DispatchEntry(("a",))}, statuses)
    board.sync_task("b", TaskStatus.PENDING, 0.0, adapters)
    assert started(board) == []
    board.sync_task("a", TaskStatus.PENDING, 0.0, adapters)
    assert started(board) == ["a"]
    board.landed("a")
    assert started(board) == ["b"]


def test_one_session_probes_an_adapter_after_a_cooldown() -> None:
    """The others follow after its response, or with another probe if it ends without one."""
    board = DispatchBoard({f"t{one}": DispatchEntry(adapter="a") for one in range(4)})
    board.adapters.start_cooldown("a", 10.0)
    assert started(board, now=10.0) == ["t0"]
    assert (board.adapters.is_probe("t0"), started(board, now=11.0)) == (True, [])
    assert (board.forecast.has_work(), board.forecast.next_time()) == (True, None)
    board.ended("t0")
    assert started(board, now=12.0) == ["t1"]
    board.adapters.enable("a")
    assert (started(board, now=13.0), board.adapters.is_probe("t1")) == (["t2", "t3"], False)


def test_tasks_use_their_fallback_while_an_adapter_is_probed() -> None:
    """Of another process, too, until its session ends."""
    board = DispatchBoard({f"t{one}": DispatchEntry(adapter="a", fallback=("b",)) for one in range(3)}, {"b": 1})
    board.adapters.expect_probe("a", "elsewhere")
    assert [(task, board.adapter_of(task)) for task in started(board)] == [("t0", "b")]
    board.adapters.end_probe("elsewhere")
    assert [(task, board.adapter_of(task)) for task in started(board)] == [("t1", "a")]
    assert started(board) == []


def test_full_account_is_replaced_by_the_next_one() -> None:
    """And by no other adapter; a task of one account waits for it."""
    accounts = ("a@1", "a@2")
    entries = {f"t{one}": DispatchEntry(adapter="a@1", fallback=("a@2", "b")) for one in range(5)}
    board = DispatchBoard(entries | {"pinned": DispatchEntry(adapter="a@1")}, {"a@1": 2, "a@2": 1})
    assert [(task, board.adapter_of(task)) for task in started(board)] == [
        ("t0", "a@1"), ("t1", "a@1"), ("t2", "a@2"),
    ]  # fmt: skip
    board.built("t1")
    assert [(task, board.adapter_of(task)) for task in started(board)] == [("t3", "a@1")]
    board.built("t2")
    assert [(task, board.adapter_of(task)) for task in started(board)] == [("t4", "a@2")]
    for name in accounts:
        board.adapters.start_cooldown(name, 50.0)
    board.wait("t0", 0.0)
    assert [(task, board.adapter_of(task)) for task in started(board)] == [("t0", "b")]
