"""Whatever the graph and whatever happens, capacity holds, needs hold, and every task comes to an end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.dispatch import Board, decide


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, tuple[str, ...]]:
    """Draw an acyclic graph: a task may need earlier ones."""
    count = draw(st.integers(1, 12))
    names = [f"t{index}" for index in range(count)]
    needs = {
        name: tuple(draw(st.lists(st.sampled_from(names[:index]), max_size=4))) if index else ()
        for index, name in enumerate(names)
    }
    order = draw(st.permutations(names))
    return {name: needs[name] for name in order}


@given(graphs(), st.integers(1, 4), st.data())
def test_capacity_and_needs_hold_and_all_ends(
    needs: dict[str, tuple[str, ...]], capacity: int, data: st.DataObject
) -> None:
    """A task starts only with all its needs landed, never beyond capacity; at the end none is left."""
    board, now = Board(needs), 0.0
    running, landed, over, retries = list[str](), set[str](), set[str](), 0
    while running or board.has_work():
        for start in decide(board, capacity - len(running), now):
            assert set(needs[start.task]) <= landed
            running.append(start.task)
        assert len(running) <= capacity
        if not running:
            due = board.next_time()
            assert due is not None, "work is left, but nothing runs and nothing waits"
            now = due
            continue
        task = running.pop(data.draw(st.integers(0, len(running) - 1)))
        match data.draw(st.sampled_from(["land", "fail", "retry"])):
            case "retry" if retries < 20:
                retries += 1
                board.wait(task, now + data.draw(st.floats(0, 10)))
            case "fail":
                over.add(task)
                board.ended(task)
            case _:
                landed.add(task)
                board.landed(task)
    assert landed | over | set(board.blocked) == set(needs)
    assert not (landed | over) & set(board.blocked)
