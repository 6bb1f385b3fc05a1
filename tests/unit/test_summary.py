"""The final report fits one screen: ten lines of at most eighty columns; commands are never truncated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from orchestrator.cli.render.result import run_summary
from orchestrator.cli.render.summary import MAX_LINES, summary_lines
from orchestrator.cli.render.text import COLUMNS
from orchestrator.domain.runs.check_results import CheckOutcome, CheckRecord
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.model import HaltCause
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.engine.reports.report import AdapterReport, RunStatus
from orchestrator.engine.reports.task_report import TaskReport
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
def test_report_is_at_most_ten_lines_of_eighty_columns(
    tasks: list[TaskReport],
    status: RunStatus,
    target: str,
    adapters: list[AdapterReport],
    halted: str | None,
    newest: bool,
) -> None:
    """For any number of tasks and names of any length; the first line has the totals."""
    report = replace(run(*tasks, status=status), target=target, adapters=adapters, halted=halted, damage=("x",) * 3)
    lines = summary_lines(report, is_newest=newest)
    assert len(lines) <= MAX_LINES == 10
    wide = [line for line in lines if cell_len(line) > COLUMNS == 80 and target not in line]
    wide = [line for line in wide if not ("/" in line and len(line.split()) == 1)]  # a path
    assert all("next: council" in line.lower() or "`" in line or line in (halted or "") for line in wide), wide
    assert all(line.isprintable() for line in lines), lines
    landed = sum(one.status == "landed" for one in tasks)
    assert f"{landed} of {len(tasks)} landed" in lines[0]
    assert target not in run_summary(report) or any(target in line for line in lines), "a branch name is truncated"


def test_problem_has_its_next_command() -> None:
    """Blocked tasks come last and name their blocker; totals list every state."""
    report = run(
        *(task("landed", id=f"l{n}", landed=COMMIT, input_tokens=900, cost=0.25) for n in range(40)),
        task("failed", id="api", reason="the program ended with exit code 1", branch="council/run/api/1"),
        task("blocked", id="later", reason="needs 'api', which did not land", blocked_by="api"),
        task("conflict", id="ui", reason="merge conflict in a", branch="council/run/ui/conflict"),
    )
    assert summary_lines(report) == [
        "run run: incomplete, 40 of 43 landed on main",
        "  1 failed, 1 blocked, 1 conflict, 36.0k tokens, $10.00",
        "  api failed: the program ended with exit code 1",
        "    next: council logs api",
        "  ui conflict: merge conflict in a",
        "    next: council salvage apply ui/conflict --branch ui-conflict",
        "  later blocked: needs 'api', which did not land",
    ]


def test_queued_task_is_indented_like_other_tasks() -> None:
    """The reason names the fix and is complete; its further lines are indented more deeply."""
    reason = "the target's checkout has uncommitted changes (src/calc.py): commit or stash them"
    assert summary_lines(run(task("queued", id="api", reason=reason)))[2:4] == [
        "  api queued: the target's checkout has uncommitted changes (src/calc.py):",
        "    commit or stash them",
    ]


def test_failed_task_precedes_unchanged_and_blocked_tasks() -> None:
    """In any file order, so that the most important problem is never only counted."""
    report = run(
        task("blocked", id="last", reason="needs 'api', which did not land", blocked_by="api"),
        task("no_change", id="idle"),
        task("failed", id="api"),
    )
    shown = [line.split()[0] for line in summary_lines(report)[2:] if not line.startswith("    ")]
    assert shown == ["api", "idle", "last"]


def test_reason_is_wrapped_if_lines_are_free() -> None:
    """Whole up to the tenth line, in the order of the tasks; the last line is cut, and keeps its commands."""
    reason = f"the check fails: {'one two three ' * 14}: fix it, then `council retry api`"
    shown = summary_lines(run(task("failed", id="api", reason=reason)))
    assert " ".join(" ".join(shown[2:-1]).split()) == f"api failed: {reason}"
    assert (shown[-1], len(shown)) == ("    next: council logs api", 7)
    two = summary_lines(run(*(task("failed", id=name, reason=reason) for name in ("api", "bad"))))
    assert two[:7] == [two[0], two[1], *shown[2:]]
    assert len(two) == MAX_LINES
    assert "…" in two[8]
    assert two[8].endswith(" `council retry api`")
    adapter = AdapterReport("claude", None, "not logged in: " * 9)
    [*_, first, last] = summary_lines(replace(run(task("landed", landed=COMMIT)), adapters=[adapter]))
    assert first.startswith("  it. Reason: not logged in: ")
    assert last.endswith("not logged in:")


def test_finished_run_names_the_command_that_retries_a_task() -> None:
    """As the last of the ten lines, for a resume with nothing to resume."""
    failed = run(*(task("failed", id=f"t{n}", reason="no") for n in range(9)))
    shown = summary_lines(failed, is_newest=False, was_finished=True)
    assert shown[-1] == "The run has ended. To retry a task: council retry TASK --run run"
    assert shown[-2].endswith("more: council status --run run")
    assert len(shown) <= MAX_LINES
    assert summary_lines(failed, was_finished=True)[-1] == "The run has ended. To retry a task: council retry TASK"


def many(one: TaskReport) -> list[str]:
    """Return the lines about the first of several tasks, for whose reasons no lines are free."""
    others = (task("failed", id=f"more{number}", reason="no") for number in range(9))
    return summary_lines(replace(run(one, *others), damage=("x",)))[2:4]


def test_cut_reason_ends_with_a_clause_before_its_command() -> None:
    """A long reason is cut between clauses, not inside the sentence with the command."""
    reason = "adapter 'mini' is disabled: no such key: fix it, then run `council resume 20260102-030405-ab12`"
    [line, _] = many(task("failed", id="bad", reason=reason))
    assert line != "  bad failed: adapter 'mini' … `council resume 20260102-030405-ab12`"
    assert line.endswith(" … `council resume 20260102-030405-ab12`"), line
    assert "fix" not in line


def test_hidden_problems_are_counted() -> None:
    """The line refers to `council status`."""
    report = run(*(task("failed", id=f"t{n}", reason="no") for n in range(9)))
    assert summary_lines(report, is_newest=False)[-2:] == [
        "    next: council logs t2 --run run",
        "  and 6 more: council status --run run",
    ]


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (run(task("pending"), status=RunStatus.INTERRUPTED), "Next: council resume run"),
        (run(task("pending")), "Next: council resume run"),
        (run(task("queued", reason="main is dirty")), "Next: council merge run"),
        (
            replace(run(task("landed", landed=COMMIT)), target="council/run", awaits_merge=True),
            "Next: council merge run",
        ),
        (
            replace(run(task("pending"), status=RunStatus.HALTED), halted="cost: 5 of 5", halt_cause=HaltCause.BUDGET),
            "Next: council resume run --budget LIMITS",
        ),
    ],
)  # fmt: skip
def test_last_line_has_the_next_command(report: Any, expected: str) -> None:
    """It is the next command of the whole run."""
    assert summary_lines(report)[-1] == expected


def test_commands_are_never_truncated() -> None:
    """Neither the next command, nor one in a reason, nor that of the run."""
    name, remedy = "a-name-that-is-long-" * 3, "`council adapters enable claude --run 20260102-030405-ab12`"
    adapter = AdapterReport("claude", None, "not logged in, " * 20)
    failed = task("failed", id="api", reason=f"{'much prose ' * 9}: {remedy}")
    report = run(
        task("conflict", id=name, reason="conflicts", branch=f"council/run/{name}/conflict"),
        failed,
        status=RunStatus.RUNNING,
    )
    shown = summary_lines(replace(report, adapters=[adapter] * 3), is_newest=False)
    assert f"    next: council salvage apply {name}/conflict --branch {name}-conflict --run run" in shown
    assert many(failed)[0].endswith(f"… {remedy}")
    assert any(line.endswith("… `council adapters enable claude --run run`") for line in shown), shown
    landed = replace(run(task("landed", landed=COMMIT)), run="r" * 70, target=f"council/{'r' * 70}", awaits_merge=True)
    assert summary_lines(landed, is_newest=False)[-1] == f"Next: council merge {'r' * 70}"


def test_halt_is_wrapped_between_words() -> None:
    """Commands in backticks and hyphenated paths stay whole at any width."""
    path, command = (
        f"/var/{'long-folder-' * 6}",
        "`council retry models --reload && council resume 20260102-030405-ab12`",
    )
    halted = f"the check of the base fails, see {path}: correct the command in the file, then {command}"
    shown = summary_lines(replace(run(task("pending")), halted=halted, halt_cause=HaltCause.BASE))
    assert any(path in line for line in shown)
    assert shown[-1].endswith(command)


def test_joined_commands_are_broken_where_a_shell_continues() -> None:
    """No line is too wide, and the lines together are the command."""
    ours, base = "council/20260102-030405-ab12", "release-candidate-2026"
    command = f"git switch {ours} && git merge --no-edit {base} && git switch -"
    halted = str(
        HaltReason("checks fail", remedy=(f"fix {base} and merge that into {ours} (`{command}`), then resume",))
    )
    shown = summary_lines(replace(run(task("pending")), halted=halted, halt_cause=HaltCause.BASE))
    assert [line for line in shown if cell_len(line) > COLUMNS] == []
    assert f"(`{command}`)" in " ".join(shown)
    assert any(line.endswith("&&") for line in shown)
    conflict = task("conflict", id="merge", reason="merge conflict in a")
    merged = replace(run(conflict), merges=ours.removeprefix("council/"), target=base)
    shown = summary_lines(merged)
    assert [line for line in shown if cell_len(line) > COLUMNS] == []
    assert f"next: git switch {ours} && git merge {base}" in " ".join(map(str.strip, shown))


def test_halt_with_a_long_last_line_shows_the_end() -> None:
    """Interpreters name the missing module there, after their own path."""
    reason = HaltReason("it failed", (f"/{'long/' * 20}python: No module named pytest",), "/logs/check1", ("fix main",))
    shown = summary_lines(replace(run(task("pending")), halted=str(reason), halt_cause=HaltCause.BASE))
    assert any(line.startswith("…") and line.endswith("python: No module named pytest") for line in shown), shown
    assert "log: /logs/check1" in shown


def test_failed_setup_has_its_log_and_cause() -> None:
    """Both are wrapped between words only, at any length."""
    log = f"/{'folder/' * 15}setup1"
    reason = f"`pip install -e .` ended with exit code 1 in the setup (log: {log})\nERROR: no such package"
    shown = summary_lines(run(task("failed", failure="setup_failed", reason=reason)))
    assert any(f"{log})" in line for line in shown), shown
    assert "ERROR: no such package" in " ".join(shown), shown


def test_halt_names_the_log() -> None:
    """With other problems and a long remedy, the output is shortened first."""
    reason = HaltReason("check `x` fails on main", ("one", "two"), "/logs/t.0.check1", ("fix main " * 30, "or not"))
    adapters = [AdapterReport(f"a{number}", None, "not logged in") for number in range(12)]
    report = replace(run(task("pending")), halted=str(reason), halt_cause=HaltCause.BASE)
    assert "log: /logs/t.0.check1" in summary_lines(report)
    shown = summary_lines(replace(report, adapters=adapters))
    assert shown[-4:-1] == ["Halted: check `x` fails on main", "two", "log: /logs/t.0.check1"]
    short = summary_lines(replace(report, halted=str(replace(reason, remedy=("fix main",)))))
    assert short[-4:] == ["one", "two", "log: /logs/t.0.check1", "fix main"]
    assert HaltReason.parse(str(reason)) == reason


def test_halt_without_space_for_the_remedy_names_the_command_that_prints_it() -> None:
    """No sentence is cut before its command."""
    remedy = ("start a new run " * 20, "or correct the check in the file, then `council retry t --reload --run r`")
    halted = str(HaltReason("check `x` can't be run", ("one",), "/logs/t.0.check1", remedy))
    shown = summary_lines(replace(run(task("pending")), halted=halted, halt_cause=HaltCause.BASE))
    assert shown[-1] == remedy[-1]
    halted = str(HaltReason("check `x` can't be run", ("one",), "/logs/t.0.check1", (*remedy, "more " * 30)))
    shown = summary_lines(replace(run(task("pending")), halted=halted, halt_cause=HaltCause.BASE))
    assert shown[-3:] == ["one", "log: /logs/t.0.check1", "How to fix it: council status"]


def test_halt_omits_a_path_list_that_does_not_fit() -> None:
    """Its end without its label says nothing."""
    output = ("sh: 1: nosuchprog: not found", f"PATH, as the sandbox shows it: {'/usr/bin:' * 20}/bin")
    halted = str(HaltReason("check `nosuchprog` can't be run", output, "/logs/t.0.check1", ("install it",)))
    shown = summary_lines(replace(run(task("pending")), halted=halted, halt_cause=HaltCause.BASE))
    assert shown[-3:] == [output[0], "log: /logs/t.0.check1", "install it"]


def test_successful_run_has_totals_only() -> None:
    assert summary_lines(run(task("landed", landed=COMMIT), status=RunStatus.LANDED)) == [
        "run run: landed, 1 of 1 landed on main"
    ]


def test_merge_is_the_next_step_of_an_unmerged_ended_run() -> None:
    """`council merge` rejects a running run and has nothing to do for a merged one."""
    ended = replace(run(replace(task("landed"), landed="c1")), target="council/r1", run="r1", status=RunStatus.LANDED)
    ended = replace(ended, awaits_merge=True)
    assert summary_lines(ended)[-1] == "Next: council merge r1"
    for other in (replace(ended, status=RunStatus.RUNNING), replace(ended, awaits_merge=False)):
        assert not any("council merge" in line for line in summary_lines(other))


def test_summary_lines_with_flaky_checks_shows_both_results() -> None:
    """The task itself needs no attention."""
    check = CheckRecord(
        command="make test",
        outcome=CheckOutcome.FLAKY,
        tree="t",
        commit=COMMIT,
        run="r",
        task="a",
        ended=0.0,
        seconds=1.0,
        host="h",
        log="/logs/a.1.check1.ab12cd",
        failed_log="/logs/a.1.check1",
    )
    tasks = [task("landed", id=name, landed=COMMIT, checks=(check,)) for name in ("a", "b")]
    lines = summary_lines(run(*tasks, status=RunStatus.LANDED))
    assert lines[1] == "  2 FLAKY checks: a `make test` failed (a.1.check1), then passed (a.1.check1.ab…"
    assert len(lines) == 2
