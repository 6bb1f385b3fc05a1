"""A whole run of tasks with workflows: git, state and events agree."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.engine.state.records import read_handoffs, read_run, read_tasks, task_documents
from orchestrator.protocols import Event
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.conftest import CommandResult, Repository
from tests.waiting import wait_for

EMPTY: dict[str, list[str]] = {"dependencies": [], "timeline": [], "resources": []}
REJECT = {"verdict": "reject", "findings": [{"path": "src/app.py", "line": 1, "message": "not yet"}]}
APPROVE = {"verdict": "approve"}


def plan(*tasks: dict[str, Any]) -> str:
    """Return a plan of tasks as JSON."""
    return json.dumps({"tasks": list(tasks) or [{"id": "one", "prompt": "do it"}], **EMPTY})


def steps(name: str, *more: str, review: str = f"in review tell {json.dumps(APPROVE)}") -> str:
    """Return the steps of a task in each phase of the built-in workflow, in addition to `more`."""
    return "\n".join(
        (
            f'in scout hand-over {{"scout_findings": ["what {name} is about"]}}',
            f"in plan answer {plan()}",
            f"in build write notes/{name}.txt built",
            f"in build built notes/{name}.txt",
            *more,
            review,
        )
    )


def tasks(count: int) -> list[dict[str, Any]]:
    """Return this many tasks, with a special feature for each of the first ones."""
    rejected = f"in review attempt 4 tell {json.dumps(REJECT)}\nin review attempt 6 tell {json.dumps(APPROVE)}"
    never = f"in review tell {json.dumps(REJECT)}"
    special: list[dict[str, Any]] = [
        {"id": "plain", "prompt": steps("plain")},
        {"id": "rejected", "prompt": steps("rejected", review=rejected)},
        {"id": "never", "prompt": steps("never", review=never)},
        {"id": "repaired", "prompt": steps("repaired").replace("in plan answer", "in plan attempt 3 answer")},
        {"id": "invalid", "prompt": steps("invalid").replace("in scout hand-over", "in scout print")},
        {"id": "editor", "prompt": steps("editor", "in review write src/app.py wrong")},
        {"id": "crashes", "prompt": f"in build attempt 3 exit 3\n{steps('crashes')}"},
        {"id": "careful", "prompt": steps("careful"), "workflow": "careful"},
        {
            "id": "large",
            "prompt": "in plan hand-over "
            + plan(
                *({"id": f"p{n}", "prompt": f"write parts/{n}.txt x", "owns": [f"parts/{n}.txt"]} for n in range(5))
            ),
            "workflow": "large",
        },
        {"id": "after", "prompt": steps("after"), "needs": ["large"]},
    ]
    usual = [{"id": f"t{n}", "prompt": steps(f"t{n}")} for n in range(count - len(special))]
    return [{"workflow": "adw", **one} for one in (*special, *usual)][:count]


def configure(repository: Repository, count: int) -> Path:
    """Write the config of this many tasks."""
    careful = [
        {"scout": {"access": "read", "produces": "scout"}},
        {"plan": {"access": "read", "produces": "plan", "approve": True}},
        {"build": {"produces": "build"}},
        {"review": {"access": "read", "produces": "review"}},
    ]
    large = [{"plan": {"access": "read", "produces": "plan", "expand": True}}]
    return repository.configure(tasks(count), workflows={"careful": careful, "large": large}, capacity=4)


async def read(repository: Repository, run: str) -> tuple[dict[str, Any], list[Event], dict[str, int]]:
    """Return the recorded tasks, the events, and the number of handoffs per task."""
    async with FileStore.open(repository.log, SystemClock()) as store:
        document = await read_run(store, run)
        found = task_documents(await read_tasks(store, run), document.tasks)
        handoffs = {task: len(await read_handoffs(store, run, task)) for task in document.tasks}
        last, events = await store.position(), list[Event]()
        async for record in store.watch():
            events += record.events
            if record.position == last:
                break
    return dict(found), events, handoffs


@pytest.mark.extended
@pytest.mark.parametrize("count", [pytest.param(9), pytest.param(20, marks=pytest.mark.slow)])
async def test_git_state_and_events_agree(repository: Repository, count: int) -> None:
    """Rejected, repaired, invalid, edited, crashed, approved, expanded: each has its expected outcome."""
    path = configure(repository, count)
    started = repository.start("run", str(path), "--json")

    def is_requested() -> bool:
        status = repository.council("status", "--json")
        return "tasks" in status.result and status.states.get("careful") == "awaiting_approval"

    wait_for(is_requested, 90)
    assert repository.council("approve", "careful", "--note", "go on").code == 0
    stdout, stderr = started.communicate(timeout=110)
    ended = CommandResult(started.returncode, stdout, stderr)
    failed = {"never": "failed", "invalid": "failed"}
    done = {"large": "done"}
    parts = {f"large-p{n}": "landed" for n in range(5)}
    named = [one["id"] for one in tasks(count)]
    assert ended.states == {**dict.fromkeys(named, "landed"), **failed, **done, **parts}, ended
    found, events, handoffs = await read(repository, ended.result["run"])
    reported = Counter((event.data.get("task"), event.type) for event in events)
    trailers = repository.git(
        "log", "--first-parent", "--format=%(trailers:key=Council-Task,valueonly)", "main"
    ).split()
    for task, document in found.items():
        is_landed = document.status is TaskStatus.LANDED
        assert trailers.count(f"{ended.result['run']}/{task}") == int(is_landed), task
        assert reported[task, "task.landed"] == int(is_landed)
        completed = [one for one in document.phases if one.status == "completed"]
        assert reported[task, "phase.completed"] == len(completed)
        assert reported[task, "phase.entered"] == sum(one.status != "skipped" for one in document.phases)
        assert (
            handoffs[task] == reported[task, "handoff.submitted"] == sum(one.handoff is not None for one in completed)
        )
        assert reported[task, "task.started"] == len(document.attempts)
    assert [one.phase for one in found["rejected"].phases].count("build") == 2
    assert "not yet" in (found["never"].reason or "")
    repeated = {event.data["task"]: event.data.get("phase") for event in events if event.type == "task.phase_repeated"}
    assert repeated["rejected"] == "build"
    assert reported["editor", "task.changes_discarded"] == 1
    assert repository.git("show", "main:src/app.py").startswith("def main")
    assert found["careful"].phases[1].note == "go on"
    assert sorted(repository.git("ls-tree", "--name-only", "main:parts").split()) == [f"{n}.txt" for n in range(5)]
    await repository.assert_invariants()
