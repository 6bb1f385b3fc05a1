"""Merge lease: the right to land on a branch, held by one orchestrator at a time.

It is a lease in the store, so it works across machines, and is granted in request order. It provides ordering: landing
intents need its epoch. The push itself uses `--force-with-lease`, which ensures that no other landing interferes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio

from orchestrator.domain.scheduling.claims import MergeLease
from orchestrator.errors import StoreUnavailable, VersionConflict
from orchestrator.locking.orchestrators import RunMembership
from orchestrator.locking.ownership import ownership_scope
from orchestrator.protocols import Commit, Document, Guard, Key, Store, Write
from orchestrator.state.documents.validation import filter_readable, find_document_error
from orchestrator.system.clock import Clock

#: Seconds between checks of the lease while waiting: initial and maximum.
_PAUSES = (0.05, 0.5)


@dataclass(frozen=True, slots=True)
class HeldMergeLease:
    """The right to land while its guard is valid, created by `MergeLeaseQueue.hold`."""

    scope: str
    guard: Guard


def merge_lease_key(scope: str) -> Key:
    """Return the key of the merge lease of a branch."""
    return Key("lease", f"merge/{scope}")


async def read_merge_leases(store: Store) -> dict[str, tuple[Document, MergeLease]]:
    """Return all merge leases with their documents, keyed by scope."""
    documents = filter_readable(await store.list("lease", "merge/"))
    return {
        document.key.id.partition("/")[2]: (document, MergeLease.model_validate(document.value))
        for document in documents
    }


class MergeLeaseQueue:
    """The queue for the merge lease of one branch, as used by one orchestrator."""

    def __init__(self, store: Store, clock: Clock, orchestrators: RunMembership, repository: str, target: str) -> None:
        self._store, self._clock, self._others = store, clock, orchestrators
        self._blank = MergeLease(repository=repository, target=target)
        self.scope = ownership_scope(repository, target)
        self._key = merge_lease_key(self.scope)

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[HeldMergeLease]:
        """Wait for the lease and hold it for the block.

        Raises LeaseLost if this orchestrator is declared gone.
        """
        async with self._others.process_lock(f"merge/{self.scope}"):
            try:
                yield HeldMergeLease(self.scope, await self._acquire())
            finally:
                with anyio.CancelScope(shield=True):
                    await self._leave()

    async def _acquire(self) -> Guard:
        me, begin = self._others.me.id, self._clock.monotonic()
        while True:
            document, lease = await self._read()
            is_free = lease.holder is None or await self._others.is_gone(lease.holder)
            while lease.waiting and lease.waiting[0].id != me and await self._others.is_gone(lease.waiting[0]):
                lease = lease.model_copy(update={"waiting": lease.waiting[1:]})
            is_first = not lease.waiting or lease.waiting[0].id == me
            if is_free and is_first:
                rest = tuple(waiter for waiter in lease.waiting if waiter.id != me)
                taken = lease.model_copy(
                    update={"epoch": lease.epoch + 1, "holder": self._others.participant(), "waiting": rest}
                )
                if await self._write(document, taken):
                    return Guard(self._key, taken.epoch)
            elif all(waiter.id != me for waiter in lease.waiting):
                await self._write(
                    document, lease.model_copy(update={"waiting": (*lease.waiting, self._others.participant())})
                )
            else:
                now, (first, last) = self._clock.monotonic(), _PAUSES
                await self._clock.wait(anyio.Event(), now + min(max(first, (now - begin) / 10), last))

    async def _leave(self) -> None:
        """Release this orchestrator's lease and its position in the queue."""
        me = self._others.me.id
        try:
            while True:
                document, lease = await self._read()
                changes: dict[str, object] = {}
                if lease.holder is not None and lease.holder.id == me:
                    changes |= {"epoch": lease.epoch + 1, "holder": None}
                if any(waiter.id == me for waiter in lease.waiting):
                    changes["waiting"] = tuple(waiter for waiter in lease.waiting if waiter.id != me)
                if not changes or await self._write(document, lease.model_copy(update=changes), is_guarded=False):
                    return
        except StoreUnavailable:
            self._others.defer(self._leave_later)  # otherwise others would wait until this process exits

    async def _leave_later(self) -> None:
        lock = self._others.process_lock(f"merge/{self.scope}")
        if lock.locked():  # the holder releases the lease itself
            return
        async with lock:
            await self._leave()

    async def _read(self) -> tuple[Document | None, MergeLease]:
        document = await self._store.get(self._key)
        if document is None:
            return None, self._blank
        if document.damaged or find_document_error(document) is not None:  # epochs never exceed the version
            return document, self._blank.model_copy(update={"epoch": document.version})
        return document, MergeLease.model_validate_json(document.encoded)

    async def _write(self, document: Document | None, lease: MergeLease, *, is_guarded: bool = True) -> bool:
        write = Write(self._key, 0 if document is None else document.version, lease.model_dump(mode="json"))
        try:
            guards = [self._others.guard] if is_guarded else []
            await self._store.commit(Commit([write], guards=guards, durable=False))
        except VersionConflict:
            return False
        return True
