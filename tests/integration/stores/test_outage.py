"""An unreachable store costs only time, or the run continues without it; concurrent changes of others count."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal

import anyio
import pytest

from orchestrator.domain.events.base import TypedEvent
from orchestrator.errors import LeaseLost, RefusedError, StateLost, StoreUnavailable, VersionConflict
from orchestrator.protocols import Commit, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.state.documents.log_reader import read_range
from orchestrator.state.offline.fork import Mirror, survive_outages
from orchestrator.state.offline.outage import flush_outage_events
from orchestrator.state.stores.file import FileStore
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import SystemClock
from tests.faulty_store import QUICK_PAUSES, DisconnectableStore, FailingStore
from tests.small_disk import fill, mounted

A, B, CLAIM = Key("task", "r/a"), Key("task", "r/b"), Key("claim", "r/a")
PATIENCE = 20


def writing(key: Key, expected: int, value: JsonObject | None = None, *guards: Guard) -> Commit:
    return Commit([Write(key, expected, {"n": expected + 1} if value is None else value)], [Event("done")], guards)


class Scene:
    """A real store, the connection to it, and the notices."""

    def __init__(self, folder: Path) -> None:
        self.real = MemoryStore(SystemClock())
        self.line = DisconnectableStore(self.real)
        self.folder = folder
        self.reported: list[TypedEvent] = []
        self._news = anyio.Event()

    async def tell(self, event: TypedEvent) -> None:
        self.reported.append(event)
        self._news.set()
        self._news = anyio.Event()

    async def until_reported(self, kind: str) -> TypedEvent:
        with anyio.fail_after(PATIENCE):
            while (found := next((one for one in self.reported if one.type == kind), None)) is None:
                await self._news.wait()
        return found

    async def back(self) -> None:
        """Restore the connection, and wait until that is noticed."""
        self.reported.clear()
        self.line.reconnect()
        await self.until_reported("outage.ended")

    @asynccontextmanager
    async def opened(self, mode: Literal["pause", "continue"]) -> AsyncIterator[Store]:
        with anyio.fail_after(PATIENCE):
            async with survive_outages(
                self.line, mode, SystemClock(), self.folder, self.tell, intervals=QUICK_PAUSES
            ) as store:
                yield store

    async def value(self, key: Key) -> JsonObject | None:
        found = await self.real.get(key)
        return None if found is None else found.value

    async def events(self) -> list[str]:
        """Return the types of all events in the real store."""
        found: list[str] = []
        position = await self.real.position()
        if position:
            async for record in self.real.watch():
                found += [event.type for event in record.events]
                if record.position == position:
                    break
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Yield a scene with an empty store."""
    return Scene(tmp_path / "outage")


async def test_commits_wait_in_order_and_outage_start_and_end_are_reported(scene: Scene) -> None:
    """Once at the start and once at the end, however many commits wait."""
    async with scene.opened("pause") as store:
        await store.commit(writing(A, 0))
        scene.line.cut()
        positions: dict[int, int] = {}

        async def commit(number: int) -> None:
            positions[number] = await store.commit(Commit([Write(Key("task", str(number)), 0, {})]))

        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(commit, number)
                await anyio.wait_all_tasks_blocked()
            await scene.until_reported("outage.started")
            assert positions == {}
            scene.line.reconnect()
        assert positions == {number: number + 2 for number in range(20)}
    assert [one.type for one in scene.reported] == ["outage.started", "outage.ended"]
    assert scene.reported[0].data()["mode"] == "pause"
    assert "does not answer" in scene.reported[0].data()["reason"]


async def test_flush_waits_for_the_events_of_an_active_outage(scene: Scene) -> None:
    """Including its end, which is reported only after the flush has begun."""
    flushed: list[tuple[bool, list[str]]] = []

    async def record(event: TypedEvent) -> None:
        await store.commit(Commit([], [Event.of(event)]))

    async def flush() -> None:
        flushed.append((await flush_outage_events(store), await scene.events()))

    with anyio.fail_after(PATIENCE):
        async with survive_outages(
            scene.line, "pause", SystemClock(), scene.folder, record, intervals=QUICK_PAUSES
        ) as store:
            scene.line.cut()
            async with anyio.create_task_group() as group:
                for call in (partial(store.get, A), flush):
                    group.start_soon(call)
                    await anyio.wait_all_tasks_blocked()
                scene.line.reconnect()
            await flush()
    assert flushed == [(has_sent, ["outage.started", "outage.ended"]) for has_sent in (True, False)]


async def test_reads_and_followers_wait_too(scene: Scene) -> None:
    """Reads return the state after the outage; a follower misses nothing and sees nothing twice."""
    async with scene.opened("pause") as store:
        await store.commit(writing(A, 0))
        seen: list[int] = []

        async def watch() -> None:
            async for record in store.watch():
                seen.append(record.position)
                if record.position == 3:
                    return

        async def read() -> None:
            found = await store.get(A)
            assert found is not None
            assert found.value == {"n": 2}

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            await anyio.wait_all_tasks_blocked()
            scene.line.cut()
            group.start_soon(read)
            await scene.until_reported("outage.started")
            await scene.real.commit(writing(A, 1))
            await scene.real.commit(writing(B, 0))
            scene.line.reconnect()
        assert seen == [1, 2, 3]


async def test_abandoned_wait_committed_nothing(scene: Scene) -> None:
    async with scene.opened("pause") as store:
        scene.line.cut()
        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                group.start_soon(store.commit, writing(B, 0))
                await scene.until_reported("outage.started")
                scope.cancel()
                await store.commit(writing(A, 0))
            scene.line.reconnect()
        assert await scene.value(A) is None
        assert await scene.value(B) == {"n": 1}


@pytest.mark.extended
async def test_outage_during_the_final_report_is_handled(scene: Scene) -> None:
    """No one receives the notice any more."""
    ended = anyio.Event()

    async def tell(_: TypedEvent) -> None:
        await ended.wait()
        scene.line.cut()
        await store.commit(writing(B, 0))

    with anyio.fail_after(PATIENCE):
        async with survive_outages(
            scene.line, "pause", SystemClock(), scene.folder, tell, intervals=QUICK_PAUSES
        ) as store:
            scene.line.cut()
            async with anyio.create_task_group() as group:
                group.start_soon(store.commit, writing(A, 0))
                await anyio.wait_all_tasks_blocked()
                scene.line.reconnect()
            ended.set()
    assert await scene.value(A) == {"n": 1}


async def test_commit_with_a_lost_reply_is_applied_once(scene: Scene) -> None:
    """It is recognized by its content; one that another process has overtaken is rejected as usual."""
    async with scene.opened("pause") as store:
        scene.line.lost_answers = 1
        assert await store.commit(writing(A, 0)) == 1
        scene.line.lost_answers = 1
        assert await store.commit(Commit([Write(A, 1, None), Write(B, 0, {"n": 1})])) == 2
        assert await scene.real.position() == 2
        scene.line.cut()
        async with anyio.create_task_group() as group:

            async def lose() -> None:
                with pytest.raises(VersionConflict):
                    await store.commit(writing(B, 1, {"n": "mine"}))

            scene.reported.clear()
            group.start_soon(lose)
            await scene.until_reported("outage.started")
            await scene.real.commit(writing(B, 1, {"n": "theirs"}))
            scene.line.reconnect()


class EmptiedStore(MemoryStore):
    """A store that has lost its content."""

    async def commit(self, commit: Commit) -> int:
        raise StateLost("there", "it is gone")


@pytest.mark.parametrize("mode", ["pause", "continue"])
async def test_lost_state_is_not_waited_for(tmp_path: Path, mode: Literal["pause", "continue"]) -> None:
    """Waiting does not restore it, and continuing would hide the loss."""

    async def tell(event: TypedEvent) -> None:
        raise AssertionError(event)

    with pytest.raises(StateLost), anyio.fail_after(PATIENCE):
        async with survive_outages(EmptiedStore(SystemClock()), mode, SystemClock(), tmp_path / "x", tell) as store:
            await store.commit(writing(A, 0))


@pytest.mark.parametrize("mode", ["pause", "continue"])
async def test_full_disk_is_waited_for(tmp_path: Path, mode: Literal["pause", "continue"]) -> None:
    """Also in fork mode with a full disk of the fork; nothing is lost once there is space."""
    began = anyio.Event()

    async def tell(event: TypedEvent) -> None:
        if event.type == "outage.started":
            began.set()

    clock, number = SystemClock(), 0
    with anyio.fail_after(PATIENCE), mounted(tmp_path / "disk", "128k") as disk:
        async with (
            FileStore.open(disk / "state", clock) as inner,
            survive_outages(inner, mode, clock, disk / "outage", tell, intervals=QUICK_PAUSES) as store,
        ):
            await store.commit(writing(A, 0))
            fill(disk / "ballast")

            async def fill_log() -> None:
                nonlocal number
                for number in range(1, 20):
                    await store.commit(writing(A, number, {"n": number, "x": "x" * 1000}))

            async with anyio.create_task_group() as group:
                group.start_soon(fill_log)
                await began.wait()
                (disk / "ballast").unlink()
            found = await inner.get(A)
            assert found is not None
            assert (found.version, found.value["n"]) == (20, 19)


async def test_work_continues_and_is_replayed_in_order(scene: Scene) -> None:
    """Versions, values, events and guards; nothing of the fork is left on the disk."""
    async with scene.opened("continue") as store:
        await store.commit(writing(CLAIM, 0, {"epoch": 1}))
        assert await store.get(A) is None
        assert list(await store.list("task", "r/")) == []
        scene.line.cut()
        for number in range(3):
            await store.commit(writing(A, number, None, Guard(CLAIM, 1)))
        found = await store.get(A)
        assert found is not None
        assert (found.version, found.value) == (3, {"n": 3})
        assert [one.key for one in await store.list("task", "r/")] == [A]
        with pytest.raises(VersionConflict):
            await store.commit(writing(A, 1))
        with pytest.raises(LeaseLost):
            await store.commit(writing(A, 3, None, Guard(CLAIM, 2)))
        assert await scene.value(A) is None
        assert [one.type for one in scene.reported] == ["outage.started"]
        assert list(scene.folder.iterdir())
        await scene.back()
        assert scene.reported[-1].data() | {"seconds": 0} == {
            "mode": "continue",
            "seconds": 0,
            "replayed": 3,
            "refused": 0,
        }
        assert [one.value for one in await scene.real.history(A)] == [{"n": 3}, {"n": 2}, {"n": 1}]
        assert await scene.events() == ["done"] * 4
        await store.commit(writing(A, 3, None, Guard(CLAIM, 1)))
    assert list(scene.folder.iterdir()) == []


@pytest.mark.parametrize("is_followed", [True, False])
async def test_commit_read_from_the_log_before_its_reply_is_known_once(*, is_followed: bool) -> None:
    """Otherwise its next version, and every commit that builds on it, would conflict in a fork."""
    mirror, store, commit = Mirror(0), MemoryStore(SystemClock()), writing(A, 0)
    position = await store.commit(commit)
    if is_followed:
        async for record in read_range(store, 0, position):
            mirror.follow(record)
    mirror.record_commit(commit, position, 0.0)
    assert mirror.newest(A) == (1, {"n": 1})


async def test_concurrent_changes_of_others_count(scene: Scene) -> None:
    """Commits that rely on a claim of another process are rejected and reported; the rest stays."""
    async with scene.opened("continue") as store:
        await store.list("claim")
        await store.list("task")
        scene.line.cut()
        await store.commit(writing(CLAIM, 0, {"epoch": 1, "owner": "here"}))
        await store.commit(writing(A, 0, {"by": "here"}, Guard(CLAIM, 1)))
        await store.commit(writing(B, 0, {"by": "here"}))
        await scene.real.commit(writing(CLAIM, 0, {"epoch": 1, "owner": "there"}))
        await scene.back()
        assert [one.data()["keys"] for one in scene.reported if one.type == "outage.commit_rejected"] == [
            [str(CLAIM)],
            [str(A)],
        ]
        assert scene.reported[-1].data()["refused"] == 2
        assert [await scene.value(key) for key in (CLAIM, A, B)] == [
            {"epoch": 1, "owner": "there"}, None, {"by": "here"},
        ]  # fmt: skip
        # Their epoch has the same number, yet it is not the epoch acquired here.
        with pytest.raises(LeaseLost):
            await store.commit(writing(A, 0, {"by": "here"}, Guard(CLAIM, 1)))
        with pytest.raises(VersionConflict):
            await store.commit(writing(CLAIM, 1, {"epoch": 2, "owner": "here"}))
        found = await store.get(CLAIM)
        assert found is not None
        assert found.value["owner"] == "there"
        await store.commit(writing(CLAIM, 1, {"epoch": 2, "owner": "here"}))
        await store.commit(writing(A, 0, {"by": "here"}, Guard(CLAIM, 2)))


async def test_renewed_lease_is_valid_for_any_epoch(scene: Scene) -> None:
    """Even for an epoch acquired in vain during the outage."""
    async with scene.opened("continue") as store:
        await store.list("claim")
        scene.line.cut()
        await store.commit(writing(CLAIM, 0, {"epoch": 1}))
        await store.commit(writing(CLAIM, 1, {"epoch": 2}))
        await scene.real.commit(writing(CLAIM, 0, {"epoch": 1, "owner": "there"}))
        await scene.back()
        with pytest.raises(LeaseLost):
            await store.commit(Commit(events=[Event("late")], guards=[Guard(CLAIM, 2)]))
        await store.get(CLAIM)
        await store.commit(writing(CLAIM, 1, {"epoch": 2, "owner": "here"}))
        await store.commit(Commit(events=[Event("well")], guards=[Guard(CLAIM, 2)]))


async def test_versions_of_the_fork_map_to_real_ones(scene: Scene) -> None:
    """If this process did not know that the document had existed and been deleted."""
    for commit in (writing(A, 0), writing(A, 1), Commit([Write(A, 2, None)])):
        await scene.real.commit(commit)
    async with scene.opened("continue") as store:
        await store.list("task")
        scene.line.cut()
        await store.commit(writing(A, 0, {"n": "first"}))
        await store.commit(writing(A, 1, {"n": "second"}))
        await scene.back()
        assert [one.version for one in await scene.real.history(A)] == [5, 4, 3, 2, 1]
        await store.commit(writing(A, 2, {"n": "third"}))
        assert await scene.value(A) == {"n": "third"}


async def test_unseen_documents_are_unknown(scene: Scene) -> None:
    """They may exist or not; new documents can still be written."""
    await scene.real.commit(writing(A, 0))
    async with scene.opened("continue") as store:
        scene.line.cut()
        for refused in (
            store.get(A),
            store.list("task"),
            store.commit(writing(A, 1)),
            store.commit(Commit(guards=[Guard(A, 1)])),
        ):
            with pytest.raises(RefusedError, match=r"never (read|listed) by this process"):
                await refused
        await store.commit(writing(B, 0))
        assert await store.get(B) is not None
        await scene.back()
        assert await store.get(A) is not None


async def test_follower_sees_the_state_after_the_outage(scene: Scene) -> None:
    """At the positions of the real store, and nothing twice."""
    async with scene.opened("continue") as store:
        await store.list("task")
        await store.commit(writing(A, 0))
        seen: list[tuple[int, list[Key]]] = []

        async def watch() -> None:
            async for record in store.watch():
                seen.append((record.position, list(record.documents)))
                if record.position == 3:
                    return

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            await anyio.wait_all_tasks_blocked()
            scene.line.cut()
            await store.commit(writing(A, 1))
            await scene.real.commit(writing(B, 0))
            scene.line.reconnect()
        assert seen == [(1, [A]), (2, [B]), (3, [A])]


async def test_short_interruption_is_not_an_outage(scene: Scene) -> None:
    """A failure is retried, and a commit that the first try made is recognized."""
    async with scene.opened("continue") as store:
        scene.line.lost_answers = 1
        await store.commit(writing(A, 0))
        await store.commit(writing(A, 1))
    assert scene.reported == []
    assert await scene.real.position() == 2


async def test_commit_with_an_early_lost_reply_is_applied_once(scene: Scene) -> None:
    """The fork makes it too, since its outcome is unknown, and recognizes it at the replay."""
    async with scene.opened("continue") as store:
        await store.list("task")
        scene.line.lost_answers = 1
        commits = writing(A, 0, {"n": "once"})
        original = scene.line.commit

        async def lose_then_cut(commit: Commit) -> int:
            scene.line.commit = original  # type: ignore[method-assign]
            try:
                return await original(commit)
            finally:
                scene.line.cut()

        scene.line.commit = lose_then_cut  # type: ignore[method-assign]
        await store.commit(commits)
        await store.commit(writing(A, 1, {"n": "twice"}))
        await scene.back()
        assert [one.value for one in await scene.real.history(A)] == [{"n": "twice"}, {"n": "once"}]


CRASH = """
import os, sys
import anyio
from pathlib import Path
from orchestrator.system.clock import SystemClock
from orchestrator.protocols import Commit, Event, Key, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.state.offline.fork import survive_outages
from tests.faulty_store import QUICK_PAUSES, DisconnectableStore, FailingStore

async def main() -> None:
    place = Path(sys.argv[1])
    async def tell(event: object) -> None:
        pass
    async with FileStore.open(place / "state", SystemClock()) as real:
        line = DisconnectableStore(real)
        clock, folder = SystemClock(), place / "outage"
        async with survive_outages(line, "continue", clock, folder, tell, intervals=QUICK_PAUSES) as store:
            await store.list("task")
            line.cut()
            for number in range(5):
                await store.commit(Commit([Write(Key("task", "r/a"), number, {"n": number + 1})], [Event("done")]))
            os.kill(os.getpid(), 9)

anyio.run(main)
"""


async def test_fork_of_a_killed_process_is_replayed_by_the_next(tmp_path: Path) -> None:
    """Nothing of it is lost; what it had replayed before it was killed is not replayed twice."""
    killed = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], check=False, cwd=Path(__file__).parents[3])
    assert killed.returncode == -9
    clock = SystemClock()
    reported: list[TypedEvent] = []

    async def tell(event: TypedEvent) -> None:
        reported.append(event)

    async with FileStore.open(tmp_path / "state", clock) as real:
        assert await real.get(A) is None
        # As if the next process had been killed after the first of them.
        await real.commit(Commit([Write(A, 0, {"n": 1})], [Event("done")]))
        for _ in range(2):
            async with survive_outages(real, "continue", clock, tmp_path / "outage", tell) as store:
                found = await store.get(A)
                assert found is not None
                assert (found.version, found.value) == (5, {"n": 5})
        assert await real.position() == 5
    assert [(one.type, one.data()["replayed"]) for one in reported] == [("outage.ended", 5)]
    assert list((tmp_path / "outage").iterdir()) == []


async def test_fork_left_at_the_end_is_replayed_by_the_next(scene: Scene) -> None:
    """A process that ends during an outage prints where the fork is; the fork of a live process is left alone."""
    async with scene.opened("continue") as store:
        await store.list("task")
        scene.line.cut()
        await store.commit(writing(A, 0))
        async with survive_outages(scene.real, "continue", SystemClock(), scene.folder, scene.tell):
            assert await scene.value(A) is None
    assert [one.type for one in scene.reported] == ["outage.started", "outage.preserved"]
    scene.line.reconnect()
    async with scene.opened("continue"):
        assert await scene.value(A) == {"n": 1}


async def test_internal_error_is_raised_unchanged(scene: Scene) -> None:
    modes: Sequence[Literal["pause", "continue"]] = ("pause", "continue")
    for mode in modes:
        with pytest.raises(StoreUnavailable, match="of another kind"):
            async with scene.opened(mode):
                raise StoreUnavailable("this", "of another kind", "no remedy")


@pytest.mark.parametrize("answers_are_lost", [True, False])
@pytest.mark.parametrize("times", [1, 5])
@pytest.mark.parametrize("mode", ["pause", "continue"])
async def test_store_failing_at_any_call_gets_each_commit_once(
    tmp_path: Path, mode: Literal["pause", "continue"], times: int, *, answers_are_lost: bool
) -> None:
    """One failure is retried; several start an outage. Lost answers of successful commits change nothing."""

    async def ignore(_: TypedEvent) -> None:
        pass

    async def work(store: Store) -> None:
        await store.commit(writing(CLAIM, 0, {"epoch": 1}))
        for number in range(3):
            await store.commit(writing(A, number, None, Guard(CLAIM, 1)))
            with suppress(RefusedError):  # a fork does not know unread documents
                await store.get(B)
                await store.list("task", "r/")
        await store.commit(Commit([Write(CLAIM, 1, None)], [Event("done")]))

    calls, first = 1, 1
    while first <= calls:
        real, folder = MemoryStore(SystemClock()), tmp_path / str(first)
        failing = FailingStore(real, answers_are_lost=answers_are_lost)
        with anyio.fail_after(PATIENCE):
            for inner in (failing, real):  # the second replays a fork that was preserved
                async with survive_outages(inner, mode, SystemClock(), folder, ignore, intervals=QUICK_PAUSES) as store:
                    if inner is failing:
                        failing.fail(first, times)
                        await work(store)
        assert [one.value for one in await real.history(A)] == [{"n": 3}, {"n": 2}, {"n": 1}], first
        assert await real.get(CLAIM) is None
        events = [event.type async for record in read_range(real, 0, 100) for event in record.events]
        assert events == ["done"] * 5, first
        calls, first = max(calls, failing.calls), first + 1
