"""The end of a run fits one screen: ten lines of eighty columns, with the next command of what needs attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from orchestrator.cli.brief import COLUMNS, LINES, brief_lines
from orchestrator.domain.model import TaskStatus
from orchestrator.engine.report import AdapterReport, RunStatus, TaskReport
from tests.unit.test_result import COMMIT, run, task

_TEXTS = st.none() | st.text(max_size=200) | st.just("漢字" * 60)
_TASKS = st.builds(
    lambda state, name, reason, branch, cost: task(state, id=name, reason=reason, branch=branch, cost=cost),
    st.sampled_from([*TaskStatus, "blocked"]),
    st.text("ab-. 漢", min_size=1, max_size=64),
    _TEXTS,
    st.none() | st.just("council/run/t/1"),
    st.none() | st.just(1.5),
)


@given(
    st.lists(_TASKS, max_size=30),
    st.sampled_from(RunStatus),
    st.sampled_from(["main", "council/run", "x" * 200]),
    st.lists(st.builds(AdapterReport, st.text(max_size=90), st.none(), st.text(max_size=90)), max_size=12),
    st.none() | st.text(max_size=200),
    st.booleans(),
)
def test_it_is_at_most_ten_lines_of_eighty_columns(
    tasks: list[TaskReport],
    status: RunStatus,
    target: str,
    adapters: list[AdapterReport],
    halted: str | None,
    newest: bool,
) -> None:
    """Whatever became of however many tasks with whatever names; the first line has the totals."""
    report = replace(run(*tasks, status=status), target=target, adapters=adapters, halted=halted, damage=("x",) * 3)
    lines = brief_lines(report, is_newest=newest)
    assert len(lines) <= LINES == 10
    assert all(cell_len(line) <= COLUMNS == 80 and line.isprintable() for line in lines), lines
    landed = sum(one.state == "landed" for one in tasks)
    assert f"{landed} of {len(tasks)} landed" in lines[0]


def test_what_needs_attention_has_its_next_command() -> None:
    """What landed, what is blocked and what is done have none; totals name every state."""
    report = run(
        *(task("landed", id=f"l{n}", landed=COMMIT, input_tokens=900, cost=0.25) for n in range(40)),
        task("failed", id="api", reason="the program ended with exit code 1", branch="council/run/api/1"),
        task("conflict", id="ui", reason="conflicts with the target in a", branch="council/run/ui/conflict"),
        task("blocked", id="later"),
    )
    assert brief_lines(report) == [
        "run run: incomplete, 40 of 43 landed on main",
        "  1 failed, 1 conflict, 1 blocked, 36.0k tokens, $10.00",
        "  api failed: the program ended with exit code 1",
        "    next: council logs api",
        "  ui conflict: conflicts with the target in a",
        "    next: council salvage apply ui/conflict --branch ui-conflict",
    ]


def test_what_has_no_room_is_counted() -> None:
    """And `council status` has it."""
    report = run(*(task("failed", id=f"t{n}", reason="no") for n in range(9)))
    assert brief_lines(report, is_newest=False)[-2:] == [
        "    next: council logs t2 --run run",
        "  and 6 more: council status --run run",
    ]


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (run(task("pending"), status=RunStatus.INTERRUPTED), "Next: council resume"),
        (run(task("pending")), "Next: council resume"),
        (run(task("queued", reason="main is dirty")), "    next: council merge"),
        (
            replace(run(task("landed", landed=COMMIT)), target="council/run"),
            "Landed on its own branch, council/run. Next: council merge",
        ),
        (replace(run(task("pending")), halted="cost: 5 of 5"), "Next: council resume --budget LIMITS"),
    ],
)  # fmt: skip
def test_the_last_line_leads_on(report: Any, expected: str) -> None:
    """To what the whole run needs next."""
    assert brief_lines(report)[-1] == expected


def test_nothing_but_totals_where_all_is_well() -> None:
    """One line."""
    assert brief_lines(run(task("landed", landed=COMMIT), status=RunStatus.LANDED)) == [
        "run run: landed, 1 of 1 landed on main"
    ]
