"""Verify recorded workflows: by the command, from Python, and during a run."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.lowlevel
import pytest

from orchestrator import Council
from orchestrator.domain.documents.json_values import compute_digest
from orchestrator.domain.sessions.contexts import SessionContext, SessionStatus
from orchestrator.domain.workflow.handoff_kinds import HANDOFF_KINDS
from orchestrator.domain.workflow.verification import IDLE_LIMIT, WorkflowRecord
from orchestrator.domain.workflow.violations import Violation
from orchestrator.engine.phases.verification import verify_run
from orchestrator.plugins import load_plugins
from orchestrator.protocols import Commit, Document, JsonObject, Key, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import SystemClock
from orchestrator.testing.clock import ManualClock
from tests.conftest import Repository
from tests.printed_commands import printed_commands

TWO = [{"plan": {"access": "read", "produces": "plan"}}, {"build": {"produces": "build"}}]
PLAN = {"tasks": [{"id": "t1", "prompt": "b"}], "dependencies": [], "timeline": [], "resources": []}
STEPS = f"in plan hand-over {json.dumps(PLAN)}\nin build write b.txt hello\nin build built b.txt"


def landed(repository: Repository) -> str:
    """Land a task with two phases and one without a workflow; return the run."""
    tasks = [{"id": "t", "prompt": STEPS, "workflow": "two"}, {"id": "plain", "prompt": "write c.txt x"}]
    ended = repository.council("run", str(repository.configure(tasks, workflows={"two": TWO})), "--json")
    assert ended.states == {"t": "landed", "plain": "landed"}, ended
    run: str = ended.result["run"]
    return run


def council_of(repository: Repository, **options: Any) -> AbstractAsyncContextManager[Council]:
    """Open the project's state."""
    return Council.open(repository.top, environ=repository.environ, **options)


async def test_valid_run_has_no_violations(repository: Repository) -> None:
    """One line for people, an object for programs, and the same in Python."""
    run = landed(repository)
    report = repository.council("check")
    assert (report.code, report.stdout) == (0, f"run {run}: 1 task with a workflow, 2 handoffs: no violations\n")
    assert repository.council("check", run, "--json").result == {
        "run": run,
        "is_valid": True,
        "tasks": [{"id": "t", "workflow": "two", "visits": 2, "handoffs": 2, "violations": [], "skipped_checks": []}],
        "damage": [],
        "exit": 0,
    }
    assert repository.council("check", "nobody").code == 2
    async with council_of(repository) as council:
        found = await council.state.verify_run()
    assert (found.is_valid, found.violations, [task.id for task in found.tasks]) == (True, [], ["t"])
    await repository.assert_invariants()


@pytest.mark.extended
async def test_run_without_workflows_is_reported_as_such(repository: Repository) -> None:
    ended = repository.council("run", str(repository.configure([{"id": "t", "prompt": "write t.txt x"}])), "--json")
    report = repository.council("check")
    assert (report.code, report.stdout) == (0, f"run {ended.result['run']}: no task has a workflow\n")
    assert repository.council("check", "--json").result["tasks"] == []


def changed_handoff(value: JsonObject | None) -> JsonObject | None:
    """Change a handoff so that its digest is wrong."""
    assert value is not None
    return {**value, "data": {**value["data"], "summary": "something else"}}


def no_plan(value: JsonObject | None) -> JsonObject | None:
    """Let a plan's task wait for a plan that does not exist."""
    assert value is not None
    data = {**value["data"], "tasks": [{**value["data"]["tasks"][0], "dependencies": ["nobody"]}]}
    return {**value, "data": data, "digest": compute_digest(data)}


def other_checksum(value: JsonObject | None) -> JsonObject | None:
    """Record a checksum other than the file's."""
    assert value is not None
    data = {**value["data"], "artifacts": [{"path": "b.txt", "checksum": "0" * 64}]}
    return {**value, "data": data, "digest": compute_digest(data)}


def no_file(value: JsonObject | None) -> JsonObject | None:
    """Record a file that does not exist."""
    assert value is not None
    data = {**value["data"], "artifacts": [{"path": "gone.txt", "checksum": "0" * 64}]}
    return {**value, "data": data, "digest": compute_digest(data)}


def no_receipts(value: JsonObject | None) -> JsonObject | None:
    """Remove all receipts of a handoff."""
    assert value is not None
    return {**value, "receipts": []}


def open_visit(value: JsonObject | None) -> JsonObject | None:
    """Reopen the first visit."""
    assert value is not None
    return {**value, "phases": [{**value["phases"][0], "status": "in_progress"}, *value["phases"][1:]]}


def restore(value: JsonObject, _: JsonObject | None) -> JsonObject:
    """Restore the previous values."""
    return value


async def write(repository: Repository, key: Key, change: Callable[[JsonObject | None], JsonObject | None]) -> None:
    """Write a document of council's own, which needs access to the store."""
    async with FileStore.open(repository.log, SystemClock()) as store:
        found = await store.get(key)
        value = change(None if found is None else found.value)
        await store.commit(Commit([Write(key, 0 if found is None else found.version, value)]))


#: The manual change, the violated rule, and its location.
BROKEN: Final[Sequence[tuple[str, Callable[[JsonObject | None], JsonObject | None], str, str]]] = (
    ("handoff/1", changed_handoff, "chain.digest", "handoff RUN/t/1"),
    ("handoff/1", lambda _: None, "outputs.missing", "task 't', phase 'plan', visit 1"),
    ("handoff/1", no_receipts, "chain.received", "task 't', phase 'build', visit 1"),
    ("handoff/1", no_plan, "plan.dependencies", "task 't', phase 'plan', visit 1, tasks[0].dependencies[0]"),
    ("handoff/2", other_checksum, "build.checksum", "task 't', phase 'build', visit 1, artifacts[0].checksum"),
    ("handoff/2", no_file, "build.artifacts", "task 't', phase 'build', visit 1, artifacts[0].path"),
    ("handoff/2", lambda _: {"id": "no handoff"}, "records.damaged", "task 't'"),
    ("task", open_visit, "phases.open", "task 't', phase 'plan'"),
)


async def test_violation_is_found_and_named(repository: Repository) -> None:
    """The rule, the location and the fix; after the change is undone there is no violation."""
    run = landed(repository)
    async with council_of(repository) as council:
        for name, change, rule, place in BROKEN:
            kind, _, attempt = name.partition("/")
            key = Key(kind, "/".join(part for part in (run, "t", attempt) if part))
            before = await council.state.get(key)
            assert before is not None
            await write(repository, key, change)
            found = (await council.state.verify_run()).violations
            assert (rule, place.replace("RUN", run)) in {(one.rule, one.location) for one in found}, (name, found)
            assert all(one.message and one.remedy for one in found)
            await write(repository, key, partial(restore, before.value))
            assert (await council.state.verify_run()).is_valid


async def test_violation_is_printed_for_people_and_programs(repository: Repository) -> None:
    """The exit code reports it too, so that a test of a run can't pass."""
    run = landed(repository)
    await write(repository, Key("handoff", f"{run}/t/1"), no_receipts)
    report = repository.council("check", "--json")
    assert report.code == report.result["exit"] == 1
    assert report.result["is_valid"] is False
    [one] = report.result["tasks"][0]["violations"]
    text = repository.council("check")
    assert text.code == 1
    assert text.stdout.splitlines() == [
        f"{one['rule']}  {one['location']}: {one['message']}",
        f"  → {one['remedy']}",
        f"run {run}: 1 task with a workflow, 2 handoffs: 1 violation",
    ]
    with pytest.raises(AssertionError, match=r"^17: chain\.received"):
        await repository.assert_invariants()


@pytest.mark.extended
async def test_unreadable_record_is_reported_without_an_error(repository: Repository) -> None:
    """The repositories of the run are gone, so its files are unknown."""
    run = landed(repository)
    shutil.rmtree(Path(repository.environ["COUNCIL_HOME"]))
    refused = repository.council("check")
    assert (refused.code, "created on another machine" in refused.stderr) == (2, True)
    assert repository.council("state", "adopt").code == 0
    report = repository.council("check")
    assert report.code == 0
    assert "not checked: task 't', phase 'build', visit 1: handoff files" in report.stdout
    assert f"run {run}: 1 task with a workflow" in report.stdout


@pytest.mark.extended
async def test_done_session_without_an_end_is_reported(repository: Repository) -> None:
    """Its task would wait for it forever."""
    run = landed(repository)
    clock = ManualClock()
    idle = SessionContext(
        run=run,
        task="t",
        attempt=2,
        adapter="fake",
        orchestrator="",
        scope="",
        status=SessionStatus.DONE,
        started=clock.now(),
        updated=clock.now(),
    )
    async with FileStore.open(repository.log, clock) as store:
        running = await store.get(Key("task", f"{run}/t"))
        assert running is not None
        attempts = [*running.value["attempts"][:1], {**running.value["attempts"][1], "ended": None}]
        context = await store.get(Key("context", f"{run}/t.2"))
        writes = [
            Write(running.key, running.version, {**running.value, "attempts": attempts}),
            Write(Key("context", f"{run}/t.2"), context.version if context else 0, idle.to_json()),
        ]
        await store.commit(Commit(writes))
        for seconds, rules in ((IDLE_LIMIT - 1, []), (2, ["sessions.idle"])):
            clock.advance(seconds)
            found = await verify_run(store, run, HANDOFF_KINDS, {}, clock, repository.environ)
            assert [one.rule for one in found.violations] == rules
            for idle_session in found.violations:
                commands = printed_commands(idle_session.remedy)
                assert commands == [["cancel", "t", "--run", run], ["retry", "t", "--run", run]]


@pytest.mark.extended
async def test_plugin_rules_run_and_their_errors_are_reported(repository: Repository) -> None:
    """A failing rule does not prevent the others."""
    landed(repository)

    def names(facts: WorkflowRecord) -> Iterable[Violation]:
        yield Violation("names.short", facts.location, "its name is short", "give it a longer one")

    def broken(_facts: WorkflowRecord) -> Iterable[Violation]:
        raise ZeroDivisionError

    plugins = load_plugins(repository.environ)
    plugins.constraints.update(names=names, broken=broken)
    async with council_of(repository, plugins=plugins) as council:
        found = (await council.state.verify_run()).violations
    assert [(one.rule, one.location) for one in found] == [
        ("names.short", "task 't'"),
        ("constraint.broken", "constraint 'broken'"),
    ]
    assert "ZeroDivisionError" in found[1].message


class Overtaking(MemoryStore):
    """A store with a faster concurrent writer: `next` is committed right before handoffs are read."""

    next: Sequence[Write] = ()

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """Commit, then return the documents."""
        if kind == "handoff" and self.next:
            writes, self.next = self.next, ()
            await self.commit(Commit(writes))
        return await super().list(kind, prefix)


@pytest.mark.extended
async def test_records_are_read_at_one_position(repository: Repository) -> None:
    """Also if the next phase receives a handoff between two reads."""
    run = landed(repository)
    async with FileStore.open(repository.log, SystemClock()) as store:
        last, positions = await store.position(), list[int]()
        async for record in store.watch():
            if any(event.type == "handoff.received" for event in record.events):
                positions += [record.position - 1, record.position]
            if record.position == last:
                break
        before, after = [(await store.at(position)).documents for position in positions[:2]]
    overtaking = Overtaking(SystemClock())
    await overtaking.commit(Commit([Write(key, 0, one.value) for key, one in before.items() if key.kind != "lease"]))
    changed = [one for key, one in after.items() if key.kind in {"task", "handoff"} and one != before.get(key)]
    writes = list[Write]()
    for one in changed:
        known = await overtaking.get(one.key)
        writes.append(Write(one.key, known.version if known else 0, one.value))
    assert {write.key.kind for write in writes} == {"task", "handoff"}
    overtaking.next = writes
    found = await verify_run(overtaking, run, HANDOFF_KINDS, {}, SystemClock(), repository.environ)
    assert not found.violations
    assert not overtaking.next
    assert found.tasks[0].visits == 2, "the read included a concurrent commit"


@pytest.mark.extended
async def test_active_run_has_no_false_alarm(repository: Repository) -> None:
    """Verified repeatedly while its tasks move from phase to phase."""
    tasks = [
        {"id": f"t{number}", "prompt": STEPS.replace("b.txt", f"{number}.txt"), "workflow": "two"}
        for number in range(4)
    ]
    path = repository.configure(tasks, workflows={"two": TWO}, capacity=2)
    seen = set()
    running = repository.start("run", str(path), "--json")
    try:
        async with Council.open(path, environ=repository.environ) as council:
            with anyio.fail_after(60):
                while running.poll() is None:
                    if await council.runs.ids():
                        found = await council.state.verify_run()
                        assert found.violations == []
                        seen.add(sum(task.visits for task in found.tasks))
                    await anyio.lowlevel.checkpoint()
    finally:
        if running.poll() is None:
            running.kill()
        stdout, _ = running.communicate()
    assert json.loads(stdout.splitlines()[-1])["status"] == "landed"
    assert len(seen) > 2, "the run was never verified while active"


async def test_killed_run_has_no_violations(repository: Repository) -> None:
    """Related facts are recorded by one commit, so that there is no state in between."""
    tasks = [{"id": "t", "prompt": STEPS, "workflow": "two"}]
    path = repository.configure(tasks, workflows={"two": TWO})
    for command, failpoint, handoffs in ((["run", str(path)], "handoff.taken", 0), (["resume"], "work.recorded", 1)):
        assert repository.council(*command, failpoints=f"{failpoint}=kill").code == -signal.SIGKILL
        report = repository.council("check", "--json")
        assert (report.code, report.result["tasks"][0]["handoffs"]) == (0, handoffs), report
