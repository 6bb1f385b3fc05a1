"""`council show` for tasks that were really run."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from orchestrator.api.council import Council
from orchestrator.domain.documents.json_values import compute_digest
from tests.conftest import Repository
from tests.integration.runs.test_control import has_begun
from tests.integration.workflows.test_workflow import APPROVE, PLAN, REJECT, SCOUT
from tests.waiting import wait_for

FOUR: list[dict[str, Any]] = [
    {"scout": {"access": "read", "produces": "scout"}},
    {"plan": {"access": "read", "produces": "plan"}},
    {"build": {"produces": "build"}},
    {"review": {"access": "read", "produces": "review", "on_reject": "build"}},
]
#: The plan is repaired once, the first review rejects, and reviewers change files that they may only read.
STEPS = (
    f"in scout hand-over {SCOUT}",
    'in plan attempt 2 hand-over {"tasks": []}',
    f"in plan attempt 3 hand-over {PLAN}",
    "in build attempt 4 write b.txt hello",
    "in build attempt 6 append b.txt more",
    "in build built b.txt",
    "in review write a.txt mine",
    f"in review attempt 5 hand-over {REJECT}",
    f"in review attempt 7 hand-over {APPROVE}",
    "print all is well",
)


async def test_task_with_phases_is_shown_in_full(repository: Repository) -> None:
    """Each visit with its sessions, inputs, handoffs and findings; handoffs with their receivers."""
    task = {"id": "t", "prompt": "\n".join(STEPS), "workflow": "four"}
    path = repository.configure([task, {"id": "plain", "prompt": "write p.txt x"}], workflows={"four": FOUR})
    ran = repository.council("run", str(path), "--json")
    assert ran.states == {"t": "landed", "plain": "landed"}, ran
    reported = repository.council("show", "t", "--json")
    assert reported.code == 0, reported
    details = json.loads(reported.stdout)
    schema = json.loads(repository.council("schema", "--task-details").stdout)
    assert [error.message for error in Draft202012Validator(schema).iter_errors(details)] == []
    visits = {(one["phase"], one["visit"]): one for one in details["phases"]}
    assert list(visits) == [("scout", 1), ("plan", 1), ("build", 1), ("review", 1), ("build", 2), ("review", 2)]
    assert [one["attempts"] for one in details["phases"]] == [[1], [2, 3], [4], [5], [6], [7]]
    assert {one["status"] for one in details["phases"]} == {"completed"}
    assert (visits["plan", 1]["repairs"], visits["review", 1]["verdict"]) == (1, "reject")
    assert [one["message"] for one in visits["review", 1]["findings"]] == ["say more"]
    assert [one["discarded"] for one in details["phases"]] == [[], [], [], ["a.txt"], [], ["a.txt"]]
    given = visits["plan", 1]["inputs"]
    assert "requirements" in given["keys"]
    assert 0 < given["size"] <= given["total_size"]
    handoffs = {one["id"]: one for one in details["handoffs"]}
    assert [one["attempt"] for one in details["handoffs"]] == [1, 3, 4, 5, 6, 7]
    assert all(one["is_intact"] and one["digest"] == compute_digest(one["data"]) for one in details["handoffs"])
    scout = handoffs[visits["scout", 1]["handoff"]]
    # Reviewers get all known results.
    assert [(one["phase"], one["attempt"]) for one in scout["receipts"]] == [("plan", 2), ("review", 5), ("review", 7)]
    assert visits["plan", 1]["received"] == [scout["id"]]
    assert all(Path(one["log"]).is_file() for one in details["sessions"])
    result = next(one for one in ran.result["tasks"] if one["id"] == "t")
    assert (details["landed"], details["landing"]["attempt"]) == (result["landed"], 6)
    assert details["landing"]["time"] >= details["sessions"][-1]["ended"]
    read = repository.council("show", "t").stdout
    for part in ("build (visit 2): completed", "b.txt:1 (major) say more", "discarded", "bytes", "landed as "):
        assert part in read, part
    async with Council.open(repository.top, environ=repository.environ) as council:
        assert {**(await council.tasks.details("t")).to_json(), "exit": 0} == details
        plain = await council.tasks.details("plain")
    assert [(one.phase, one.status, list(one.attempts)) for one in plain.phases] == [("build", "completed", [1])]
    assert (plain.workflow, plain.handoffs) == (None, [])
    assert (result["attempts"], details["attempts"], details["usage"]["sessions"]) == (1, 1, 7)
    await repository.assert_invariants()


@pytest.mark.extended
def test_sessions_are_shown_as_running_only_while_they_run(repository: Repository) -> None:
    """With the elapsed time; the interruption of an earlier one is shown for that session only."""
    path = repository.configure([{"id": "t", "prompt": "hang"}])
    child = repository.start("run", str(path))
    has_begun(repository, "t")
    read = repository.council("show", "t").stdout
    assert ("build: in progress, 1 session, " in read, "1 build: running, fake, " in read) == (True, True), read
    assert repository.council("show", "t", "--json").result["usage"]["seconds"] > 0
    child.send_signal(signal.SIGKILL)
    child.communicate()
    read = repository.council("show", "t").stdout
    assert ("build: pending, 1 session, " in read, "1 build: interrupted, fake, " in read) == (True, True), read
    assert repository.council("show", "t", "--json").result["attempts"] == 0
    child = repository.start("resume")
    wait_for(lambda: len(repository.council("show", "t", "--json").result["sessions"]) == 2)
    details = repository.council("show", "t", "--json").result
    child.send_signal(signal.SIGINT)
    child.communicate()
    assert [one["outcome"] for one in details["sessions"]] == ["interrupted", None]
    assert details["attempts"] == 1
    logs = repository.council("logs", "t", "--session", "2").stdout
    assert logs.startswith("session 2, fake, started ")
    assert "t: started (session 2, fake)" in repository.council("state", "show").stdout
    assert ("exited before" in details["sessions"][0]["reason"], details["reason"]) == (True, None)


@pytest.mark.extended
def test_silent_session_of_a_killed_process_counts_to_the_last_heartbeat(repository: Repository) -> None:
    """Before a resume, and as a resume records it."""
    path = repository.configure([{"id": "t", "prompt": "hang"}], coordination={"heartbeat_interval": "100ms"})
    child = repository.start("run", str(path))
    has_begun(repository, "t")

    def session() -> dict[str, float]:
        found: dict[str, float] = repository.council("show", "t", "--json").result["sessions"][0]
        return found

    def heartbeat() -> float:
        return float(repository.council("status", "--json").result["orchestrators"][0]["heartbeat"])

    started = session()["started"]
    wait_for(lambda: heartbeat() > started + 1)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    last = heartbeat()
    assert session()["ended"] >= last
    child = repository.start("resume")
    wait_for(lambda: len(repository.council("show", "t", "--json").result["sessions"]) == 2)
    assert session()["ended"] >= last
    child.send_signal(signal.SIGINT)
    child.communicate()


@pytest.mark.extended
def test_work_is_shown_as_preserved_only_if_it_is(repository: Repository) -> None:
    """Landed work is not preserved any more; leftovers of an earlier attempt still are."""
    path = repository.configure(
        [{"id": "t", "prompt": "attempt 1 write a.txt x\nattempt 1 exit 3\nattempt 2 write b.txt x"}]
    )
    assert repository.council("run", str(path), "--json").states == {"t": "landed"}
    kept = [one["name"] for one in repository.council("salvage", "list", "--json").result["preserved"]]
    assert re.findall(r"saved as +(\S+)", repository.council("show", "t").stdout) == kept == ["t/1"]


@pytest.mark.extended
def test_newest_run_is_the_default(repository: Repository) -> None:
    """Two runs may have a task of the same name; an unknown name suggests the nearest."""
    first = repository.council("run", str(repository.configure([{"id": "build", "prompt": "write a.txt x"}])), "--json")
    repository.council("run", str(repository.configure([{"id": "build", "prompt": "exit 3", "attempts": 1}])), "--json")
    newest, named = (
        json.loads(repository.council("show", "build", "--json", *run).stdout)
        for run in ([], ["--run", first.result["run"]])
    )
    assert (newest["status"], newest["sessions"][0]["outcome"]) == ("failed", "crashed")
    assert (named["run"], named["status"], named["prompt"]) == (first.result["run"], "landed", "write a.txt x")
    refused = repository.council("show", "biuld")
    assert (refused.code, "did you mean 'build'?" in refused.stderr) == (2, True)


@pytest.mark.extended
def test_done_task_has_nothing_to_land(repository: Repository) -> None:
    """A run of such tasks succeeds; dependent tasks may start, and a checklist ticks them."""
    one = [{"plan": {"access": "read", "produces": "plan"}}]
    tasks: list[dict[str, Any]] = [
        {"id": "thinks", "prompt": f"in plan hand-over {PLAN}", "workflow": "one"},
        {"id": "after", "prompt": "write c.txt x", "needs": ["thinks"]},
    ]
    ended = repository.council("run", str(repository.configure(tasks, workflows={"one": one})), "--json")
    assert (ended.code, ended.result["status"]) == (0, "landed"), ended
    assert ended.states == {"thinks": "done", "after": "landed"}
    assert "1 done, 1 of 2 landed on main" in repository.council("status").stdout
    assert "1 done, 1 of 2 landed on main" in repository.council("runs").stdout
    assert "not landed" in repository.council("show", "thinks").stdout
    refused = repository.council("retry", "thinks")
    assert (refused.code, "is done" in refused.stderr) == (2, True)


@pytest.mark.extended
def test_checklist_ticks_done_tasks(repository: Repository) -> None:
    """An item is finished with its workflow, with or without a landing."""
    todo = repository.top.parent / "todo.md"
    todo.write_text(f"- [ ] in plan hand-over {PLAN} {{#thinks}}\n- [ ] exit 3 {{#fails}}\n")
    path = repository.configure(
        [],
        workflows={"one": [{"plan": {"access": "read", "produces": "plan"}}]},
        trackers={"todo": {"use": "checklist", "file": str(todo)}},
        defaults={"workflow": "one", "attempts": 1},
    )
    ended = repository.council("run", str(path), "--json")
    assert ended.states == {"thinks": "done", "fails": "failed"}, ended
    assert [line[:5] for line in todo.read_text().splitlines()] == ["- [x]", "- [ ]"]
