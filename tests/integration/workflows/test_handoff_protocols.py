"""Delivery of phase results to the next phase, as recorded: whole runs with a real program."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator import Council
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.phases import PhaseStatus
from orchestrator.domain.settings.phase_settings import HandoffSettings, Phase
from orchestrator.domain.workflow.handoffs import Handoff, is_intact
from orchestrator.domain.workflow.routing import Workflow, completed_visits
from orchestrator.engine.state.records import read_handoffs, read_task
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.conftest import Repository

pytestmark = pytest.mark.extended_rest

SCOUT = json.dumps({"scout_findings": ["there is a README"], "requirements": ["a login"], "risks": ["a race"]})
PLAN = json.dumps({"tasks": [{"id": "t1", "prompt": "b"}], "dependencies": [], "timeline": [], "resources": []})
REJECT = json.dumps({"verdict": "reject", "findings": [{"path": "b.txt", "message": "say more"}]})


def reporting_usage(repository: Repository) -> dict[str, Any]:
    """Return an adapter for the fake CLI whose output reports its usage."""
    return repository.fake_adapter(
        read=[{"match": r"^used (?P<input_tokens>\d+) (?P<output_tokens>\d+) (?P<cost>\S+)$"}]
    )


async def recorded(repository: Repository, run: str) -> tuple[TaskDocument, dict[str, Handoff]]:
    """Return the record of the task `t`, and its phases' handoffs by phase and attempt."""
    async with FileStore.open(repository.log, SystemClock()) as store:
        handoffs = await read_handoffs(store, run, "t")
        found = {f"{one.phase}.{one.attempt}": one for _, one in handoffs.values()}
        return await read_task(store, run, "t"), found


async def test_direct_handoff_has_its_origin(repository: Repository) -> None:
    """Its author and receiver, the task's usage so far, the session's summary; and the receipt."""
    workflow = [
        {"scout": {"access": "read", "produces": "scout"}},
        {"plan": {"access": "read", "produces": "plan", "context": {"style": "short"}, "needs": ["risks", "style"]}},
        {"build": {"produces": "build"}},
    ]
    steps = (
        *("in scout print used 100 20 $0.25", f"in scout hand-over {SCOUT}"),
        *(
            "in plan keep-prompt",
            "in plan print used 10 5 $0.50",
            "in plan print planned it",
            f"in plan hand-over {PLAN}",
        ),
        *("in build write b.txt x", "in build built b.txt"),
    )
    task = {"id": "t", "prompt": "\n".join(steps), "workflow": "three", "adapter": "reporting_usage"}
    path = repository.configure(
        [task], workflows={"three": workflow}, adapters={"reporting_usage": reporting_usage(repository)}
    )
    ended = repository.council("run", str(path), "--json")
    assert ended.states == {"t": "landed"}, ended
    document, handoffs = await recorded(repository, ended.result["run"])
    scout, plan, build = handoffs["scout.1"], handoffs["plan.2"], handoffs["build.3"]
    assert [(one.phase, one.to) for one in (scout, plan, build)] == [
        ("scout", "plan"),
        ("plan", "build"),
        ("build", None),
    ]
    assert [(one.tokens, one.cost) for one in (scout, plan, build)] == [(120, 0.25), (135, 0.75), (135, 0.75)]
    assert {(one.protocol, one.status, one.via) for one in handoffs.values()} == {("direct", "completed", "file")}
    assert scout.data["risks"] == ["a race"]
    assert "planned it" in plan.summary
    assert all(map(is_intact, handoffs.values()))
    received = [(one.phase, one.attempt, one.digest) for one in scout.receipts]
    assert received[0] == ("plan", 2, scout.digest)
    # The needed facts, and nothing else.
    inputs = document.phases[1].inputs
    assert inputs is not None
    assert (inputs.keys, "requirements" in inputs.omitted) == (("risks", "style"), True)
    assert 0 < inputs.size < inputs.total_size
    output = repository.council("logs", "t", "--session", "2").stdout
    assert "a race" in output
    assert "a login" not in output.replace(SCOUT, "")
    await repository.assert_invariants()


async def test_named_phase_mediates(repository: Repository) -> None:
    """The mediator's result replaces the original; handoffs of earlier phases are available as `results`."""
    prepared = json.dumps({"scout_findings": ["made ready"], "requirements": []})
    known = "{{ 'old' if results.scout is defined else 'new' }}"
    prompt = f"{{{{ task.prompt }}}}\nkeep-prompt\nGiven: {{{{ inputs.scout_findings | join }}}}, {known}"
    workflow = [
        {"scout": {"access": "read", "produces": "scout", "handoff": "mediated", "mediator": "prepare"}},
        {"prepare": {"access": "read", "produces": "scout", "prompt": prompt}},
        {"build": {"needs": ["scout_findings"], "prompt": prompt}},
    ]
    steps = (f"in scout hand-over {SCOUT}", f"in prepare hand-over {prepared}", "in build write b.txt x")
    path = repository.configure(
        [{"id": "t", "prompt": "\n".join(steps), "workflow": "mediated"}], workflows={"mediated": workflow}
    )
    ended = repository.council("run", str(path), "--json")
    assert ended.states == {"t": "landed"}, ended
    document, handoffs = await recorded(repository, ended.result["run"])
    assert handoffs["scout.1"].mediation is None
    mediating, building = (repository.council("logs", "t", "--session", number).stdout for number in ("2", "3"))
    assert "there is a README" in mediating.partition("Given: ")[2]
    assert "made ready" in building.partition("Given: ")[2]
    assert "there is a README" not in building.partition("Given: ")[2]
    assert (mediating.count(", old"), building.count(", new")) == (1, 1)
    assert document.phases[2].received == (handoffs["prepare.2"].id,)
    await repository.assert_invariants()


async def test_failing_phase_has_its_reason(repository: Repository) -> None:
    """In the visit, in its task, and in an event; earlier results stay."""
    workflow = [{"scout": {"access": "read", "produces": "scout"}}, {"build": {}}]
    steps = (f"in scout hand-over {SCOUT}", "in build exit 3 no room")
    path = repository.configure(
        [{"id": "t", "prompt": "\n".join(steps), "workflow": "two", "attempts": 2}], workflows={"two": workflow}
    )
    ended = repository.council("run", str(path), "--json")
    assert ended.states == {"t": "failed"}, ended
    document, handoffs = await recorded(repository, ended.result["run"])
    scout, build = document.phases
    assert (scout.status, scout.handoff, list(handoffs)) == (PhaseStatus.COMPLETED, handoffs["scout.1"].id, ["scout.1"])
    assert (build.status, build.attempts) == (PhaseStatus.FAILED, (2, 3))
    assert build.reason is not None
    assert build.reason == document.reason
    assert "3" in build.reason
    assert build.started is not None
    assert build.ended is not None
    assert scout.ended is not None
    assert scout.ended <= build.started <= build.ended
    [event] = [one for one in ended.lines if one.get("event") == "phase.failed"]
    assert (event["phase"], event["reason"]) == ("build", build.reason)
    await repository.assert_invariants()


@pytest.mark.extended
async def test_only_complete_handoffs_count(repository: Repository) -> None:
    """If a phase is repeated, its previous result does not count any more."""
    review = {"access": "read", "produces": "review", "max_rounds": 1}
    workflow: list[dict[str, Any]] = [{"build": {"produces": "build"}}, {"review": review}]
    steps = ("in build append b.txt more", "in build built b.txt", f"in review hand-over {REJECT}")
    path = repository.configure(
        [{"id": "t", "prompt": "\n".join(steps), "workflow": "two"}], workflows={"two": workflow}
    )
    repository.council("run", str(path), "--json", failpoints="attempt.recorded=kill@3")
    async with Council.open(repository.top, environ=repository.environ) as council:
        run = await council.runs.newest()
        document, handoffs = await recorded(repository, run)
        phases = Workflow(
            (Phase(name="build", produces=HandoffSettings(kind="build")), Phase(name="review", access="read"))
        )
        # The review has rejected it, and the build runs again.
        assert [(one.phase, one.status) for one in document.phases] == [
            ("build", PhaseStatus.COMPLETED),
            ("review", PhaseStatus.COMPLETED),
            ("build", PhaseStatus.IN_PROGRESS),
        ]
        assert completed_visits(phases, document) == {}
        assert sorted(handoffs) == ["build.1", "review.2"]
    ended = repository.council("resume", "--json")
    assert ended.states == {"t": "failed"}, ended
    await repository.assert_invariants()
