"""The consistency rules of workflow records, each by a record that violates it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.domain.runs.model import Attempt, TaskDocument
from orchestrator.domain.runs.phases import InputSummary, PhaseRecord, PhaseStatus
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.sessions.contexts import SessionContext, SessionStatus
from orchestrator.domain.settings.phase_settings import HandoffSettings, Phase
from orchestrator.domain.workflow.handoffs import Handoff, acknowledge, make_handoff
from orchestrator.domain.workflow.routing import Workflow
from orchestrator.domain.workflow.verification import IDLE_LIMIT, WorkflowRecord, check_workflow
from orchestrator.domain.workflow.violations import Violation

COMMIT = "0123456789" * 4
SUM = "0123456789abcdef" * 4
WORKFLOW = Workflow(
    (
        Phase(name="plan", access="read", produces=HandoffSettings(kind="plan")),
        Phase(name="build", produces=HandoffSettings(kind="build")),
        Phase(name="review", access="read", produces=HandoffSettings(kind="review"), on_reject="build"),
    )
)
PLAN = {"tasks": [{"id": "a", "prompt": "x"}], "dependencies": [], "timeline": [], "resources": []}
DATA = {"plan": PLAN, "build": {"artifacts": {"a.py": SUM}}, "review": {"verdict": "approve"}}


def handoff(phase: str, attempt: int, to: str | None, **reported: Any) -> Handoff:
    """Return the handoff of an attempt at a phase."""
    facts = {"kind": phase, "protocol": "direct", "phase": phase, "to": to, "time": 1.0, "via": "file", **reported}
    return make_handoff("run", "task", attempt, facts.pop("data", DATA[phase]), **facts)


def attempts(*phases: str) -> tuple[Attempt, ...]:
    """Return ended attempts at these phases."""
    return tuple(
        Attempt(number=number, adapter="x", base=COMMIT, started=float(number), ended=number + 0.5, phase=phase)
        for number, phase in enumerate(phases, start=1)
    )


def visit(phase: str, number: int, **reported: Any) -> PhaseRecord:
    """Return a visit completed by one attempt."""
    facts = {"status": PhaseStatus.COMPLETED, "started": float(number), "ended": number + 0.5, "attempts": (number,)}
    return PhaseRecord(phase=phase, **{**facts, "handoff": f"run/task/{number}", **reported})


def valid_record() -> WorkflowRecord:
    """Return the valid facts of a task that is queued to land."""
    first = acknowledge(handoff("plan", 1, "build"), "build", 2, 2.0)
    second = acknowledge(handoff("build", 2, "review"), "review", 3, 3.0)
    third = handoff("review", 3, None)
    phases = (
        visit("plan", 1),
        visit("build", 2, received=(first.id,), commit=COMMIT, inputs=InputSummary(keys=("plan",))),
        visit("review", 3, received=(second.id,), verdict="approve"),
    )
    document = TaskDocument(status=TaskStatus.QUEUED, attempts=attempts("plan", "build", "review"), phases=phases)
    return WorkflowRecord(
        "run", "task", WORKFLOW, document, {one.id: one for one in (first, second, third)}, now=1000.0
    )


def changed(facts: WorkflowRecord, number: int | None = None, **changes: Any) -> WorkflowRecord:
    """Return facts with changes to the document, or to the visit with this index."""
    document = facts.document
    if number is not None:
        phases = [*document.phases]
        phases[number] = phases[number].model_copy(update=changes)
        changes = {"phases": tuple(phases)}
    return replace(facts, document=document.model_copy(update=changes))


def rules(facts: WorkflowRecord) -> set[str]:
    found = check_workflow(facts, {})
    assert all("task" in one.location and one.message and one.remedy for one in found), found
    return {one.rule for one in found}


def with_handoff(facts: WorkflowRecord, number: int, **changes: Any) -> WorkflowRecord:
    """Return facts with one changed handoff."""
    id_ = f"run/task/{number}"
    return replace(facts, handoffs={**facts.handoffs, id_: facts.handoffs[id_].model_copy(update=changes)})


def test_complete_record_has_no_violation() -> None:
    facts = valid_record()
    assert rules(facts) == set()
    document = facts.document
    assert rules(changed(facts, 1, ended=0.5)) == set()  # the clock was set back, or is another machine's
    begun = changed(facts, 2, status=PhaseStatus.IN_PROGRESS, ended=None, handoff=None, verdict=None)
    kept = {id_: one for id_, one in facts.handoffs.items() if one.attempt < 3}
    assert rules(changed(replace(begun, handoffs=kept), status=TaskStatus.RUNNING)) == set()
    assert rules(WorkflowRecord("run", "task", Workflow(), TaskDocument(status=TaskStatus.DONE))) == set()
    # A second pass through the last two phases, after a rejection.
    rejected = handoff("review", 3, None, data={"verdict": "reject", "findings": [{"message": "m"}]})
    first = acknowledge(facts.handoffs["run/task/1"], "build", 4, 4.0)
    fourth = acknowledge(handoff("build", 4, "review"), "review", 5, 5.0)
    phases = (
        *document.phases[:2],
        document.phases[2].model_copy(update={"verdict": "reject"}),
        visit("build", 4, received=(first.id,)),
        visit("review", 5, received=(fourth.id,), verdict="approve"),
    )
    made = {one.id: one for one in (first, facts.handoffs["run/task/2"], rejected, fourth, handoff("review", 5, None))}
    tried = attempts("plan", "build", "review", "build", "review")
    assert rules(changed(replace(facts, handoffs=made), attempts=tried, phases=phases)) == set()


BROKEN: list[tuple[str, Any]] = [
    ("phases.unknown", lambda one: changed(one, 0, phase="plot")),
    ("phases.open", lambda one: changed(one, 0, status=PhaseStatus.IN_PROGRESS)),
    ("phases.open", lambda one: changed(changed(one, 2, status=PhaseStatus.IN_PROGRESS), status=TaskStatus.FAILED)),
    ("phases.time", lambda one: changed(one, 1, ended=None)),
    ("phases.approval", lambda one: changed(one, 2, status=PhaseStatus.AWAITING_APPROVAL)),
    ("phases.approval", lambda one: changed(one, status=TaskStatus.AWAITING_APPROVAL)),
    ("phases.end", lambda one: changed(one, 0, status=PhaseStatus.FAILED)),
    ("phases.end", lambda one: changed(one, phases=one.document.phases[:2])),
    ("phases.landing", lambda one: changed(one, status=TaskStatus.DONE)),
    ("attempts.missing", lambda one: changed(one, 1, attempts=(2, 9))),
    ("attempts.phase", lambda one: changed(one, attempts=attempts("plan", "plan", "review"))),
    ("attempts.twice", lambda one: changed(one, 1, attempts=(2, 1))),
    ("outputs.missing", lambda one: changed(one, 0, handoff=None)),
    ("outputs.missing", lambda one: replace(one, handoffs={})),
    ("outputs.extra", lambda one: replace(one, workflow=Workflow((Phase(name="plan"), *WORKFLOW.phases[1:])))),
    ("outputs.verdict", lambda one: changed(one, 2, verdict="reject")),
    ("outputs.kind", lambda one: with_handoff(one, 1, kind="scout")),
    ("outputs.unknown", lambda one: replace(one, kinds={})),
    ("plan.required", lambda one: with_handoff(one, 1, data={"tasks": ["x"]})),
    ("plan.dependencies", lambda one: with_handoff(one, 1, data={**PLAN, "dependencies": {"a": "b"}})),
    ("build.checksum", lambda one: replace(one, checksums={"run/task/2": {"a.py": "f" * 64}})),
    ("build.artifacts", lambda one: replace(one, checksums={"run/task/2": {"a.py": None}})),
    ("chain.digest", lambda one: with_handoff(one, 1, data={**PLAN, "summary": "else"})),
    ("chain.name", lambda one: with_handoff(one, 1, id="run/other/1")),
    ("chain.name", lambda one: replace(one, run="else")),
    ("chain.source", lambda one: with_handoff(one, 1, phase="build")),
    ("chain.source", lambda one: replace(one, handoffs={**one.handoffs, "run/task/4": handoff("plan", 4, "build")})),
    ("chain.target", lambda one: with_handoff(one, 1, to="nowhere")),
    ("chain.received", lambda one: with_handoff(one, 1, receipts=())),
    ("chain.received", lambda one: changed(one, 1, received=())),
    ("chain.missing", lambda one: changed(one, 1, received=("run/task/1", "run/task/7"))),
    ("chain.order", lambda one: changed(one, 0, received=("run/task/3",))),
    ("chain.lost", lambda one: changed(with_handoff(one, 1, receipts=()), 1, received=())),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "broken"), BROKEN, ids=[f"{n} {rule}" for n, (rule, _) in enumerate(BROKEN)])
def test_violation_is_found(rule: str, broken: Any) -> None:
    """Reported under the rule that the record violates."""
    assert rule in rules(broken(valid_record()))


def test_foreign_receipt_is_found() -> None:
    """A visit must have received its own handoff."""
    facts = valid_record()
    receipt = facts.handoffs["run/task/1"].receipts[0].model_copy(update={"digest": "sha256:0"})
    assert rules(with_handoff(facts, 1, receipts=(receipt,))) == {"chain.received"}


def test_attempts_after_a_restore_need_no_visit() -> None:
    """A restore keeps the records of later attempts."""
    facts = valid_record()
    more = changed(facts, attempts=attempts("plan", "build", "review", "build"))
    assert rules(changed(more, current=3)) == set()


def session(attempt: int, status: SessionStatus, updated: float) -> SessionContext:
    """Return the status record of a session."""
    return SessionContext(
        run="run", task="task", attempt=attempt, adapter="x", orchestrator="o", scope="s", status=status,
        started=0.0, updated=updated,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("attempt", "status", "age", "found"),
    [
        (3, SessionStatus.DONE, IDLE_LIMIT + 1, {"sessions.idle"}),
        (3, SessionStatus.DONE, IDLE_LIMIT - 1, set()),
        (3, SessionStatus.WORKING, IDLE_LIMIT * 9, set()),
        (2, SessionStatus.DONE, IDLE_LIMIT * 9, set()),
        (9, SessionStatus.WORKING, 0.0, {"sessions.stray"}),
    ],
)
def test_session_without_a_task_is_found(attempt: int, status: SessionStatus, age: float, found: set[str]) -> None:
    """A completed session that never ended keeps its task waiting."""
    facts = valid_record()
    begun = changed(facts, 2, status=PhaseStatus.IN_PROGRESS, ended=None, handoff=None, verdict=None)
    running = begun.document.attempts[2].model_copy(update={"ended": None})
    tried = (*begun.document.attempts[:2], running)
    begun = changed(begun, status=TaskStatus.RUNNING, attempts=tried)
    kept = {id_: one for id_, one in facts.handoffs.items() if one.attempt < 3}
    others = session(attempt, status, 1000.0 - age).model_copy(update={"run": "other"})
    assert rules(replace(begun, handoffs=kept, sessions=[session(attempt, status, 1000.0 - age), others])) == found


def test_plugin_rules_are_checked() -> None:
    """A failing rule is reported by name and does not hide the others."""
    mine = Violation("mine", "task", "no", "do")
    constraints: dict[str, Any] = {
        "broken": lambda facts: facts.gone,
        "nothing": lambda _facts: (),
        "strange": lambda _facts: [1],
        "none": lambda _facts: None,
        "right": lambda facts: [mine] if facts.document.attempts else [],
    }
    found = check_workflow(valid_record(), constraints)
    assert [one.rule for one in found] == ["constraint.broken", "constraint.strange", "constraint.none", "mine"]
