"""Decisions about work that is built on the unlanded work of other tasks."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.domain.runs.model import Attempt, RebasedWork, TaskDocument
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry
from orchestrator.domain.scheduling.stacked_work import (
    StackState,
    find_stack_waits,
    judge_stack,
    select_stack,
)

LANDED: dict[str, Any] = {"landed": "m1", "intended_merges": ("m0", "m1")}


def need(status: str, commit: str | None = "c1", **facts: Any) -> TaskDocument:
    return TaskDocument(status=TaskStatus(status), commit=commit, **facts)


def built(stack: dict[str, str], **facts: Any) -> TaskDocument:
    """Return a task whose work, on the base `base`, is stacked on these commits."""
    attempt = Attempt(number=1, adapter="", base="base", started=0.0, stacked_on=stack)
    return TaskDocument(status=TaskStatus.QUEUED, attempts=(attempt,), commit="work", **facts)


@pytest.mark.parametrize(
    ("document", "state"),
    [
        (need("queued"), StackState.WAITS),
        (need("landing"), StackState.WAITS),
        (need("queued", "c2"), StackState.OUTDATED),
        (need("pending", None), StackState.WAITS),
        (need("running", None), StackState.WAITS),
        (need("awaiting_approval", None), StackState.WAITS),
        (need("landed", **LANDED), StackState.READY),
        (need("landed", "c2", **LANDED), StackState.OUTDATED),
        (need("landed", landed="others", intended_merges=("m1",)), StackState.OUTDATED),  # its commit may not be there
        (need("done", None), StackState.OUTDATED),
        (need("failed"), StackState.ABANDONED),
        (need("cancelled"), StackState.ABANDONED),
        (need("conflict"), StackState.ABANDONED),
    ],
)
def test_judge_stack_follows_the_task_below(document: TaskDocument, state: StackState) -> None:
    assert judge_stack({"a": "c1"}, {"a": document}) == (state, "" if state is StackState.READY else "a")


def test_judge_stack_lands_behind_unchanged_work_only() -> None:
    tasks = {"a": need("queued"), "b": need("queued", "c2")}
    assert judge_stack({}, {}).state is StackState.READY
    assert judge_stack({"a": "c1"}, tasks, ahead=["a"]).state is StackState.READY
    assert judge_stack({"b": "c1"}, tasks, ahead=["b"]) == (StackState.OUTDATED, "b")
    assert judge_stack({"a": "c1", "b": "c2"}, tasks, ahead=["a"]) == (StackState.WAITS, "b")


def test_judge_stack_rebases_once_all_needs_are_built() -> None:
    """A rebase onto half of the new work would have to be repeated."""
    tasks = {"a": need("queued", "c2"), "b": need("running", None)}
    assert judge_stack({"a": "c1", "b": "c1"}, tasks) == (StackState.WAITS, "b")
    assert judge_stack({"a": "c1", "b": "c1"}, tasks, blocked=["b"]) == (StackState.ABANDONED, "b")


def test_stack_of_a_task_is_that_of_its_newest_base() -> None:
    rebased = RebasedWork(commit="work2", base="base2", stacked_on={"a": "c2"})
    assert built({"a": "c1"}).stack == {"a": "c1"}
    moved = built({"a": "c1"}, rebased=rebased)
    assert (moved.stack, moved.built_base) == ({"a": "c1"}, "base")  # restored, or built again
    moved = moved.model_copy(update={"commit": "work2"})
    assert (moved.stack, moved.built_base, moved.stack_of("base")) == ({"a": "c2"}, "base2", {"a": "c1"})
    assert TaskDocument().stack == {}


def test_select_stack_has_the_work_that_has_not_landed() -> None:
    tasks = {"a": need("queued"), "b": need("landed", **LANDED), "c": need("checking", "c3"), "d": need("done", None)}
    assert select_stack("abcd", tasks) == {"a": "c1", "c": "c3"}


def test_find_stack_waits_names_the_task_that_lands_first() -> None:
    tasks = {"a": need("queued"), "b": built({"a": "c1"}), "c": built({"b": "work"}), "d": built({})}
    assert find_stack_waits(tasks) == {"b": "a", "c": "b"}


def board() -> DispatchBoard:
    entries = {"a": DispatchEntry(), "b": DispatchEntry(("a",), built_needs=("a",)), "c": DispatchEntry(("a",))}
    return DispatchBoard(entries)


def test_board_starts_a_task_on_built_work_only_if_that_suffices() -> None:
    one = board()
    assert one.choose_tasks(9, 0.0) == ["a"]
    one.sync_task("a", TaskStatus.QUEUED, 0.0)
    assert one.choose_tasks(9, 0.0) == ["b"]
    one.sync_task("a", TaskStatus.LANDED, 0.0)
    assert one.choose_tasks(9, 0.0) == ["c"]


def test_board_withdraws_a_task_whose_need_is_built_again() -> None:
    one = board()
    one.choose_tasks(9, 0.0)
    one.sync_task("a", TaskStatus.QUEUED, 0.0)
    one.sync_task("a", TaskStatus.PENDING, 5.0)
    assert one.choose_tasks(9, 1.0) == []
    assert one.choose_tasks(9, 6.0) == ["a"]
    one.sync_task("a", TaskStatus.QUEUED, 0.0)
    assert one.choose_tasks(9, 6.0) == ["b"]


def test_board_keeps_the_delay_of_a_retry_when_its_need_lands() -> None:
    one = board()
    one.choose_tasks(9, 0.0)
    one.sync_task("a", TaskStatus.QUEUED, 0.0)
    assert one.choose_tasks(9, 0.0) == ["b"]
    one.sync_task("b", TaskStatus.PENDING, 5.0)
    one.sync_task("a", TaskStatus.LANDED, 0.0)
    assert one.choose_tasks(9, 1.0) == ["c"]
    assert one.choose_tasks(9, 6.0) == ["b"]


def test_board_blocks_work_whose_need_failed_until_that_is_built_again() -> None:
    """Also in a process that starts later."""
    one = board()
    one.choose_tasks(9, 0.0)
    one.sync_task("a", TaskStatus.QUEUED, 0.0)
    one.choose_tasks(9, 0.0)
    one.sync_task("b", TaskStatus.QUEUED, 0.0)
    one.sync_task("a", TaskStatus.FAILED, 0.0)
    one.sync_task("b", TaskStatus.PENDING, 0.0)
    assert one.blocked == {"b": "a", "c": "a"}
    later = DispatchBoard.of(one.entries, {"a": TaskStatus.FAILED, "b": TaskStatus.PENDING, "c": TaskStatus.PENDING})
    for each in (one, later):
        assert each.choose_tasks(9, 0.0) == []
        each.sync_task("a", TaskStatus.PENDING, 0.0)
        assert each.choose_tasks(9, 0.0) == ["a"]
        each.sync_task("a", TaskStatus.QUEUED, 0.0)
        assert each.choose_tasks(9, 0.0) == ["b"]


def test_board_of_a_run_in_progress_offers_built_work() -> None:
    statuses = {"a": TaskStatus.CHECKING, "b": TaskStatus.PENDING, "c": TaskStatus.PENDING}
    assert DispatchBoard.of(board().entries, statuses).choose_tasks(9, 0.0) == ["b"]
    assert DispatchBoard.of(board().entries, {**statuses, "a": TaskStatus.RUNNING}).choose_tasks(9, 0.0) == []
