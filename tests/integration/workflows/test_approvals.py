"""Approve or reject a phase result from another terminal, and retry a task from an earlier phase."""

from __future__ import annotations

import json
import re
import signal
from typing import Any

import anyio
import pytest

from orchestrator.api.council import Council
from orchestrator.cli.render.events import event_text
from orchestrator.protocols import Event
from orchestrator.sessions.session import Session
from tests.command_server import StartedCommand
from tests.conftest import CommandResult, Repository
from tests.integration.workflows.test_workflow import PLAN
from tests.waiting import wait_for

#: A person approves the plan before the build.
ASKS = {
    "asks": [
        {"plan": {"access": "read", "produces": "plan", "approve": True}},
        {"build": {"produces": "build"}},
    ]
}
STEPS = (f"in plan hand-over {PLAN}", "in build write b.txt hello", "in build built b.txt")


def configured(repository: Repository, *more: str, **facts: Any) -> str:
    task = {"id": "t", "prompt": "\n".join((*STEPS, *more)), "workflow": "asks", **facts}
    return str(repository.configure([task, {"id": "after", "prompt": "write c.txt x", "needs": ["t"]}], workflows=ASKS))


def wait_for_approval(repository: Repository, session: int = 1) -> dict[str, Any]:
    """Return the task's `status` when it waits for approval after this many sessions."""

    def waiting_task() -> dict[str, Any] | None:
        ended = repository.council("status", "--json")
        found = next((one for one in ended.result.get("tasks", ()) if one["id"] == "t"), None) if ended.stdout else None
        if found is None or found["status"] != "awaiting_approval":
            return None
        return found if repository.council("show", "t", "--json").result["usage"]["sessions"] == session else None

    found = wait_for(waiting_task)
    assert found is not None
    return found


def finished(child: StartedCommand) -> CommandResult:
    stdout, stderr = child.communicate(timeout=60)
    return CommandResult(child.returncode, stdout, stderr)


def events(ended: CommandResult, name: str) -> list[dict[str, Any]]:
    return [one for one in ended.lines if one.get("event") == name]


@pytest.mark.extended
async def test_run_waits_for_approval_and_continues(repository: Repository) -> None:
    """`status` prints the command; the run reports once what it waits for."""
    child = repository.start("run", configured(repository), "--json")
    waits = wait_for_approval(repository)
    assert (waits["phase"], waits["reason"]) == ("plan", "phase 'plan' waits for approval")
    shown = repository.council("status").stdout
    assert "waiting for approval" in shown
    assert "next: council show t\n    then: council approve t\n    or: council reject t --note TEXT\n" in shown
    assert "Waiting for approval: t." in shown
    assert "plan: waiting for approval" in repository.council("show", "t").stdout
    assert child.poll() is None
    approved = repository.council("approve", "t", "--note", "as discussed", "--json")
    assert approved.code == 0, approved
    ended = finished(child)
    assert (ended.code, ended.states) == (0, {"t": "landed", "after": "landed"}), ended
    assert [one["approvals"] for one in events(ended, "run.waiting")] == [["t"]]
    assert [one["note"] for one in events(ended, "task.approved")] == ["as discussed"]
    assert re.search(r"note +as discussed", repository.council("show", "t").stdout)
    await repository.assert_invariants()


async def test_rejected_result_is_repeated_with_the_note(repository: Repository) -> None:
    """The next session gets the note; a second wait for approval is reported again."""
    child = repository.start("run", configured(repository, "in plan attempt 2 keep-prompt"), "--json")
    wait_for_approval(repository)
    assert repository.council("reject", "t", "--note", "keep the old names").code == 0
    wait_for_approval(repository, 2)
    assert "keep the old names" in repository.council("logs", "t", "--session", "2").stdout
    assert re.findall(r"received +(.+)", repository.council("show", "t").stdout) == [
        "never: a user rejected it",
        "not yet",
    ]
    assert repository.council("approve", "t").code == 0
    ended = finished(child)
    assert ended.states["t"] == "landed", ended
    assert [one["approvals"] for one in events(ended, "run.waiting")] == [["t"], ["t"]]
    assert [one["note"] for one in events(ended, "task.rejected")] == ["keep the old names"]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_approval_during_the_end_of_a_session_is_accepted(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait is recorded before its session has released the worktree slot; the next session starts after that."""
    path = configured(repository)
    release, answers = Session.release, ["reject", "approve"]
    async with Council.open(path, environ=repository.environ) as council:
        run = await council.runs.create()

        async def answered_first(session: Session, *, saved: bool) -> None:
            if session.assignment.phase == "plan":
                await getattr(council.tasks, answers.pop(0))("t", run=run)
            await release(session, saved=saved)

        monkeypatch.setattr(Session, "release", answered_first)
        report = await council.runs.resume(run)
    assert {one.id: one.status for one in report.tasks} == {"t": "landed", "after": "landed"}, report
    await repository.assert_invariants()


@pytest.mark.extended
async def test_approval_survives_the_process_that_asked(repository: Repository) -> None:
    """No process is active when the answer is given; `resume` continues from it."""
    child = repository.start("run", configured(repository), "--json")
    wait_for_approval(repository)
    child.send_signal(signal.SIGINT)
    assert finished(child).code == 130
    interrupted = repository.council("status")
    assert "next: council show t\n" in interrupted.stdout
    shown = repository.council("show", "t").stdout
    assert (
        shown.endswith("next: council approve t\nor: council reject t --note TEXT\n"),
        "next: council show" in shown,
    ) == (True, False)
    assert repository.council("approve", "t").code == 0
    ended = repository.council("resume", "--json")
    assert ended.states == {"t": "landed", "after": "landed"}, ended
    assert [one["attempt"] for one in events(ended, "task.started") if one["task"] == "t"] == [2]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_waiting_task_can_be_cancelled(repository: Repository) -> None:
    """Then the task and the run have finished."""
    child = repository.start("run", configured(repository), "--json")
    wait_for_approval(repository)
    assert repository.council("cancel", "t").code == 0
    ended = finished(child)
    assert (ended.code, ended.states) == (1, {"t": "cancelled", "after": "blocked"}), ended
    await repository.assert_invariants()


def test_only_waiting_tasks_can_be_approved(repository: Repository) -> None:
    """The error says what to do instead, and nothing changes."""
    ended = repository.council("run", str(repository.configure([{"id": "t", "prompt": "write b.txt x"}])), "--json")
    assert ended.states == {"t": "landed"}
    for command in (["approve", "t"], ["reject", "t"]):
        refused = repository.council(*command)
        assert refused.code == 2
        assert "does not wait for approval" in refused.stderr
    for note, why in (
        ("", "the note is empty"),
        ("sk-ant-api03-" + "a1B2" * 24, "secret key"),
        ("x" * 10_001, "10001"),
        ("caf\udce9", "the note is not valid UTF-8"),
    ):
        refused = repository.council("reject", "t", "--note", note)
        assert refused.code == 2
        assert why in refused.stderr
    for command in (["queue", "hold", "t", "--reason"], ["task", "ignore", "t", "--reason"]):
        refused = repository.council(*command, "caf\udce9")
        assert (refused.code, "the reason is not valid UTF-8" in refused.stderr) == (2, True), refused
    assert "no task 'x'" in repository.council("approve", "x").stderr


@pytest.mark.extended
async def test_task_is_retried_from_an_earlier_phase(repository: Repository) -> None:
    """Results of earlier phases stay; an unknown phase is rejected."""
    workflow = [
        {"scout": {"access": "read", "produces": "scout"}},
        {"plan": {"access": "read", "produces": "plan"}},
        {"build": {"produces": "build"}},
    ]
    steps = (
        f"in scout hand-over {json.dumps({'scout_findings': ['x']})}",
        f"in plan hand-over {PLAN}",
        "in build attempt 3 exit 3",
        "in build write b.txt hello",
        "in build built b.txt",
    )
    task = {"id": "t", "prompt": "\n".join(steps), "workflow": "three", "attempts": 1}
    path = repository.configure(
        [task, {"id": "plain", "prompt": "exit 3", "attempts": 1}], workflows={"three": workflow}
    )
    assert repository.council("run", str(path), "--json").states == {"t": "failed", "plain": "failed"}
    refused = repository.council("retry", "t", "--from", "biuld")
    assert (refused.code, "use one of: scout, plan, build" in refused.stderr) == (2, True)
    assert "omit `--from`" in repository.council("retry", "plain", "--from", "build").stderr
    assert repository.council("retry", "t", "--from", "plan").code == 0
    ended = repository.council("resume", "--json")
    assert ended.states == {"t": "landed", "plain": "failed"}, ended
    assert [one["phase"] for one in events(ended, "phase.entered")] == ["plan", "build"]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_approvals_from_python_work(repository: Repository) -> None:
    """Same behaviour as the commands; an empty list of names is rejected."""
    refusals = []
    async with Council.open(configured(repository), environ=repository.environ) as council:
        run = await council.runs.create()
        async with anyio.create_task_group() as group:
            group.start_soon(council.runs.resume, run)
            await wait_for_waiting_event(council, run, 1)
            try:
                await council.tasks.approve(run=run)
            except Exception as error:  # noqa: BLE001  the type is asserted below
                refusals.append(str(error))
            await council.tasks.reject("t", note="no", run=run)
            waited = await wait_for_waiting_event(council, run, 2)
            await council.tasks.approve("t", run=run)
        details = await council.tasks.details("t", run)
    assert ["no task is named" in one for one in refusals] == [True]
    assert event_text(waited) == "waiting for your approval of t"
    assert [(one.phase, one.visit, one.status, one.note) for one in details.phases] == [
        ("plan", 1, "rejected", "no"),
        ("plan", 2, "completed", None),
        ("build", 1, "completed", None),
    ]
    assert details.status == "landed"
    await repository.assert_invariants()


async def wait_for_waiting_event(council: Council, run: str, count: int) -> Event:
    """Return the N-th event that says that the run only waits."""
    with anyio.fail_after(60):
        async for record in council.history.follow(0):
            for event in record.events:
                count -= event.type == "run.waiting" and event.data["run"] == run
                if not count:
                    return event
    raise AssertionError("the log never ends")
