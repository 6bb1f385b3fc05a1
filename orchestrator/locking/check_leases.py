"""Leases on checks in progress: processes that share a store run a check on a tree once.

A check is leased while it runs. The commit that records its success also releases the lease, so a check without a lease
is recorded or has to run. A lease is valid while its owner is alive (`locking.orchestrators`), and only saves work: a
check that runs twice has the same result.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final

import anyio

from orchestrator.domain.runs.check_results import MAX_CHECK_AGE
from orchestrator.domain.scheduling.claims import LeaseParticipant
from orchestrator.errors import StoreUnavailable, VersionConflict
from orchestrator.locking.orchestrators import RunMembership
from orchestrator.protocols import Commit, Key, Store, Write
from orchestrator.state.documents.log_reader import wait_for_commit
from orchestrator.state.documents.validation import is_readable
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: Seconds between checks of the owners of awaited leases.
_POLL_INTERVAL: Final = 0.5


def check_lease_key(digest: str) -> Key:
    """Return the key of the lease on a check that is in progress."""
    return Key("checking", digest)


class CheckLeases:
    """The leases of one orchestrator on checks, each named by the digest of its recorded result."""

    def __init__(self, store: Store, clock: Clock, orchestrators: RunMembership) -> None:
        self._store, self._clock, self._others = store, clock, orchestrators
        self._held = set[str]()
        """The leases that this process has or is taking."""

    @asynccontextmanager
    async def hold(self, digests: Collection[str]) -> AsyncIterator[Sequence[str]]:
        """Hold the leases on all of these checks for the block, or none.

        Yields the checks that another owner or task is running; if there are none, the leases are held.
        """
        running = [digest for digest in digests if digest in self._held]
        if running or not digests:
            yield running
            return
        self._held.update(digests)
        try:
            yield await self._take(digests)
        finally:
            with anyio.CancelScope(shield=True):
                await self._release(digests)

    async def release_writes(self, digests: Collection[str]) -> Sequence[Write]:
        """Return the writes that release leases, for the commit that records the success of their checks."""
        found = {digest: await self._read(digest) for digest in digests}
        return [
            Write(check_lease_key(digest), version, None)
            for digest, (version, owner) in found.items()
            if owner is not None and owner.id == self._others.me.id
        ]

    async def wait(self, digests: Collection[str]) -> None:
        """Wait until one of the leases is released, or its owner is gone."""
        keys = {check_lease_key(digest) for digest in digests}
        while True:
            position = await self._store.position()
            if not all([await self._is_running(digest) for digest in digests]):
                return
            until = self._clock.monotonic() + _POLL_INTERVAL
            await wait_for_commit(
                self._store, self._clock, position, lambda record: not keys.isdisjoint(record.documents), until
            )

    async def _is_running(self, digest: str) -> bool:
        _, owner = await self._read(digest)
        return owner is not None and (digest in self._held or not await self._others.is_gone(owner))

    async def _take(self, digests: Collection[str]) -> Sequence[str]:
        """Take all leases in one commit; if others run some of the checks, take none and return these."""
        while True:
            found = {digest: await self._read(digest) for digest in digests}
            running = [
                digest
                for digest, (_, owner) in found.items()
                if owner is not None and not await self._others.is_gone(owner)
            ]
            if running:
                return running
            value = self._others.participant().model_dump(mode="json")
            writes = [
                Write(check_lease_key(digest), version, value, MAX_CHECK_AGE) for digest, (version, _) in found.items()
            ]
            try:
                with anyio.CancelScope(shield=True):  # otherwise it could become effective after the release
                    await self._store.commit(Commit(writes, durable=False))
            except VersionConflict:
                continue
            failpoint("check.leased")
            return ()

    async def _release(self, digests: Collection[str]) -> None:
        """Release the leases that this process still has, also after an unconfirmed commit."""
        try:
            while writes := await self.release_writes(digests):
                with suppress(VersionConflict):
                    await self._store.commit(Commit(writes, durable=False))
        except StoreUnavailable:
            self._others.defer(partial(self._release, digests))  # otherwise others would wait until this process exits
            return
        self._held.difference_update(digests)

    async def _read(self, digest: str) -> tuple[int, LeaseParticipant | None]:
        """Return the version of a lease, and its owner; None if it is free or unreadable."""
        found = await self._store.get(check_lease_key(digest))
        if found is None:
            return 0, None
        return found.version, LeaseParticipant.model_validate_json(found.encoded) if is_readable(found) else None
