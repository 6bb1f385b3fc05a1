"""The final result: what landed, why the rest did not, and the next commands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.cli.render.next_steps import halt_steps, run_step, task_steps
from orchestrator.cli.render.result import (
    ResultRow,
    next_step_hints,
    result_lines,
    result_rows,
    run_summary,
    state_counts,
)
from orchestrator.cli.render.rich_tables import MAX_ROWS_PER_STATE, render_result_table
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.model import HaltCause
from orchestrator.engine.reports.report import (
    AdapterReport,
    OrchestratorReport,
    RunReport,
    RunStatus,
    SessionReport,
)
from orchestrator.engine.reports.task_report import TaskReport
from orchestrator.repo.git.change_counts import Changes

COMMIT = "0123456789" * 4


def task(state: str, **facts: Any) -> TaskReport:
    made: dict[str, Any] = {
        "id": "t", "attempts": 1, "landed": None, "branch": None, "failure": None, "reason": None, "paths": (),
        "log": None, "adapter": "fake", "last_message": None, "input_tokens": 0, "output_tokens": 0, "cost": None,
    }  # fmt: skip
    return TaskReport(status=state, **{**made, **facts})


def run(*tasks: TaskReport, status: RunStatus = RunStatus.INCOMPLETE, closed: str | None = None) -> RunReport:
    adapters = [AdapterReport("fake", None, closed)] if closed else []
    return RunReport("run", status, "main", "/r", tasks, adapters, ())


def steps(one: TaskReport, report: RunReport, *, is_newest: bool = True) -> str:
    return "; ".join(map(str, task_steps(one, report, is_newest=is_newest)))


@pytest.mark.parametrize(
    ("one", "status", "expected"),
    [
        (task("landed", landed=COMMIT), RunStatus.LANDED, ""),
        (task("failed", log="/l"), RunStatus.INCOMPLETE, "next: council logs t; then: council retry t"),
        (
            task("failed", branch="council/run/t/2"),
            RunStatus.INCOMPLETE,
            "next: council logs t; then: council retry t; or: council salvage apply t/2",
        ),
        (
            task("conflict", branch="council/run/t/conflict"),
            RunStatus.INCOMPLETE,
            (
                "next: council salvage apply t/conflict --branch t-conflict; "
                "then: fix, commit and merge it into main, then `council resume run`; or: council retry t"
            ),
        ),
        (task("no_change"), RunStatus.INCOMPLETE, "next: council logs t; then: council retry t"),
        (task("cancelled"), RunStatus.INCOMPLETE, "next: council retry t"),
        (
            task("cancelled", branch="council/run/t/1"),
            RunStatus.RUNNING,
            "next: council retry t; or: council salvage apply t/1",
        ),
        (task("blocked"), RunStatus.INCOMPLETE, ""),
        (task("done"), RunStatus.INCOMPLETE, "next: council show t"),
        (
            task("awaiting_approval"),
            RunStatus.RUNNING,
            "next: council show t; then: council approve t; or: council reject t --note TEXT",
        ),
        (task("queued"), RunStatus.INCOMPLETE, ""),
        (task("pending"), RunStatus.INTERRUPTED, ""),
        (task("pending"), RunStatus.RUNNING, ""),
        (task("running"), RunStatus.RUNNING, "next: council logs t -f"),
        (task("running"), RunStatus.INTERRUPTED, ""),
        (task("landing"), RunStatus.RUNNING, ""),
    ],
)
def test_next_command_of_a_task_is_printed(one: TaskReport, status: RunStatus, expected: str) -> None:
    """Each state leads to the commands that apply to it, if any."""
    assert steps(one, run(one, status=status)) == expected


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (run(task("pending"), status=RunStatus.INTERRUPTED), "council resume run"),
        (run(task("pending"), status=RunStatus.HALTED), "council resume run"),
        (run(task("pending"), status=RunStatus.RUNNING), ""),
        (run(task("pending")), "council resume run"),
        (run(task("pending"), task("queued")), "council resume run"),
        (run(task("queued")), "council merge run"),
        (run(task("failed")), ""),
        (run(task("blocked"), closed="log in"), "council resume run"),
        (replace(run(task("pending")), imported="old.json"), ""),
    ],
)
def test_next_command_of_a_run_is_printed(report: RunReport, expected: str) -> None:
    """The command names the run, even if it is the newest."""
    assert run_step(report) == expected


def test_disabled_adapter_leads_to_resume() -> None:
    """Its tasks continue with `council resume` after the fix in their lines."""
    report = run(task("blocked"), closed="log in")
    assert steps(report.tasks[0], report) == ""
    assert [*next_step_hints(report)][-1] == "Next: council resume run"
    assert any("log in" in hint for hint in next_step_hints(report))


def test_halted_run_has_one_next_command() -> None:
    """Not one per task; for a used-up budget it names the limits to raise."""
    halted = replace(run(task("pending"), status=RunStatus.HALTED), halted="used up", halt_cause=HaltCause.BUDGET)
    assert steps(halted.tasks[0], halted) == ""
    assert [*next_step_hints(halted)] == ["Halted: used up", "Next: council resume run --budget LIMITS"]
    assert steps(task("failed"), halted) == "next: council logs t; then: council retry t"


def test_own_branch_is_to_be_merged() -> None:
    """Only if it has commits and the file did not name the target."""
    landed = run(task("landed", landed=COMMIT), status=RunStatus.LANDED)
    own = replace(landed, target="council/run", awaits_merge=True)
    reported = ["Landed on the run's own branch.", "Next: council merge run"]
    assert [*next_step_hints(own)] == reported
    assert [*next_step_hints(landed)] == []
    assert not {*next_step_hints(replace(own, awaits_merge=False))} & {*reported}


def test_active_task_of_an_inactive_run_is_interrupted() -> None:
    """After a crash the last recorded status is still an active one."""
    report = run(task("running"), task("checking", id="u"), status=RunStatus.INTERRUPTED)
    assert [row.status for row in result_rows(report, {})] == ["interrupted", "interrupted"]
    assert state_counts(report) == ["2 interrupted"]
    assert [row.status for row in result_rows(replace(report, status=RunStatus.RUNNING), {})] == ["running", "checking"]


def test_several_conflicts_are_counted_in_the_plural() -> None:
    report = run(*(task("conflict", id=name) for name in "abc"), task("no_change", id="d"), task("no_change", id="e"))
    assert state_counts(report) == ["3 conflicts", "2 no change"]


def test_merged_run_names_the_run_that_merged_it() -> None:
    """Each of the two runs names the other."""
    landed = run(task("landed", landed=COMMIT), status=RunStatus.LANDED)
    assert [*next_step_hints(replace(landed, target="council/run", merged_by="other"))] == ["Merged by run other."]
    assert run_summary(replace(landed, merges="first")) == "run run: landed, 1 of 1 landed on main, merge of run first"


def test_alternative_remedy_of_a_halt_is_labelled_or() -> None:
    """`or` once, not `then: or`."""
    reason = str(HaltReason("check `x` fails", remedy=("fix main, then resume", "or correct the check")))
    halted = replace(run(task("pending"), status=RunStatus.HALTED), halted=reason, halt_cause=HaltCause.BASE)
    assert [*map(str, halt_steps(halted))] == ["next: fix main, then resume", "or: correct the check"]


def test_out_of_scope_work_needs_a_setting() -> None:
    """A plain retry would fail again; a task that is not from the file can't adopt settings."""
    one = task("failed", failure="out_of_scope", branch="council/run/t/1")
    report = replace(run(one), file="/council.yaml")
    remedy = "set `on_out_of_scope: extend` for t in /council.yaml; then: council retry t --reload"
    assert steps(one, report) == f"next: {remedy}; or: council salvage apply t/1"
    assert steps(replace(one, reloadable=False), report).startswith("next: council logs t; then: council retry t;")


def test_exhausted_budget_of_a_task_outside_of_the_file_needs_a_new_run() -> None:
    """A reload would be refused."""
    one = task("failed", failure="budget", branch="council/run/t/1", reloadable=False)
    report = replace(run(one), file="/council.yaml")
    expected = "next: raise the budget in /council.yaml; then: council run /council.yaml; or: council salvage apply t/1"
    assert steps(one, report) == expected
    reloadable = replace(one, reloadable=True)
    assert "then: council retry t --reload" in steps(reloadable, report)


def test_older_run_is_named() -> None:
    """Commands without an id mean the newest run; unusual ids are quoted."""
    odd = task("failed", id="a b", branch="council/run/a b/1")
    report = run(odd)
    expected = (
        "next: council logs 'a b' --run run; then: council retry 'a b' --run run; "
        "or: council salvage apply 'a b/1' --run run"
    )
    assert steps(odd, report, is_newest=False) == expected


def test_plain_form_has_columns() -> None:
    """Landed tasks show size and place; others the reason, the preserved branch and the next command."""
    report = run(
        task("landed", id="models", landed=COMMIT),
        task("failed", id="api", reason="it broke\nbadly", branch="council/run/api/1"),
        task("landed", id="gone", landed="f" * 40, reason="the target already has the same change"),
    )
    rows = list(result_rows(report, {report.tasks[0].id: Changes(2, 12, 3)}))
    assert run_summary(report) == "run run: incomplete, 2 of 3 landed on main"
    assert list(result_lines(rows)) == [
        "  models  landed  0123456789 on main, 2 files +12 -3",
        "  api     failed  it broke: badly; saved as api/1",
        "    next: council logs api",
        "    then: council retry api",
        "    or: council salvage apply api/1",
        "  gone    landed  ffffffffff on main; the target already has the same change",
    ]


def test_own_branch_is_named_once_it_exists() -> None:
    """The first landing creates it; a target named by the file may exist before."""
    for state, words in (("failed", "0 of 1 landed"), ("landed", "1 of 1 landed on council/run")):
        one = task(state, landed=COMMIT if state == "landed" else None)
        assert run_summary(replace(run(one), target="council/run")) == f"run run: incomplete, {words}"


def test_no_tasks_have_no_rows() -> None:
    assert list(result_lines([])) == []


def test_drawn_form_groups_similar_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of landed tasks are grouped, failed ones are not. Markup is printed literally."""
    monkeypatch.setenv("COLUMNS", "100")
    rows = [ResultRow(f"t{number}", "landed", "on main", ()) for number in range(MAX_ROWS_PER_STATE + 5)]
    rows += [
        ResultRow(f"f{number}", "failed", "[red]why[/red]", ["next: council retry"])
        for number in range(MAX_ROWS_PER_STATE + 5)
    ]
    text = render_result_table(rows)
    assert f"t{MAX_ROWS_PER_STATE - 1} " in text
    assert f"t{MAX_ROWS_PER_STATE} " not in text
    assert f"f{MAX_ROWS_PER_STATE + 4} " in text
    assert "and 5 more landed" in text
    assert "[red]why[/red]" in text


def test_activity_has_its_age() -> None:
    """A session without known activity has none."""
    at = SessionReport("t", 1, "fixer", "o8", "working", None, None, "step 5", None, [], 1.0)
    running = replace(run(task("running"), status=RunStatus.RUNNING), sessions=[at])
    assert [row.message for row in result_rows(running, {}, now=43.0)] == ["step 5 (0:42 ago)"]
    silent = replace(running, sessions=[replace(at, message=None)])
    assert [row.message for row in result_rows(silent, {}, now=43.0)] == [""]


def test_several_active_processes_are_reported() -> None:
    """By pid and host; a single active process is not mentioned."""
    two = [OrchestratorReport(f"o{pid}", "box", pid, "worker", 1.0, 1.0, None, None) for pid in (7, 8)]
    running = replace(run(task("running"), status=RunStatus.RUNNING), orchestrators=two)
    assert list(next_step_hints(running)) == ["2 active processes: 7 on box, 8 on box."]
    at = SessionReport("task", 1, "fixer", "o8", "working", None, None, None, None, [], 1.0)
    [reported] = next_step_hints(replace(running, sessions=[at, replace(at, task="other", orchestrator="gone")]))
    assert reported == "2 active processes: 7 on box, 8 on box (task)."
    assert list(next_step_hints(replace(running, orchestrators=[two[0], replace(two[1], ended=2.0)]))) == []
    over = replace(running, status=RunStatus.LANDED, tasks=[task("landed", landed=COMMIT)])
    assert list(next_step_hints(over)) == []
