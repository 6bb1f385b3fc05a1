"""`council show`, from recorded documents."""

from __future__ import annotations

import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from orchestrator.cli.commands.runs.show import task_detail_lines
from orchestrator.cli.commands.setup.schema import task_details_schema
from orchestrator.cli.render.text import COLUMNS
from orchestrator.domain.runs.model import Attempt, ImportedTask, TaskDocument
from orchestrator.domain.runs.phases import InputSummary, PhaseRecord, PhaseStatus
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.workflow.handoffs import Handoff, Receipt, make_handoff
from orchestrator.domain.workflow.mediation import Mediation
from orchestrator.engine.reports.task_details import TaskDefinition, TaskDetails, build_task_details
from orchestrator.engine.reports.task_report import report_task

COMMIT, BASE = "0123456789" * 4, "f" * 40
FINDINGS = [{"path": "a.py", "line": 3, "severity": "major", "message": "say \x1b[31mmore"}, {"message": "and less"}]
FOUR = TaskDefinition(
    "Add login.\n\n  It has tests.\n", "tickets", ("models",), "adw", ("scout", "plan", "build", "review")
)


def attempt(number: int, phase: str | None, outcome: str | None = "completed", **facts: Any) -> Attempt:
    times = {"started": 100.0 * number, "ended": None if outcome is None else 100.0 * number + 30}
    reported = {"adapter": f"cli-{number}", "input_tokens": 1000, "output_tokens": 10, "cost": 0.5, **facts}
    return Attempt(number=number, base=BASE, phase=phase, outcome=outcome, **times, **reported)


def handoff(number: int, phase: str, kind: str, data: dict[str, Any], **facts: Any) -> Handoff:
    reported = {"protocol": "direct", "time": 130.0, "via": "file", "tokens": 1010, **facts}
    return make_handoff("run", "t", number, data, kind=kind, phase=phase, **reported)


def details_of(document: TaskDocument, asked: TaskDefinition = FOUR, *handoffs: Handoff, **facts: Any) -> TaskDetails:
    report = report_task("t", document, "fake", "/logs")
    more: dict[str, Any] = {"target": "main", "landed_at": None, "logs": "/logs", "now": 1_000.0, **facts}
    return build_task_details("run", report, document, asked, {one.id: one for one in handoffs}, **more)


def text(one: TaskDetails) -> str:
    return "\n".join(task_detail_lines(one, 1_000.0, one.status))


def reviewed() -> tuple[TaskDocument, list[Handoff]]:
    """Return a task that is being rebuilt after its review rejected it."""
    scout = handoff(1, "scout", "scout", {"scout_findings": ["x" * 500]}, to="plan")
    receipt = Receipt(phase="plan", attempt=2, time=201.0, digest=scout.digest)
    mediation = Mediation(transformation="shorter", analysis={}, processed={"tasks": []}, instructions="Go on.")
    plan = handoff(2, "plan", "plan", {"tasks": []}, to="build", protocol="mediated", mediation=mediation)
    review = handoff(5, "review", "review", {"verdict": "reject", "findings": FINDINGS})
    handoffs = [scout.model_copy(update={"receipts": (receipt,)}), plan, review]
    inputs = InputSummary(keys=("requirements",), omitted=("risks",), size=120, total_size=3400)
    phases = (
        PhaseRecord(
            phase="scout", status=PhaseStatus.COMPLETED, started=100.0, ended=130.0, attempts=(1,), handoff=scout.id
        ),
        PhaseRecord(
            phase="plan", status=PhaseStatus.COMPLETED, started=200.0, ended=330.0, attempts=(2, 3), repairs=1,
            inputs=inputs, received=(scout.id,), handoff=plan.id, note="as discussed",
        ),
        PhaseRecord(
            phase="build", status=PhaseStatus.COMPLETED, started=400.0, ended=430.0, attempts=(4,), rounds=2,
            commit=COMMIT, base=BASE,
        ),
        PhaseRecord(
            phase="review", status=PhaseStatus.COMPLETED, started=500.0, ended=530.0, attempts=(5,),
            verdict="reject", handoff=review.id,
        ),
        PhaseRecord(phase="build", status=PhaseStatus.IN_PROGRESS, started=600.0, attempts=(6,)),
    )  # fmt: skip
    attempts = (
        attempt(1, "scout"),
        attempt(2, "plan", "invalid_handoff", reason="no tasks"),
        attempt(3, "plan", resumed=True, adapter="cli-2"),
        attempt(4, "build", "built", branch="council/run/t/4"),
        attempt(5, "review", discarded=("a.py", "b.py")),
        attempt(6, "build", None, cost=None),
    )
    document = TaskDocument(
        status=TaskStatus.RUNNING, attempts=attempts, phases=phases, phase="build", branch="council/run/t/4"
    )
    return document, handoffs


def test_each_visit_has_its_result() -> None:
    """Visits are numbered per phase, each with its usage, input and handoff."""
    document, handoffs = reviewed()
    one = details_of(document, FOUR, *handoffs)
    assert [(visit.phase, visit.visit, visit.status) for visit in one.phases] == [
        ("scout", 1, "completed"),
        ("plan", 1, "completed"),
        ("build", 1, "completed"),
        ("review", 1, "completed"),
        ("build", 2, "in_progress"),
    ]
    plan, review, again = one.phases[1], one.phases[3], one.phases[4]
    assert (plan.usage.sessions, plan.usage.seconds, plan.usage.cost) == (2, 60.0, 1.0)
    assert plan.adapters == ("cli-2",)
    assert list(review.findings) == FINDINGS
    assert review.discarded == ("a.py", "b.py")
    assert (again.usage.seconds, again.usage.cost) == (400, None)
    assert one.remaining_phases == ["review"]
    assert (one.usage.sessions, one.usage.input_tokens, one.usage.cost) == (6, 6000, 2.5)
    assert [one.seconds for one in one.sessions] == [30.0] * 5 + [400.0]


def test_text_for_people_is_complete() -> None:
    """With sizes, findings, notes and paths; terminal sequences of agents are escaped."""
    document, handoffs = reviewed()
    shown = re.sub(r"\n {4,}", " ", text(details_of(document, FOUR, *handoffs)))
    for part in (
        "task t of run run: running",
        "  prompt    Add login.",
        "It has tests.",
        "(from tickets)",
        "requirements (120 of 3,400 bytes; omitted: risks)",
        "scout (session 1)",
        "as discussed",
        "build (visit 2): in progress",
        "review: pending",
        "verdict: reject",
        "a.py:3 (major) say \N{REPLACEMENT CHARACTER}[31mmore",
        "a.py, b.py",
        "invalid handoff, cli-2, 0:30, 1.0k tokens, $0.50",
        "continued an earlier conversation",
        "/logs/t.4.stdout",
        "run/t/1, scout: scout to plan; direct; via file; sha256:",
        "plan (session 2)",
        "plan to build; mediated; via file; sha256:",
        "not yet",
        "run/t/5, review: from review; direct",
        "--json prints all",
        "by shorter",
        "not landed; its work is saved as t/4",
        "6 sessions, 9:10, 6.1k tokens, $2.50",
    ):
        assert part in shown, part
    assert "\x1b" not in shown
    assert "x" * 500 not in shown


def test_unread_handoff_of_a_landed_task_is_not_awaited() -> None:
    document, handoffs = reviewed()
    landed = document.model_copy(update={"status": TaskStatus.LANDED, "landed": COMMIT})
    shown = text(details_of(landed, FOUR, *handoffs))
    assert ("never: no later phase needs it" in shown, "not yet" in shown) == (True, False), shown


def test_json_is_complete() -> None:
    """Handoffs are complete, and the object matches its schema."""
    document, handoffs = reviewed()
    told_as = {**details_of(document, FOUR, *handoffs).to_json(), "exit": 0}
    assert [error.message for error in Draft202012Validator(task_details_schema()).iter_errors(told_as)] == []
    assert [one["data"] for one in told_as["handoffs"]] == [one.data for one in handoffs]
    assert told_as["handoffs"][1]["mediation"]["processed"] == {"tasks": []}
    assert told_as["handoffs"][0]["receipts"][0]["phase"] == "plan"


def test_modified_handoff_is_reported() -> None:
    """The digest is that of the original content."""
    document, handoffs = reviewed()
    changed = handoffs[0].model_copy(update={"data": {"scout_findings": []}})
    one = details_of(document, FOUR, changed, *handoffs[1:])
    assert [each.is_intact for each in one.handoffs] == [False, True, True]
    assert "DAMAGED" in text(one)


@pytest.mark.parametrize(
    ("status", "outcome", "expected"),
    [
        (TaskStatus.PENDING, "crashed", "in_progress"),
        (TaskStatus.RUNNING, None, "in_progress"),
        (TaskStatus.QUEUED, "built", "completed"),
        (TaskStatus.LANDED, "built", "completed"),
        (TaskStatus.CONFLICT, "built", "completed"),
        (TaskStatus.FAILED, "crashed", "failed"),
        (TaskStatus.NO_CHANGE, "no_change", "failed"),
        (TaskStatus.CANCELLED, "cancelled", "cancelled"),
    ],
)
def test_task_without_a_workflow_has_one_phase(status: TaskStatus, outcome: str | None, expected: str) -> None:
    """All attempts belong to it."""
    attempts = (attempt(1, None, "crashed"), attempt(2, None, outcome))
    one = details_of(TaskDocument(status=status, attempts=attempts), TaskDefinition("Fix it."))
    [visit] = one.phases
    assert (visit.phase, visit.status, list(visit.attempts)) == ("build", expected, [1, 2])
    assert [session.phase for session in one.sessions] == ["build", "build"]
    assert one.remaining_phases == []


def test_phases_not_yet_started_are_listed() -> None:
    """Including those after an approval; none once the task ended."""
    assert details_of(TaskDocument()).remaining_phases == list(FOUR.phases)
    assert details_of(TaskDocument(), TaskDefinition("Fix it.")).remaining_phases == ["build"]
    asks = PhaseRecord(phase="plan", status=PhaseStatus.AWAITING_APPROVAL, attempts=(1,))
    waits = TaskDocument(status=TaskStatus.AWAITING_APPROVAL, attempts=(attempt(1, "plan"),), phases=(asks,))
    assert details_of(waits).remaining_phases == ["build", "review"]
    assert "plan: waiting for approval" in text(details_of(waits))
    approved = asks.model_copy(update={"status": PhaseStatus.COMPLETED})
    later = waits.model_copy(update={"status": TaskStatus.PENDING, "phases": (approved,), "phase": "build"})
    assert details_of(later).remaining_phases == ["build", "review"]
    over = waits.model_copy(update={"status": TaskStatus.CANCELLED})
    assert details_of(over).remaining_phases == []


def test_landing_names_the_commit() -> None:
    """On the target, queued, in conflict, or nowhere."""
    attempts = (attempt(1, None, "built"), attempt(2, None))
    landed = TaskDocument(status=TaskStatus.LANDED, attempts=attempts, commit=COMMIT, landed=COMMIT, built_by=1)
    assert "landed as 0123456789 on main, " in text(details_of(landed, TaskDefinition("x"), landed_at=5.0))
    assert details_of(landed, TaskDefinition("x"), landed_at=5.0).landing.attempt == 1
    queued = landed.model_copy(update={"status": TaskStatus.QUEUED, "landed": None})
    assert "0123456789, built by session 1, queued to land on main" in text(details_of(queued, TaskDefinition("x")))
    conflict = queued.model_copy(update={"status": TaskStatus.CONFLICT, "paths": ("a",), "branch": "council/run/t/c"})
    assert "conflicts with main in a; saved as t/c" in text(details_of(conflict, TaskDefinition("x")))
    assert "not landed" in text(details_of(TaskDocument(), TaskDefinition("x")))


def test_imported_task_has_its_original_fields() -> None:
    """Its phases have the original words, and there are no sessions."""
    was = ImportedTask(status="merged", phases={"plan": {"status": "complete"}, "build": "running", "odd": 7})
    one = details_of(TaskDocument(status=TaskStatus.LANDED, imported=was), TaskDefinition())
    assert [(visit.phase, visit.status) for visit in one.phases] == [
        ("plan", "complete"),
        ("build", "running"),
        ("odd", "unknown"),
    ]
    assert one.sessions == []
    assert "plan: complete" in text(one)


def test_prompt_keeps_its_lines() -> None:
    shown = text(details_of(TaskDocument(), TaskDefinition("Add login.\n\n  It has tests.\n", None, (), None, ())))
    assert "  prompt    Add login.\n\n              It has tests.\n" in shown
    long = TaskDefinition("\n".join(map(str, range(30))), None, (), None, ())
    assert "… (20 more lines; --json prints all)" in text(details_of(TaskDocument(), long))


def test_details_are_wrapped() -> None:
    """Only a long word, such as a path, is longer than a line."""
    document, handoffs = reviewed()
    prompt = TaskDefinition("word " * 30, None, (), None, ())
    lines = f"{text(details_of(document, FOUR, *handoffs))}\n{text(details_of(TaskDocument(), prompt))}".split("\n")
    assert [line for line in lines if len(line) > COLUMNS and " " in line.strip()] == []


def test_session_without_changes_is_not_a_failure() -> None:
    tried = attempt(1, None, "no_change")
    shown = text(details_of(TaskDocument(status=TaskStatus.NO_CHANGE, attempts=(tried,)), TaskDefinition("x")))
    assert "  build: no change, 1 session" in shown
