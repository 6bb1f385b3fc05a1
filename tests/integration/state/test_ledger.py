"""One run shared by several orchestrators: each sees the changes of the others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path

import anyio
import pytest

from orchestrator.api.context import LazyPlugins, ProjectContext
from orchestrator.api.run_reader import RunReader
from orchestrator.domain.events.runs import AdapterCooldown, RunInterrupted
from orchestrator.domain.events.tasks import TaskFailed, TaskLanded, TaskLanding, TaskQueued, TaskRetrying, TaskStarted
from orchestrator.domain.runs.model import AdapterDocument, Attempt
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.runs.statuses import TaskStatus, Trigger
from orchestrator.domain.scheduling.claims import Role
from orchestrator.domain.scheduling.path_ownership import OwnershipConflict
from orchestrator.domain.security.secrets import Redactor
from orchestrator.engine.scheduler.requests import cancel_task, retry_task
from orchestrator.engine.state.adapter_states import AdapterUpdate
from orchestrator.engine.state.change_feed import follow_changes
from orchestrator.engine.state.ledger import Ledger, StartPlan
from orchestrator.engine.state.records import record_new_run, run_key, spec_key, task_key
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import RefusedError, RunActive
from orchestrator.locking.orchestrators import create_owner
from orchestrator.locking.ownership import OwnershipRegistry
from orchestrator.project import Project
from orchestrator.protocols import Commit, Document, Guard, Key, Store, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import Clock, SystemClock
from orchestrator.testing.clock import ManualClock
from tests.recorded_run import NEW_COMMIT, OLD_COMMIT, make_orchestrators, run_document, task_spec


async def start(ledger: Ledger, task: str, also: StartPlan | None = None) -> bool:
    """Record the first attempt of a task; return False if it can't start."""
    attempt = Attempt(number=1, adapter="fixer", base=OLD_COMMIT, started=0.0)
    started = TaskStarted(base=OLD_COMMIT, adapter="fixer")
    return await ledger.start(task, TaskUpdate(Trigger.START, started, {"attempts": (attempt,)}), also)


async def two_ledgers(store: Store, clock: Clock, folder: Path) -> list[Ledger]:
    """Return a new run as two orchestrators see it."""
    run = run_document(folder)
    await record_new_run(store, run, {task: task_spec(task, "Do it.") for task in run.tasks})
    return [await join(store, clock, run.id) for _ in range(2)]


async def join(store: Store, clock: Clock, run: str) -> Ledger:
    """Join a run as an additional worker."""
    others = make_orchestrators(store, clock, run, alone=False, me=create_owner(Role.WORKER))
    return await Ledger.join(store, clock, Redactor([]), others, "off")


async def leader_and_worker(store: Store, clock: Clock, folder: Path) -> tuple[Ledger, Ledger]:
    """Return a new run as its leader sees it, and as a worker sees it."""
    run = run_document(folder)
    await record_new_run(store, run, {task: task_spec(task, "Do it.") for task in run.tasks})
    others = make_orchestrators(store, clock, run.id, alone=False)
    return await Ledger.take(store, clock, Redactor([]), others, "off"), await join(store, clock, run.id)


class OvertakenStore(MemoryStore):
    """A store in which another process commits first, once.

    This happens before a commit with a given event type, or before a given kind of document is read.
    """

    def __init__(self, clock: Clock, what: str) -> None:
        super().__init__(clock)
        self._what = what
        self.quicker: Callable[[], Awaitable[object]] | None = None

    async def get(self, key: Key) -> Document | None:
        if key.kind == self._what:
            await self._overtake()
        return await super().get(key)

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        if kind == self._what:
            await self._overtake()
        return await super().list(kind, prefix)

    async def commit(self, commit: Commit) -> int:
        if any(event.type == self._what for event in commit.events):
            await self._overtake()
        return await super().commit(commit)

    async def _overtake(self) -> None:
        if self.quicker is not None:
            quicker, self.quicker = self.quicker, None
            await quicker()


class RacingStore(OvertakenStore):
    """A ledger during whose claim releases and reads everything else happens that can."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, "claim")
        self.is_giving_back = anyio.Event()

    async def commit(self, commit: Commit) -> int:
        if any(event.type == "claim.released" for event in commit.events):
            self.is_giving_back.set()
            await anyio.wait_all_tasks_blocked()
        return await super().commit(commit)


@pytest.mark.parametrize("is_looked_meanwhile", [False, True])
async def test_refresh_still_reports_a_move_by_another_process(tmp_path: Path, is_looked_meanwhile: bool) -> None:
    """A late claim finds the task landed; followers of other processes still receive that event."""
    clock = ManualClock()
    store = RacingStore(clock)
    ours, theirs = await two_ledgers(store, clock, tmp_path)
    claimed = anyio.Event()
    async with aclosing(follow_changes(ours)) as changes:

        async def land() -> None:
            await theirs.change("models", Trigger.ADOPT, TaskLanded(landed=NEW_COMMIT), landed=NEW_COMMIT)

        async def claim() -> None:
            assert not await ours.claim("models")
            claimed.set()

        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(start, theirs, "models")
                assert (await anext(changes)).task == "models"
            await theirs.change("models", Trigger.BUILD, TaskQueued(), commit=NEW_COMMIT)
            if is_looked_meanwhile:
                store.quicker = land
            else:
                await land()
            async with anyio.create_task_group() as group:
                group.start_soon(claim)
                await (store.is_giving_back if is_looked_meanwhile else claimed).wait()
                change = await anext(changes)
    assert change.before is not None
    assert (change.task, change.before.status) == ("models", TaskStatus.RUNNING)
    assert ours.task("models").status is TaskStatus.LANDED


async def test_ended_task_is_not_claimed(tmp_path: Path) -> None:
    """A process that has not yet seen the failure reads the task again and does not claim it."""
    clock = ManualClock()
    store = MemoryStore(clock)
    ours, theirs = await two_ledgers(store, clock, tmp_path)
    assert await start(theirs, "models")
    assert await ours.tasks.refresh("models")
    await theirs.change("models", Trigger.FAIL, TaskFailed(), reason="theirs")
    before = await store.position()
    assert not await ours.claim("models")
    assert await store.position() == before


@pytest.mark.parametrize("trigger", [Trigger.INTERRUPT, Trigger.FINISH_UNCHANGED])
async def test_task_attempted_by_another_process_is_not_started(tmp_path: Path, trigger: Trigger) -> None:
    """The stale record does not know the other attempt and would reuse its number."""
    clock = ManualClock()
    ours, theirs = await two_ledgers(MemoryStore(clock), clock, tmp_path)
    assert await start(theirs, "models")
    await theirs.change("models", trigger, trigger.event(), reason="theirs")
    assert not await start(ours, "models")
    assert ours.task("models") == theirs.task("models")


async def test_concurrent_adapter_update_is_decided_again(tmp_path: Path) -> None:
    """Two sessions in two processes hit the same limit: the later one finds it recorded."""
    clock = ManualClock()
    store = OvertakenStore(clock, "adapter.cooling_down")
    ours, theirs = await two_ledgers(store, clock, tmp_path)

    def judge(known: AdapterDocument) -> AdapterUpdate | None:
        return (
            None
            if known.cooldowns
            else AdapterUpdate(
                AdapterDocument(cooldown_until=60.0, cooldowns=1), AdapterCooldown(until=60.0, reason="limit")
            )
        )

    store.quicker = lambda: theirs.adapters.update("fixer", judge)
    assert await ours.adapters.update("fixer", judge) == (AdapterDocument(cooldown_until=60.0, cooldowns=1), False)
    assert (await ours.adapters.read("fixer")).cooldowns == 1


async def test_task_just_started_by_another_is_cancelled(tmp_path: Path) -> None:
    """It was pending when last read: the leader takes it, and the new owner is notified when it continues."""
    clock = ManualClock()
    ours, theirs = await leader_and_worker(MemoryStore(clock), clock, tmp_path)
    assert await start(theirs, "models")
    assert await cancel_task(ours, "models")
    assert ours.task("models").status is TaskStatus.CANCELLED
    assert ours.claims is not None
    claim = await ours.claims.read("models")
    assert claim is not None
    assert claim.released is not None
    await theirs.tasks.refresh("models")
    assert theirs.claims is not None
    assert "models" not in theirs.claims


async def test_task_just_released_by_another_is_cancelled(tmp_path: Path) -> None:
    clock = ManualClock()
    ours, theirs = await leader_and_worker(MemoryStore(clock), clock, tmp_path)
    assert await start(theirs, "models")
    await ours.tasks.refresh("models")
    await theirs.change("models", Trigger.RETRY, TaskRetrying())
    assert await cancel_task(ours, "models")
    assert ours.task("models").status is TaskStatus.CANCELLED


@pytest.mark.parametrize("seen", [TaskStatus.RUNNING, TaskStatus.LANDING])
async def test_task_being_landed_by_another_process_is_not_cancelled(tmp_path: Path, seen: TaskStatus) -> None:
    """A started landing completes, even if the task was still running when last read."""
    clock = ManualClock()
    ours, theirs = await leader_and_worker(MemoryStore(clock), clock, tmp_path)
    assert await start(theirs, "models")
    await ours.tasks.refresh("models")
    await theirs.change("models", Trigger.BUILD, TaskQueued(), commit=NEW_COMMIT)
    await theirs.change("models", Trigger.INTEND, TaskLanding(old=OLD_COMMIT, new=NEW_COMMIT))
    if seen is TaskStatus.LANDING:
        await ours.tasks.refresh("models")
    assert ours.task("models").status is seen
    assert not await cancel_task(ours, "models")
    await theirs.change("models", Trigger.LAND, TaskLanded(landed=NEW_COMMIT), landed=NEW_COMMIT)
    assert not await cancel_task(ours, "models")


async def test_task_landed_by_another_process_is_not_retried(tmp_path: Path) -> None:
    clock = ManualClock()
    ours, theirs = await leader_and_worker(MemoryStore(clock), clock, tmp_path)
    assert await start(ours, "models")
    await ours.change("models", Trigger.FAIL, TaskFailed())
    await theirs.tasks.refresh("models")
    await theirs.change("models", Trigger.ADOPT, TaskLanded(landed=NEW_COMMIT), landed=NEW_COMMIT)
    assert not await retry_task(ours, "models")
    assert ours.task("models").status is TaskStatus.LANDED


async def test_take_during_a_leader_election_names_the_leader(tmp_path: Path) -> None:
    clock = ManualClock()
    store = OvertakenStore(clock, "run.leader_elected")
    theirs, _ = await two_ledgers(store, clock, tmp_path)
    store.quicker = theirs.writer.try_to_lead
    run = theirs.run.id
    with pytest.raises(RunActive, match=f"is active in process {theirs.orchestrators.me.pid}"):
        await Ledger.take(store, clock, Redactor([]), make_orchestrators(store, clock, run, alone=False), "off")


@pytest.mark.parametrize("event", ["run.leader_elected", "run.joined"])
async def test_restore_during_a_take_is_seen(tmp_path: Path, event: str) -> None:
    """The documents were read before, and the process that restores a checkpoint is no orchestrator of the run."""
    clock = ManualClock()
    store, run = OvertakenStore(clock, event), run_document(tmp_path)
    await record_new_run(store, run, {task: task_spec(task, "Do it.") for task in run.tasks})
    (key,) = [found.key for found in await store.list("task", f"{run.id}/models")]

    async def restore() -> None:
        found = await store.get(key)
        assert found is not None
        await store.commit(Commit([Write(key, found.version, {**found.value, "status": "cancelled"})], []))

    store.quicker = restore
    others = make_orchestrators(store, clock, run.id, alone=False)
    take = Ledger.take if event == "run.leader_elected" else Ledger.join
    ledger = await take(store, clock, Redactor([]), others, "off")
    assert ledger.task("models").status is TaskStatus.CANCELLED
    assert ledger.writer.became_leader.is_set() == (event == "run.leader_elected")
    await ledger.note(RunInterrupted())


@pytest.mark.parametrize("kind", ["task", "spec"])
async def test_record_read_while_a_restore_removes_a_task_is_complete(tmp_path: Path, kind: str) -> None:
    """The task is removed between the read of the run document and its own."""
    clock = ManualClock()
    store, run = OvertakenStore(clock, kind), run_document(tmp_path)
    await record_new_run(store, run, {task: task_spec(task, "Do it.") for task in run.tasks})
    *kept, removed = run.tasks

    async def restore() -> None:
        found = await store.get(run_key(run.id))
        assert found is not None
        write = Write(found.key, found.version, {**found.value, "tasks": kept})
        await store.commit(Commit([write, *(Write(key(run.id, removed), 1, None) for key in (task_key, spec_key))]))

    store.quicker = restore
    reader = RunReader(ProjectContext(Project(tmp_path), store, "memory:", clock, {}, LazyPlugins(None, {}, ())))
    assert [*(await reader.record(run.id)).tasks] == kept
    store.quicker = None
    await store.commit(Commit([Write(task_key(run.id, kept[0]), 1, None)]))
    with pytest.raises(RefusedError, match=f"the state of task {kept[0]} is missing"):
        await reader.record(run.id)


async def test_concurrent_elections_have_one_leader(tmp_path: Path) -> None:
    """The loser read the state before the election, and must not reclaim from a live leader."""
    clock = ManualClock()
    store = OvertakenStore(clock, "run")
    ours, theirs = await two_ledgers(store, clock, tmp_path)
    store.quicker = theirs.writer.try_to_lead
    assert not await ours.writer.try_to_lead()
    assert theirs.writer.became_leader.is_set()
    await theirs.note(RunInterrupted())


@pytest.mark.parametrize(("role", "is_theirs"), [(Role.LEADER, False), (Role.WORKER, True)])
async def test_leader_takes_a_claim_that_a_worker_has_not_started(tmp_path: Path, role: Role, is_theirs: bool) -> None:
    clock = ManualClock()
    store = MemoryStore(clock)
    first, worker = await leader_and_worker(store, clock, tmp_path)
    ours = first if role is Role.LEADER else await join(store, clock, first.run.id)
    assert ours.orchestrators.me.role is role
    assert worker.claims is not None
    assert await worker.claims.claim("models") is not None
    assert await start(ours, "models") == (not is_theirs)
    assert (ours.task("models").status is TaskStatus.RUNNING) == (not is_theirs)


async def test_worker_leaves_leadership_to_a_leader(tmp_path: Path) -> None:
    """The run has no leader, and another process is elected first."""
    clock = ManualClock()
    store = MemoryStore(clock)
    worker, other = await two_ledgers(store, clock, tmp_path)
    others = make_orchestrators(store, clock, worker.run.id, alone=False, me=create_owner(Role.LEADER))
    chosen = await Ledger.join(store, clock, Redactor([]), others, "off")
    assert not await worker.writer.try_to_lead()
    assert not await other.writer.try_to_lead()
    assert await chosen.writer.try_to_lead()


async def test_tasks_with_paths_that_start_at_once_in_a_process_do_not_conflict(tmp_path: Path) -> None:
    """Each start writes the document of the scope; a conflict would count as a loss to another process."""
    clock = SystemClock()
    async with FileStore.open(tmp_path / "log", clock) as store:
        ledger, other = await two_ledgers(store, clock, tmp_path)
        registry = OwnershipRegistry(store, clock, "repository")
        planned, started = list[str](), dict[str, bool]()

        async def begin(task: str) -> None:
            async def claim_paths(claim: Guard) -> Sequence[Write] | None:
                planned.append(task)
                name, me = SessionName(ledger.run.id, task, 1), ledger.orchestrators.me.id
                found = await registry.plan(name, [f"{task}/**"], orchestrator=me, claim=claim)
                return None if isinstance(found, OwnershipConflict) else found

            started[task] = await start(ledger, task, claim_paths)

        async with anyio.create_task_group() as group:
            for task in ledger.run.tasks:
                group.start_soon(begin, task)
        assert started == dict.fromkeys(ledger.run.tasks, True)
        assert sorted(planned) == sorted(ledger.run.tasks)
        assert ledger.orchestrators.counters.conflicts == 0
        assert len(await registry.holdings()) == len(ledger.run.tasks) > 1
        assert not await start(other, ledger.run.tasks[0])


async def test_task_that_another_process_claims_first_does_not_stop_the_others(tmp_path: Path) -> None:
    """Of tasks that a process starts at once, only the one that another process has claimed does not start."""
    clock = SystemClock()
    async with FileStore.open(tmp_path / "log", clock) as store, FileStore.open(tmp_path / "log", clock) as theirs:
        ledger, _ = await two_ledgers(store, clock, tmp_path)
        other = await join(theirs, clock, ledger.run.id)
        first, *rest = ledger.run.tasks
        assert await start(other, first)
        started = dict[str, bool]()

        async def begin(task: str) -> None:
            started[task] = await start(ledger, task)

        async with anyio.create_task_group() as group:
            for task in ledger.run.tasks:
                group.start_soon(begin, task)
        assert started == {first: False, **dict.fromkeys(rest, True)}
        assert ledger.claims is not None
        assert other.claims is not None
        assert (set(ledger.claims), set(other.claims)) == (set(rest), {first})
