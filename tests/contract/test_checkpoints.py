"""Checkpoints on both local stores."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.domain.documents.stored import CheckpointOrigin, CheckpointSession
from orchestrator.domain.runs.model import Attempt, RunDocument, TaskDocument
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.security.secrets import Redactor
from orchestrator.engine.session_api.shared_values import SharedValues
from orchestrator.errors import HistoryCompacted, LeaseLost, RefusedError
from orchestrator.protocols import Commit, Document, Guard, JsonObject, Key, StateSnapshot, Store, Write
from orchestrator.state.documents.checkpoints import (
    WHOLE_STORE,
    create_checkpoint,
    list_checkpoints,
    plan_restore,
    prune_checkpoints,
    read_checkpoint,
    read_contents,
)
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.testing.clock import ManualClock
from tests.store_kinds import ALL_KINDS, open_kind

RUN = "20260102-030405-ab12"
LEASE = Key("lease", f"run/{RUN}")


@pytest.fixture(params=ALL_KINDS)
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[list[Store]]:
    """Return two instances of one store; in memory the same one twice."""
    clock, kind = ManualClock(), request.param
    async with AsyncExitStack() as stack:
        found = [
            await stack.enter_async_context(open_kind(kind, tmp_path / "state", clock))
            for _ in range(1 if kind == "memory" else 2)
        ]
        yield found * 2 if kind == "memory" else found


@pytest.fixture
def store(stores: list[Store]) -> Store:
    """Return the first instance."""
    return stores[0]


def run_document(run: str = RUN, tasks: tuple[str, ...] = ("a", "b"), **changes: Any) -> JsonObject:
    """Return the document of a run."""
    facts = {"config": "f", "repo": "r", "is_url": False, "base": "main", "target": "main", "capacity": 1}
    more = {"session_memory": 1, "adapters": {}, "start": "a" * 40, "hub": "/nowhere"}
    made = RunDocument.model_validate({"id": run, "tasks": tasks, "started": 1.0, **facts, **more, **changes})
    return made.model_dump(mode="json")


def task(status: TaskStatus = TaskStatus.PENDING, attempts: int = 0, **changes: Any) -> JsonObject:
    """Return a task document; the last attempt is active if the task is."""
    made = tuple(
        Attempt(number=number, adapter="x", base="c" * 40, started=1.0, ended=2.0, outcome="crash")
        for number in range(1, attempts + 1)
    )
    if status is TaskStatus.RUNNING:
        made = (*made[:-1], made[-1].model_copy(update={"ended": None, "outcome": None}))
    return TaskDocument(status=status, attempts=made, **changes).model_dump(mode="json")


async def put(store: Store, values: Mapping[Key, JsonObject | None], *guards: Guard) -> None:
    """Overwrite documents in one commit."""
    found = {key: await store.get(key) for key in values}
    writes = [Write(key, one.version if (one := found[key]) else 0, value) for key, value in values.items()]
    await store.commit(Commit(writes, (), guards))


async def seed(store: Store, run: str = RUN, **tasks: JsonObject) -> None:
    """Record a run with these tasks."""
    own = {Key("task", f"{run}/{name}"): value for name, value in tasks.items()}
    await put(store, {Key("run", run): run_document(run, tuple(tasks)), **own})


def key(name: str, run: str = RUN) -> Key:
    """Return the key of a task."""
    return Key("task", f"{run}/{name}")


async def test_checkpoint_has_position_and_summary(store: Store) -> None:
    """Position, reason, status, tasks by status and live sessions are those at the time of the checkpoint."""
    await seed(store, a=task(TaskStatus.RUNNING, 2), b=task(), c=task())
    position = await store.position()
    made = await create_checkpoint(store, RUN, "before lunch")
    assert (made.id, made.run, made.number, made.position) == (f"{RUN}/1", RUN, 1, position)
    assert (made.reason, made.created_by, made.status) == ("before lunch", CheckpointOrigin.USER, "running")
    assert made.task_counts == {"running": 1, "pending": 2}
    assert list(made.sessions) == [CheckpointSession(RUN, "a", 2, "running")]
    assert await read_checkpoint(store, made.id) == made
    assert (await create_checkpoint(store, RUN, "x", is_live=False)).status == "interrupted"
    await put(store, {Key("run", RUN): run_document(ended=5.0)})
    assert (await create_checkpoint(store, RUN, "x")).status == "incomplete"
    found = (await store.history(Key("checkpoint", f"{RUN}/1"), 1))[0]
    assert [(one.type, one.data["checkpoint"]) for one in found.events] == [("checkpoint.created", f"{RUN}/1")]


async def test_checkpoint_numbers_increase_and_are_never_reused(store: Store) -> None:
    """Pruned numbers stay used; each run and the whole store have counters of their own."""
    await seed(store, a=task())
    for _ in range(2):
        await create_checkpoint(store, RUN, "x", created_by=CheckpointOrigin.TIMER)
    assert await prune_checkpoints(store, RUN, 0) == [f"{RUN}/1", f"{RUN}/2"]
    assert (await create_checkpoint(store, RUN, "x")).id == f"{RUN}/3"
    assert (await create_checkpoint(store, None, "x")).id == f"{WHOLE_STORE}/1"


async def test_concurrent_checkpoints_get_different_numbers(stores: list[Store]) -> None:
    """Also across two instances that create several at a time."""
    await seed(stores[0], a=task())
    made: list[str] = []

    async def one(store: Store) -> None:
        made.append((await create_checkpoint(store, RUN, "x")).id)

    async with anyio.create_task_group() as group:
        for store in [*stores] * 4:
            group.start_soon(one, store)
    assert sorted(made) == sorted(f"{RUN}/{number}" for number in range(1, 9))
    assert [one.number for one in await list_checkpoints(stores[0], RUN)] == list(range(1, 9))


async def test_pruning_keeps_manual_checkpoints(store: Store) -> None:
    """Of automatic ones the newest are kept."""
    await seed(store, a=task())
    for origin in (
        CheckpointOrigin.TIMER,
        CheckpointOrigin.USER,
        CheckpointOrigin.TIMER,
        CheckpointOrigin.COMMAND,
        *[CheckpointOrigin.TIMER] * 10,
    ):
        await create_checkpoint(store, RUN, "x", created_by=origin)
    await prune_checkpoints(store, RUN, 3)
    assert [one.number for one in await list_checkpoints(store, RUN)] == [2, 4, 12, 13, 14]
    assert await prune_checkpoints(store, RUN, 3) == []


async def test_contents_are_those_at_the_position(store: Store) -> None:
    """With the documents of this run only."""
    await seed(store, a=task())
    await seed(store, "other", a=task())
    await put(store, {LEASE: {"epoch": 1}})
    made = await create_checkpoint(store, RUN, "x")
    await put(store, {key("a"): task(TaskStatus.FAILED, 1), Key("request", f"{RUN}/1"): {"x": 1}})
    found = await read_contents(store, made.id)
    assert set(found) == {Key("run", RUN), key("a"), LEASE}
    assert found[key("a")].value == task()
    assert {Key("run", "other"), key("a", "other")} < set(
        await read_contents(store, (await create_checkpoint(store, None, "x")).id)
    )


async def test_restore_writes_old_values_as_new_versions(store: Store) -> None:
    """Changed documents get a new version; unchanged and landed ones are not written."""
    await seed(store, a=task(TaskStatus.RUNNING, 1), b=task(), c=task(), d=task())
    made = await create_checkpoint(store, RUN, "x")
    changed = {"a": task(TaskStatus.FAILED, 2), "b": task(TaskStatus.LANDED, 1, landed="d" * 40)}
    await put(store, {key(name): value for name, value in changed.items()})
    await put(store, {key("d"): task(TaskStatus.CANCELLED), Key("run", RUN): run_document(tasks=("a",), ended=9.0)})
    found = await plan_restore(store, made.id)
    assert set(found.written) == {Key("run", RUN), key("a"), key("d")}
    assert (found.deleted, found.skipped) == ([], {key("b"): "it has landed"})
    await store.commit(Commit(found.writes))
    back = await store.get(key("a"))
    assert back is not None
    assert (back.version, back.value["status"], len(back.value["attempts"])) == (3, "running", 2)
    assert (await plan_restore(store, made.id)).writes == []
    run = await store.get(Key("run", RUN))
    assert run is not None
    assert (run.value["ended"], run.value["tasks"]) == (None, ["a", "b", "c", "d"])


@pytest.mark.parametrize("kind", ["lease", "request", "cursor", "adapter", "ports", "checkpoint"])
async def test_restore_leaves_excluded_kinds_unchanged(store: Store, kind: str) -> None:
    """In any state, and also if they did not exist at the checkpoint."""
    await seed(store, a=task())
    there = Key(kind, f"run/{RUN}" if kind == "lease" else f"{RUN}/9")
    value = {
        "epoch": 1,
        "position": 1,
        "reason": "x",
        "created_by": "user",
        "status": None,
        "task_counts": {},
        "sessions": [],
    }
    await put(store, {there: value})
    made = await create_checkpoint(store, RUN, "x")
    await put(store, {there: {**value, "epoch": 2}, Key(kind, f"{RUN}/10"): value})
    found = await plan_restore(store, made.id)
    assert (found.writes, found.skipped) == ([], {})


async def test_restore_of_an_unchanged_run_keeps_its_end(store: Store) -> None:
    """The run document is restored with its tasks only: alone it would make an ended run look interrupted."""
    await seed(store, a=task())
    made = await create_checkpoint(store, RUN, "x")
    await put(store, {Key("run", RUN): run_document(ended=9.0), key("a"): task(TaskStatus.LANDED, 1, landed="d" * 40)})
    found = await plan_restore(store, made.id)
    assert (found.writes, found.skipped) == ([], {key("a"): "it has landed"})


async def test_restore_that_interrupts_tasks_reopens_the_run(store: Store) -> None:
    """A run that ended, was retried and killed is open again, so that a resume handles the leftovers."""
    await seed(store, a=task(TaskStatus.FAILED, 1))
    await put(store, {Key("run", RUN): run_document(ended=9.0)})
    made = await create_checkpoint(store, RUN, "x")
    await put(store, {Key("run", RUN): run_document(), key("a"): task(TaskStatus.RUNNING, 2)})
    assert (await plan_restore(store, made.id)).runs[RUN].ended is None
    await put(store, {key("a"): task(TaskStatus.FAILED, 2)})
    assert (await plan_restore(store, made.id)).runs[RUN].ended == 9.0


async def test_restore_of_everything_keeps_new_documents_and_recreates_deleted_ones(store: Store) -> None:
    """A run created later is unchanged, a cleaned one exists again."""
    await seed(store, a=task(TaskStatus.LANDED, 1, landed="d" * 40))
    await seed(store, "kept", a=task())
    made = await create_checkpoint(store, None, "x")
    assert (made.run, made.status, made.task_counts) == (None, None, {"landed": 1, "pending": 1})
    await put(store, {Key("run", RUN): None, key("a"): None})
    await seed(store, "new", a=task())
    found = await plan_restore(store, made.id)
    assert set(found.written) == {Key("run", RUN), key("a")}
    assert (found.skipped, list(found.runs)) == ({Key("run", "new"): "it started after the checkpoint"}, [RUN])
    await store.commit(Commit(found.writes))
    assert (await plan_restore(store, made.id)).writes == []


async def test_restore_deletes_new_tasks_unless_a_session_had_them(store: Store) -> None:
    """Except those on the target; attempts stay on record."""
    await seed(store, a=task())
    made = await create_checkpoint(store, RUN, "x")
    since = {
        "b": task(),
        "c": task(TaskStatus.LANDED, 1, landed="d" * 40),
        "d": task(TaskStatus.FAILED, 1),
        "e": task(TaskStatus.PENDING, 1),
    }
    specs = {name: Key("spec", f"{RUN}/{name}") for name in since}
    await put(store, {key(name): one for name, one in since.items()} | {one: {"x": 1} for one in specs.values()})
    found = await plan_restore(store, made.id)
    assert set(found.deleted) == {key("b"), specs["b"]}
    assert set(found.skipped) == {key("c"), key("d"), *(specs[name] for name in "cde")}
    assert found.runs[RUN].tasks == ("a", "c", "d", "e")
    written = {write.key: write.value for write in found.writes if write.value is not None}
    assert written[key("e")] == {
        **since["e"],
        "status": "cancelled",
        "reason": "the plan that added it was undone",
    }


async def test_missing_checkpoint_is_rejected(store: Store) -> None:
    """The error for an unknown run or checkpoint has the fix."""
    with pytest.raises(RefusedError, match="there is no run"):
        await create_checkpoint(store, "nonsense", "x")
    with pytest.raises(RefusedError, match="council checkpoint list"):
        await read_checkpoint(store, f"{RUN}/7")
    assert await list_checkpoints(store) == []


async def test_checkpoint_by_a_stale_owner_is_rejected(store: Store) -> None:
    """An outdated guard rejects both creating and pruning."""
    await seed(store, a=task())
    await put(store, {LEASE: {"epoch": 2}})
    await create_checkpoint(store, RUN, "x", created_by=CheckpointOrigin.TIMER)
    with pytest.raises(LeaseLost):
        await create_checkpoint(store, RUN, "x", guards=[Guard(LEASE, 1)])
    with pytest.raises(LeaseLost):
        await prune_checkpoints(store, RUN, 0, [Guard(LEASE, 1)])
    assert len(await list_checkpoints(store, RUN)) == 1


class Forgetful(MemoryStore):
    """A store whose log is compacted completely."""

    async def at(self, position: int) -> StateSnapshot:
        """Report no state."""
        raise HistoryCompacted(position, position + 1)


async def test_restore_behind_the_compacted_log_is_rejected() -> None:
    """The checkpoint is still listed, and the error says that its contents are gone."""
    store = Forgetful(ManualClock())
    await seed(store, a=task())
    made = await create_checkpoint(store, RUN, "x")
    for ask in (read_contents, plan_restore):
        with pytest.raises(RefusedError, match="choose a later checkpoint"):
            await ask(store, made.id)


class Damaged(MemoryStore):
    """A store with damaged newest values of a task, in the current state or in the past."""

    now: Key | None = None
    then: Key | None = None

    async def list(self, kind: str, prefix: str = "") -> list[Document]:
        """Mark the damaged current values."""
        return [one._replace(damaged=one.key == self.now) for one in await super().list(kind, prefix)]

    async def at(self, position: int) -> StateSnapshot:
        """Mark the damaged values at that position."""
        found = await super().at(position)
        marked = {name: one._replace(damaged=name == self.then) for name, one in found.documents.items()}
        return StateSnapshot(found.position, found.time, marked)


@pytest.mark.parametrize("when", ["now", "then"])
async def test_damaged_document_stays_and_blocks_nothing(when: str) -> None:
    """Only the damaged task is skipped; the others are restored."""
    store = Damaged(ManualClock())
    await seed(store, a=task(), b=task())
    made = await create_checkpoint(store, RUN, "x")
    await put(store, {key("a"): task(TaskStatus.FAILED, 1), key("b"): task(TaskStatus.FAILED, 1)})
    setattr(store, when, key("a"))
    found = await plan_restore(store, made.id)
    assert found.written == [key("b")]
    assert "damaged" in found.skipped[key("a")]
    if when == "now":
        assert (await create_checkpoint(store, RUN, "x")).task_counts == {"damaged": 1, "failed": 1}


class Restless(MemoryStore):
    """A store with a new commit at every read."""

    async def position(self) -> int:
        """Commit, so that no two reads return the same position."""
        await put(self, {Key("x", "y"): {"n": await super().position()}})
        return await super().position()


async def test_restore_between_commits_of_others_reads_the_log() -> None:
    """If no two reads agree, the checkpoint still has the documents of its position."""
    store = Restless(ManualClock())
    await seed(store, a=task(), b=task())
    made = await create_checkpoint(store, RUN, "x")
    assert made.task_counts == {"pending": 2}
    assert (await read_contents(store, made.id)).keys() == {Key("run", RUN), key("a"), key("b")}


def note(run: str, text: str) -> JsonObject:
    """Return a note of a session of a run."""
    return {"id": "1", "run": run, "task": "a", "attempt": 1, "text": text, "time": 0.0}


async def test_restored_notes_come_back_and_new_ones_stay(store: Store) -> None:
    """Notes of the run's sessions are part of the checkpoint; later ones and those of other runs are unchanged."""
    ours, later, theirs = (Key("note", f"0123456789abcdef/{name}") for name in ("1", "2", "3"))
    await seed(store, a=task())
    await put(store, {ours: note(RUN, "x"), theirs: note("another", "y")})
    made = await create_checkpoint(store, RUN, "before")
    assert {key for key in await read_contents(store, made.id) if key.kind == "note"} == {ours}
    await put(store, {ours: None, theirs: None, later: note(RUN, "z")})
    found = await plan_restore(store, made.id)
    assert [(write.key, write.value) for write in found.writes] == [(ours, note(RUN, "x"))]
    assert (found.deleted, found.skipped) == ([], {})
    await store.commit(Commit(found.writes))
    assert {one.key for one in await store.list("note")} == {ours, later}
    whole = await create_checkpoint(store, None, "all")
    await put(store, {ours: None, later: None})
    assert {write.key for write in (await plan_restore(store, whole.id)).writes} == {ours, later}


async def test_checkpoint_of_everything_has_documents_of_other_kinds(store: Store) -> None:
    """They are restored, with expiry times unchanged; a checkpoint of a run does not affect them."""
    kept, changed, new, lock = (Key("memo", name) for name in ("kept", "changed", "new", "lock"))
    gone = Key("plan", "gone/deep")
    await seed(store, a=task())
    await put(store, {kept: {"n": 1}, changed: {"n": 1}, gone: {"n": 1}})
    await store.commit(Commit([Write(lock, 0, {"n": 1}, 1000.0)]))
    whole, own = await create_checkpoint(store, None, "before"), await create_checkpoint(store, RUN, "before")
    assert {kept, changed, gone, lock} <= (await read_contents(store, whole.id)).keys()
    await put(store, {changed: {"n": 2}, gone: None, new: {"n": 3}, lock: None})
    assert (await plan_restore(store, own.id)).writes == []
    found = await plan_restore(store, whole.id)
    assert {write.key: write.value for write in found.writes} == {changed: {"n": 1}, gone: {"n": 1}, new: None}
    await store.commit(Commit(found.writes))
    assert (await plan_restore(store, whole.id)).writes == []


async def test_restored_shared_values_have_their_old_values(store: Store) -> None:
    """Later values are deleted, since repeated sessions share them again."""
    sharing = SharedValues(store, ManualClock(), Redactor(), RUN)
    await store.commit(Commit([Write(Key("run", RUN), 0, run_document(ended=2.0))]))
    await sharing.put("k", "then")
    made = await create_checkpoint(store, RUN, "by hand")
    await sharing.put("k", "since")
    await sharing.put("new", 1)
    found = {write.key.id: write.value for write in (await plan_restore(store, made.id)).writes}
    assert found.keys() == {f"{RUN}/k", f"{RUN}/new"}
    assert (found[f"{RUN}/k"] or {})["value"] == "then"
    assert found[f"{RUN}/new"] is None
