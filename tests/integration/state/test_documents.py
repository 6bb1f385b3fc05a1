"""Single documents of a project's state from Python: read, changed, locked for a time, and watched."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import anyio
import pytest

from orchestrator import Council, Document, DocumentChange, Key, RefusedError, RunStatus, VersionConflict
from orchestrator.protocols import JsonObject
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.state.documents.update import update_document
from orchestrator.testing.clock import ManualClock
from tests.conftest import Repository
from tests.recorded_run import RUN, RUN_STARTED, record_run, recorded_project, run_document

NOTE, API = Key("memo", "x"), Key("task", f"{RUN}/api")


@pytest.fixture
async def project(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository with one interrupted and one finished run."""
    async with recorded_project(repository.top, monkeypatch) as store:
        clock = ManualClock(RUN_STARTED - 1000)
        await record_run(store, clock, run_document(repository.top, "over", clock.now()))
        await update_document(store, Key("run", "over"), lambda value: {**(value or {}), "ended": RUN_STARTED})
    hub = Hub(repository.top / "hub")
    for folder in (hub.trusted, hub.root / "locks"):
        folder.mkdir(parents=True)
    return repository


@asynccontextmanager
async def opened(project: Repository, clock: ManualClock | None = None) -> AsyncIterator[Council]:
    """Open the project."""
    async with Council.open(project.top, environ=project.environ, clock=clock) as council:
        yield council


async def test_written_document_is_readable_by_all(project: Repository) -> None:
    """Created, changed and deleted; versions rise by one, and `change` gets the current value."""
    async with opened(project) as ours, opened(project) as theirs:
        assert await ours.state.get(NOTE) is None
        seen: list[JsonObject | None] = []

        def count(value: JsonObject | None) -> JsonObject:
            seen.append(value)
            return {"n": len(seen)}

        assert await ours.state.update(NOTE, count) == await theirs.state.get(NOTE)
        made = await theirs.state.update(NOTE, count)
        assert made is not None
        assert (made.version, made.value, seen) == (2, {"n": 2}, [None, {"n": 1}])
        assert (await ours.state.update(NOTE, lambda _: None), await theirs.state.get(NOTE)) == (None, None)
        assert [one.value for one in await ours.history.versions(NOTE)] == [None, {"n": 2}, {"n": 1}]


async def test_task_progress_is_merged_and_counted(project: Repository) -> None:
    """Other fields stay, even with concurrent writers; the run's counts follow."""
    async with opened(project) as ours, opened(project) as theirs:
        before = await ours.state.get(API)
        assert before is not None
        assert (await ours.reports.metrics(RUN)).in_progress == 1

        async def note(council: Council, progress: JsonObject) -> None:
            await council.state.update(API, lambda value: {**(value or {}), **progress})

        async with anyio.create_task_group() as group:
            group.start_soon(note, ours, {"status": "failed", "reason": "needs a key"})
            group.start_soon(note, theirs, {"pull_request": 12})
        after = await ours.state.get(API)
        assert after is not None
        changed = {"status": "failed", "reason": "needs a key", "pull_request": 12}
        assert (after.version, after.value) == (before.version + 2, before.value | changed)
        assert before.value["attempts"]
        figures = await ours.reports.metrics(RUN)
        assert (figures.in_progress, figures.failed) == (0, 1)


async def test_expected_version_is_enforced(project: Repository) -> None:
    """With a wrong one nothing is written, and the error has author and time of the last write."""
    async with opened(project, ManualClock(RUN_STARTED + 500)) as council:
        made = await council.state.update(NOTE, lambda _: {"n": 1}, expected_version=0)
        assert made is not None
        with pytest.raises(VersionConflict) as caught:
            await council.state.update(NOTE, lambda _: {"n": 2}, expected_version=2)
        error = caught.value
        assert (error.expected, error.found, error.writer, error.time) == (2, 1, "ada@box:4711", RUN_STARTED + 500)
        assert await council.state.get(NOTE) == made


async def test_expiring_lock_ends_at_its_time(project: Repository) -> None:
    """One holder at a time; the next gets it after a release, or after its expiry."""
    clock, lock = ManualClock(RUN_STARTED + 500), Key("lock", "deploy")
    async with opened(project, clock) as ours, opened(project, clock) as theirs:

        async def take(council: Council, owner: str) -> Document | None:
            return await council.state.update(lock, lambda _: {"owner": owner}, expected_version=0, ttl=5)

        held = await take(ours, "a")
        assert held is not None
        assert held.expires == RUN_STARTED + 505
        clock.advance(4.9)
        with pytest.raises(VersionConflict, match="ada@box:4711"):
            await take(theirs, "b")
        clock.advance(0.1)
        assert await ours.state.get(lock) is None
        again = await take(theirs, "b")
        assert again is not None
        assert again.value == {"owner": "b"}
        await theirs.state.update(lock, lambda _: None, expected_version=again.version)
        assert await take(ours, "a") is not None


async def test_document_waiter_is_notified(project: Repository) -> None:
    """By its pattern, from any process, and also for earlier commits, from a position on."""
    heard: list[DocumentChange] = []

    async def listen(council: Council, after: int) -> None:
        async with aclosing(council.state.subscribe("memo/*", after)) as changes:
            async for change in changes:
                heard.append(change)
                return

    async with opened(project) as ours, opened(project) as theirs:
        begin = await ours.history.position()
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(listen, ours, begin)
                await anyio.wait_all_tasks_blocked()
                assert heard == []
                await theirs.state.update(Key("other", "x"), lambda _: {})
                await theirs.state.update(NOTE, lambda _: {"n": 1})
            await listen(theirs, begin)
    assert [(one.key, one.version, one.value, one.position) for one in heard] == [(NOTE, 1, {"n": 1}, begin + 2)] * 2


async def test_active_run_is_not_changed(project: Repository) -> None:
    """It would not notice; documents of no run are writable."""
    async with opened(project) as council, Hub(project.top / "hub").run_lock(RUN).hold(0):
        with pytest.raises(RefusedError, match=f"task/{RUN}/api belongs to run {RUN}, which is active"):
            await council.state.update(API, lambda _: pytest.fail("called"))
        assert await council.state.update(NOTE, lambda _: {}) is not None


async def test_unfinished_runs_are_listed(project: Repository) -> None:
    """One with waiting tasks, one interrupted, and the same during a resume."""
    async with opened(project) as council:
        waiting = "over", RunStatus.INCOMPLETE
        active = [(one.run, one.status) for one in await council.runs.list(active=True)]
        assert active == [waiting, (RUN, RunStatus.INTERRUPTED)]
        async with Hub(project.top / "hub").run_lock(RUN).hold(0):
            active = [(one.run, one.status) for one in await council.runs.list(active=True)]
        assert active == [waiting, (RUN, RunStatus.RUNNING)]
        assert [one.run for one in await council.runs.list()] == ["over", RUN]


async def test_recovered_run_has_its_time(repository: Repository) -> None:
    """An interrupted run is active, and its next owner is recorded with the time; a landed run is not active."""
    path = repository.configure([{"id": "a", "prompt": "write a.txt a"}])
    assert repository.council("run", str(path), failpoints="work.recorded=kill").code < 0
    async with Council.open(repository.top, environ=repository.environ) as council:
        [report] = await council.runs.list(active=True)
        assert report.status is RunStatus.INTERRUPTED
        assert (await council.runs.resume(report.run)).status is RunStatus.LANDED
        claims = [one async for one in council.runs.events(report.run) if one.event.type == "run.leader_elected"]
        assert await council.runs.list(active=True) == []
    first, second = claims
    assert (first.event.data["epoch"], second.event.data["epoch"]) == (1, 2)
    assert first.time < second.time
    await repository.assert_invariants()
