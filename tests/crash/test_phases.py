"""A workflow killed at any step and resumed continues at the interrupted phase."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.phases import PhaseStatus
from orchestrator.domain.workflow.handoffs import is_intact
from orchestrator.engine.state.records import read_handoffs, read_task
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.conftest import Repository

PHASES = ("scout", "plan", "build", "review")
#: Reached once by each session, or as often as given.
STEPS = {
    "attempt.recorded": 4,
    "worktree.created": 4,
    "session.spawned": 4,
    "session.ended": 4,
    "work.committed": 1,
    "phase.checked": 1,
    "handoff.taken": 4,
    "work.recorded": 4,
    "attempt.ended": 4,
    "worktree.removed": 4,
    "landing.intended": 1,
    "landing.pushed": 1,
    "landing.recorded": 1,
}


def configure(repository: Repository) -> Path:
    """Write the config of a task with four phases."""
    scout = json.dumps({"scout_findings": ["there is a README"]})
    plan = json.dumps({"tasks": [{"id": "t1", "prompt": "b"}], "dependencies": [], "timeline": [], "resources": []})
    steps = (
        f"in scout hand-over {scout}",
        f"in plan answer {plan}",
        "in build write b.txt hello",
        "in build built b.txt",
        'in review tell {"verdict": "approve"}',
    )
    workflow = [
        {"scout": {"access": "read", "produces": "scout"}},
        {"plan": {"access": "read", "produces": "plan"}},
        {"build": {"produces": "build", "until": ["test -f b.txt"]}},
        {"review": {"access": "read", "produces": "review"}},
    ]
    task = {"id": "t", "prompt": "\n".join(steps), "workflow": "four"}
    return repository.configure([task], workflows={"four": workflow})


async def recorded(repository: Repository, run: str) -> TaskDocument:
    """Assert the records of the task, and return them."""
    async with FileStore.open(repository.log, SystemClock()) as store:
        task = await read_task(store, run, "t")
        handoffs = {id_: one for id_, (_, one) in (await read_handoffs(store, run, "t")).items()}
        last, events = await store.position(), []
        async for record in store.watch():
            events += [event for event in record.events if event.data.get("task") == "t"]
            if record.position == last:
                break
    assert [(one.phase, one.status) for one in task.phases] == [(name, PhaseStatus.COMPLETED) for name in PHASES]
    assert [event.data["phase"] for event in events if event.type == "phase.completed"] == list(PHASES)
    # Each phase submitted one handoff, and each handoff was received once by its recipient only.
    assert sorted(handoffs) == sorted(one.handoff or "" for one in task.phases)
    assert sum(event.type == "handoff.submitted" for event in events) == len(PHASES)
    received = [(id_, one.phase) for one in task.phases for id_ in one.received]
    assert sorted((id_, receipt.phase) for id_, one in handoffs.items() for receipt in one.receipts) == sorted(received)
    assert sum(event.type == "handoff.received" for event in events) == len(received) > 0
    assert all(map(is_intact, handoffs.values()))
    # Done phases stay done: attempts are in phase order, each of one visit.
    order = [PHASES.index(one.phase or "") for one in task.attempts]
    assert order == sorted(order)
    assert [number for one in task.phases for number in one.attempts] == [one.number for one in task.attempts]
    return task


@pytest.mark.parametrize(
    ("name", "hit"),
    [pytest.param(name, hit, marks=pytest.mark.slow) for name, hits in STEPS.items() for hit in range(1, hits + 1)],
)
async def test_workflow_killed_at_a_failpoint_resumes(repository: Repository, name: str, hit: int) -> None:
    """Done phases are kept, and no session starts without a record."""
    killed = repository.council("run", str(configure(repository)), "--json", failpoints=f"{name}=kill@{hit}")
    assert killed.code == -signal.SIGKILL, killed
    ended = repository.council("resume", "--json")
    assert ended.states == {"t": "landed"}, ended
    task = await recorded(repository, killed.lines[0]["run"])
    started = [line.split()[2] for line in repository.spawns.read_text().splitlines()]
    assert sorted(set(started)) == sorted(started), "no attempt was started twice"
    assert set(started) <= {str(one.number) for one in task.attempts}
    assert (repository.top / "b.txt").read_text() == "hello\n"
    await repository.assert_invariants()


@pytest.mark.extended
async def test_workflow_killed_at_each_step_in_turn_resumes(repository: Repository) -> None:
    """It finishes after any number of kills."""
    command = ["run", str(configure(repository))]
    run = ""
    for name in (
        "handoff.taken",
        "session.spawned",
        "work.recorded",
        "phase.checked",
        "attempt.recorded",
        "attempt.ended",
    ):
        killed = repository.council(*command, "--json", failpoints=f"{name}=kill")
        assert killed.code == -signal.SIGKILL, (name, killed)
        run, command = run or killed.lines[0]["run"], ["resume"]
    ended = repository.council("resume", "--json")
    assert ended.states == {"t": "landed"}, ended
    await recorded(repository, run)
    await repository.assert_invariants()
