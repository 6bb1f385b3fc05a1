"""Leases: guards with an epoch, and documents that expire."""

# ruff: noqa: S101  this module is a test suite

from __future__ import annotations

import anyio
import pytest

from orchestrator.errors import InvalidDocument, LeaseLost, VersionConflict
from orchestrator.protocols import Commit, Guard, JsonObject, Write
from orchestrator.testing.store_contract.suite import (
    LEASE,
    OTHER_TASK,
    TASK,
    TIMEOUT,
    StoreSuite,
    assert_only,
    make_commit,
)


class LeaseContract(StoreSuite):
    """The rules for guards and expiry."""

    async def test_guard_with_the_current_epoch_accepts_the_commit(self) -> None:
        """This includes a commit that renews the lease itself."""
        async with self.open_store() as store:
            await store.commit(make_commit(LEASE, 0, {"epoch": 4}))
            guard = Guard(LEASE, 4)
            renewal = Write(LEASE, 1, {"epoch": 4, "until": 9})
            assert await store.commit(Commit([Write(TASK, 0, {}), renewal], guards=[guard])) == 2

    @pytest.mark.parametrize("lease", [{"epoch": 5}, {"epoch": 3}, {}, None])
    async def test_guard_with_another_epoch_refuses_the_commit(self, lease: JsonObject | None) -> None:
        """A guard on a missing lease or one without an epoch is also rejected; nothing changes."""
        async with self.open_store() as store:
            if lease is not None:
                await store.commit(make_commit(LEASE, 0, lease))
            before = await store.position()
            with pytest.raises(LeaseLost) as caught:
                await store.commit(Commit([Write(TASK, 0, {})], guards=[Guard(LEASE, 4)]))
            assert (caught.value.held, caught.value.current) == (4, (lease or {}).get("epoch"))
            assert await store.get(TASK) is None
            assert await store.position() == before

    async def test_guard_of_a_deleted_lease_refuses_the_commit(self) -> None:
        """The last epoch of a deleted lease is refused."""
        async with self.open_store() as store:
            await store.commit(make_commit(LEASE, 0, {"epoch": 4}))
            await store.commit(make_commit(LEASE, 1, None))
            with pytest.raises(LeaseLost):
                await store.commit(Commit(guards=[Guard(LEASE, 4)]))

    async def test_expired_document_is_treated_as_deleted(self) -> None:
        """An expired document can't be read, listed or a guard; a write expects version 0."""
        async with self.open_store() as store:
            await store.commit(Commit([Write(TASK, 0, {"n": 1}, ttl=1e-6), Write(LEASE, 0, {"epoch": 1}, ttl=1e-6)]))
            with anyio.fail_after(TIMEOUT):
                while await store.get(TASK) is not None:  # noqa: ASYNC110  the store has its own clock
                    await anyio.sleep(0.001)
            assert list(await store.list("task")) == []
            with pytest.raises(LeaseLost):
                await store.commit(Commit([Write(OTHER_TASK, 0, {})], guards=[Guard(LEASE, 1)]))
            with pytest.raises(VersionConflict) as caught:
                await store.commit(make_commit(TASK, 1, {"n": 2}))
            assert caught.value.found == 0
            await store.commit(make_commit(TASK, 0, {"n": 2}))
            await assert_only(store, {TASK: (2, {"n": 2})}, position=2)

    async def test_write_with_another_ttl_replaces_the_expiry(self) -> None:
        """Each write resets the expiry; a write without a `ttl` removes it."""
        async with self.open_store() as store:
            await store.commit(Commit([Write(TASK, 0, {"n": 1}, ttl=3600)]))
            first = await store.get(TASK)
            await store.commit(Commit([Write(TASK, 1, {"n": 2}, ttl=7200)]))
            second = await store.get(TASK)
            assert first is not None
            assert second is not None
            assert first.expires == pytest.approx(first.time + 3600)
            assert second.expires == pytest.approx(second.time + 7200)
            await store.commit(make_commit(TASK, 2, {"n": 3}))
            third = await store.get(TASK)
            assert third is not None
            assert third.expires is None

    @pytest.mark.parametrize("ttl", [0.0, -1.0, float("nan"), float("inf")])
    async def test_invalid_ttl_is_refused(self, ttl: float) -> None:
        """A `ttl` must be a positive, finite number of seconds."""
        async with self.open_store() as store:
            with pytest.raises(InvalidDocument):
                await store.commit(Commit([Write(TASK, 0, {}, ttl=ttl)]))
            await assert_only(store, {}, position=0)
