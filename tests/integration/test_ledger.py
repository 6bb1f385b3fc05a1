"""A run as several orchestrators have it: each hears of whatever the others do to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import anyio
import pytest

from orchestrator.clock import Clock
from orchestrator.domain.holdings import HeldBy as OwnedBy
from orchestrator.domain.lifecycle import Trigger
from orchestrator.domain.model import Attempt, TaskStatus
from orchestrator.domain.secrets import Redactor
from orchestrator.engine.ledger import Ledger, Moved, Outdated
from orchestrator.engine.records import seed
from orchestrator.locking.claims import HeldBy
from orchestrator.protocols import Commit, Document, Key, Store
from orchestrator.state.memory import MemoryStore
from orchestrator.testing.clock import ManualClock
from tests.recorded import NEW, OLD, orchestrators, run_document, task_spec


async def start(ledger: Ledger, task: str) -> HeldBy | OwnedBy | Outdated | Moved | None:
    """Record the first attempt of a task."""
    attempt = Attempt(number=1, adapter="fixer", base=OLD, started=0.0)
    return await ledger.start(task, {"base": OLD, "adapter": "fixer"}, attempts=(attempt,))


async def two_ledgers(store: Store, clock: Clock, folder: Path) -> list[Ledger]:
    """Return a new run as each of two orchestrators has it."""
    run = run_document(folder)
    await seed(store, run, {task: task_spec(task, "Do it.") for task in run.tasks})
    return [
        await Ledger.join(store, clock, Redactor([]), orchestrators(store, clock, run.id, alone=False), {})
        for _ in range(2)
    ]


class Watched(MemoryStore):
    """A store in which something happens before a claim is looked at, and all else that can before it is given back."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.is_giving_back = anyio.Event()
        self.before_claim: Callable[[], Awaitable[None]] | None = None

    async def get(self, key: Key) -> Document | None:
        if key.kind == "claim" and self.before_claim is not None:
            happens, self.before_claim = self.before_claim, None
            await happens()
        return await super().get(key)

    async def commit(self, commit: Commit) -> int:
        if any(event.type == "claim.released" for event in commit.events):
            self.is_giving_back.set()
            await anyio.wait_all_tasks_blocked()
        return await super().commit(commit)


@pytest.mark.parametrize("is_looked_meanwhile", [False, True])
async def test_who_looks_where_a_task_is_still_hears_that_another_moved_it(
    tmp_path: Path, is_looked_meanwhile: bool
) -> None:
    """A claim that comes too late sees that the task has landed; whoever follows what others do is told so as well."""
    clock = ManualClock()
    store = Watched(clock)
    ours, theirs = await two_ledgers(store, clock, tmp_path)
    claimed = anyio.Event()
    async with aclosing(ours.changes()) as changes:

        async def land() -> None:
            await theirs.change("models", Trigger.ADOPT, landed=NEW)

        async def claim() -> None:
            assert not await ours.claim("models")
            claimed.set()

        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(start, theirs, "models")
                assert (await anext(changes)).task == "models"
            await theirs.change("models", Trigger.BUILD, commit=NEW)
            if is_looked_meanwhile:
                store.before_claim = land
            else:
                await land()
            async with anyio.create_task_group() as group:
                group.start_soon(claim)
                await (store.is_giving_back if is_looked_meanwhile else claimed).wait()
                change = await anext(changes)
    assert change.before is not None
    assert (change.task, change.before.status) == ("models", TaskStatus.RUNNING)
    assert ours.task("models").status is TaskStatus.LANDED


async def test_nothing_is_claimed_that_is_over(tmp_path: Path) -> None:
    """Whoever has not heard yet that a task has failed elsewhere looks, and leaves its claim as it is."""
    clock = ManualClock()
    store = MemoryStore(clock)
    ours, theirs = await two_ledgers(store, clock, tmp_path)
    assert await start(theirs, "models") is None
    assert await ours.refresh("models")
    await theirs.change("models", Trigger.FAIL, reason="theirs")
    before = await store.position()
    assert not await ours.claim("models")
    assert await store.position() == before


@pytest.mark.parametrize("trigger", [Trigger.INTERRUPT, Trigger.IDLE])
async def test_what_another_has_tried_meanwhile_is_not_started_as_it_was_before(
    tmp_path: Path, trigger: Trigger
) -> None:
    """What is to be recorded does not know of the other's attempt, and would take its number."""
    clock = ManualClock()
    ours, theirs = await two_ledgers(MemoryStore(clock), clock, tmp_path)
    assert await start(theirs, "models") is None
    await theirs.change("models", trigger, reason="theirs")
    status = theirs.task("models").status
    assert await start(ours, "models") == Moved(status)
    assert ours.task("models") == theirs.task("models")
