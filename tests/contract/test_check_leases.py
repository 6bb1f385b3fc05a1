"""Leases on checks in progress behave equally on every store."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from orchestrator.errors import StoreUnavailable
from orchestrator.locking.check_leases import CheckLeases, check_lease_key
from orchestrator.protocols import Commit, Store, Write
from orchestrator.testing.clock import ManualClock
from tests.contract.test_claims import PATIENCE, Cluster, Process, watch_for


@pytest.fixture
def cluster(store: Store, clock: ManualClock) -> Cluster:
    """Return a shared store for orchestrators."""
    return Cluster(store, clock)


def leases_of(process: Process, clock: ManualClock) -> CheckLeases:
    """Return the leases of a process."""
    return CheckLeases(process.line, clock, process.others)  # type: ignore[arg-type]


async def join(cluster: Cluster, name: str, *, run: str = "run", host: str = "") -> tuple[Process, CheckLeases]:
    """Return another process, and its leases."""
    process = await cluster.join(name, run=run, host=host)
    return process, leases_of(process, cluster.clock)


async def running(leases: CheckLeases, *digests: str) -> Sequence[str]:
    """Try to take leases, release them, and return the checks that are running elsewhere."""
    async with leases.hold(digests) as found:
        return found


async def test_checks_of_another_run_are_leased_together_or_not_at_all(cluster: Cluster) -> None:
    """So two processes never wait for each other; other tasks of the owner wait as well."""
    (_, ours), (_, theirs) = await join(cluster, "a"), await join(cluster, "b", run="other")
    async with ours.hold(["x", "y"]) as found:
        assert found == ()
        assert await running(theirs, "y", "z") == ["y"]
        assert await running(theirs, "z") == ()
        assert await running(ours, "x", "z") == ["x"]
        assert await running(ours, "z") == ()
        assert await running(ours) == []
    assert await running(theirs, "x", "y", "z") == ()
    assert await cluster.store.list("checking") == []


async def test_record_of_a_check_releases_its_lease(cluster: Cluster) -> None:
    """Also if it was leased before; other leases are kept."""
    (_, ours), (_, theirs) = await join(cluster, "a"), await join(cluster, "b")
    for _ in range(2):
        async with ours.hold(["x", "y"]), anyio.create_task_group() as group:
            group.start_soon(theirs.wait, ["x"])
            await anyio.wait_all_tasks_blocked()
            await cluster.store.commit(Commit(await ours.release_writes(["x"])))
            with anyio.fail_after(PATIENCE):
                await theirs.wait(["x", "y"])
            assert await running(theirs, "x", "y") == ["y"]


@pytest.mark.parametrize("is_dead", [False, True])
async def test_check_of_a_gone_owner_is_taken_over(cluster: Cluster, is_dead: bool) -> None:
    """Its process has ended, or its heartbeat has expired; it then releases nothing."""
    gone, ours = await join(cluster, "gone", host="box" if is_dead else "")
    process, theirs = await join(cluster, "b", host="box" if is_dead else "")
    async with theirs.hold(["other"]), ours.hold(["x"]):
        assert await running(theirs, "x") == ["x"]
        cluster.dead.update({gone.name} if is_dead else ())
        await watch_for(process, 2.0 if is_dead else 700.0, cluster.clock)
        with anyio.fail_after(PATIENCE):
            await theirs.wait(["other", "x"])
        async with theirs.hold(["x"]) as found:
            assert found == ()
            assert await ours.release_writes(["x"]) == []


@pytest.mark.parametrize("fault", ["fails", "is not acknowledged"])
async def test_lease_of_a_commit_without_an_answer_is_released(cluster: Cluster, fault: str) -> None:
    """Now, or with the next heartbeat if the store is unreachable."""
    (process, ours), (_, theirs) = await join(cluster, "a"), await join(cluster, "b")
    process.line.faults = [fault, "fails"]
    with pytest.raises(StoreUnavailable):
        async with ours.hold(["x"]):
            pass
    if fault == "is not acknowledged":
        assert await running(theirs, "x") == ["x"]
        assert await running(ours, "x") == ["x"]
    process.line.faults = []
    await process.others.renew()
    assert await running(ours, "x") == ()
    assert await running(theirs, "x") == ()


async def test_unreadable_lease_is_replaced(cluster: Cluster) -> None:
    _, ours = await join(cluster, "a")
    await cluster.store.commit(Commit([Write(check_lease_key("x"), 0, {"id": 3})]))
    assert await running(ours, "x") == ()
