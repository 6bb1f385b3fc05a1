"""Claims on tasks of a run: leases in the store, each held by one orchestrator.

The version of a claim's document is its epoch: it increases with each change of owner and is never reused. Claims are
written when taken, released or taken over; one heartbeat per orchestrator covers all its claims
(`locking.orchestrators`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.domain.events.coordination import ClaimAcquired, ClaimReleased
from orchestrator.domain.runs.statuses import ReleaseReason
from orchestrator.domain.scheduling.claims import (
    Claim,
    ClaimVerdict,
    OwnerStatus,
    can_claim,
    count_earlier_attempts,
    should_try,
)
from orchestrator.errors import CouncilError, LeaseLost, VersionConflict
from orchestrator.locking.orchestrators import RunMembership
from orchestrator.protocols import Commit, Document, Event, Guard, Key, Store, Write
from orchestrator.system.clock import Clock

CLAIM_KIND = "claim"

_log = logging.getLogger("orchestrator.claims")


def claim_key(run: str, task: str) -> Key:
    """Return the key of the claim on a task."""
    return Key(CLAIM_KIND, f"{run}/{task}")


@dataclass(frozen=True, slots=True)
class PlannedClaim:
    """A planned claim: the write for the commit, and the guard for later writes.

    The commit itself must be guarded by the orchestrator's record, so that a fenced orchestrator can't take claims.
    """

    write: Write
    guard: Guard
    claim: Claim
    is_takeover: bool = False
    """Whether another owner, now gone or overridden, had the claim."""


class Claims:
    """The claims of one orchestrator in its run; plan for a task one at a time."""

    def __init__(self, store: Store, clock: Clock, orchestrators: RunMembership) -> None:
        self._store, self._clock, self._others = store, clock, orchestrators
        self._held: dict[str, Guard] = {}
        self._claims: dict[str, Claim] = {}

    def __contains__(self, task: str) -> bool:
        """Return whether this orchestrator holds the claim on a task."""
        return task in self._held

    def __iter__(self) -> Iterator[str]:
        """Yield the tasks that this orchestrator has claimed."""
        return iter(list(self._held))

    def guard(self, task: str) -> Guard | None:
        """Return the guard that rejects commits once the claim is lost, or None."""
        return self._held.get(task)

    async def read(self, task: str) -> Claim | None:
        """Return the claim on a task of any owner, or None if missing or damaged."""
        return _read(await self._store.get(claim_key(self._others.run, task)))

    async def verdict(self, task: str, *, ignored_reason: str | None = None) -> ClaimVerdict:
        """Return whether a task may be claimed now."""
        try:
            _, claim, holder = await self._look(task)
        except CouncilError as error:
            _log.warning("claim check failed: run %s, task %s: %s", self._others.run, task, error)
            raise
        return should_try(claim, holder, self._others.timing, ignored_reason=ignored_reason)

    async def _look(self, task: str) -> tuple[int, Claim | None, OwnerStatus | None]:
        """Return the version of a claim, the claim itself, and its owner's status."""
        document = await self._store.get(claim_key(self._others.run, task))
        version, claim = 0 if document is None else document.version, _read(document)
        if claim is None or claim.released is not None:
            return version, claim, None
        if claim.owner.id == self._others.me.id and task not in self._held:
            # Our unconfirmed commit took it; nothing has been done under it.
            return version, claim.model_copy(update={"released": ReleaseReason.ABANDONED}), None
        return version, claim, await self._others.peers.read_liveness(claim.owner.id)

    async def plan(
        self, task: str, *, override: bool = False, is_requested: bool = False, retries: int | None = None
    ) -> PlannedClaim | None:
        """Return a plan to claim a task; None if another orchestrator has it.

        Call `mark_claimed` after the commit. If the owner is gone, this takes only this task and does not fence the
        owner as `sweep` does. With `override`, a leader takes the claim from a non-leader or, if a user asked for it
        (`is_requested`), any orchestrator takes it from any owner. `retries` replaces the retry count in the claim.
        """
        key = claim_key(self._others.run, task)
        version, before, holder = await self._look(task)
        if not can_claim(before, self._others.me, holder, override=override, is_requested=is_requested):
            assert before is not None, "a task without a claim is free"  # noqa: S101  (for the type checker)
            self._others.count(conflicts=1)
            _log.info("claim refused: run %s, task %s is %s's", self._others.run, task, before.owner.id)
            return None
        count = count_earlier_attempts(before) if retries is None else retries
        claim = Claim(owner=self._others.me, epoch=version + 1, since=self._clock.now(), retries=count)
        is_takeover = before is not None and before.released is None
        return PlannedClaim(
            Write(key, version, claim.model_dump(mode="json")), Guard(key, version + 1), claim, is_takeover=is_takeover
        )

    def mark_claimed(self, task: str, planned: PlannedClaim) -> None:
        """Record that a planned claim is committed."""
        known = self._held.get(task)
        if known is not None and known.epoch >= planned.guard.epoch:
            return
        self._held[task], self._claims[task] = planned.guard, planned.claim
        self._others.count(claims=1, retries=int(planned.claim.retries > 0), takeovers=int(planned.is_takeover))
        _log.info("claim taken: run %s, task %s, epoch %d", self._others.run, task, planned.guard.epoch)

    async def claim(self, task: str, *, override: bool = False, is_requested: bool = False) -> Guard | None:
        """Claim a task in a separate commit; later writes must carry the returned guard.

        Read the state of the task only afterwards, because it may have changed since the last read.
        """
        while True:
            planned = await self.plan(task, override=override, is_requested=is_requested)
            if planned is None:
                return None
            acquired = ClaimAcquired(
                run=self._others.run, task=task, owner=self._others.me.id, epoch=planned.claim.epoch
            )
            try:
                await self._store.commit(Commit([planned.write], [Event.of(acquired)], [self._others.guard]))
            except VersionConflict:
                continue
            except CouncilError as error:
                _log.warning("claim failed: run %s, task %s: %s", self._others.run, task, error)
                raise
            self.mark_claimed(task, planned)
            return planned.guard

    def release_write(
        self, task: str, how: ReleaseReason, reason: str | None, *, counts: bool = False, reset_retries: bool = False
    ) -> Write:
        """Return the write that releases our claim. Call `mark_released` after the commit.

        `counts` adds a failed attempt to the retry count, `reset_retries` sets the count to zero.
        """
        claim, guard = self._claims[task], self._held[task]
        changes = {
            "epoch": guard.epoch + 1,
            "released": how,
            "reason": reason,
            "retries": 0 if reset_retries else claim.retries + int(counts),
        }
        return Write(guard.key, guard.epoch, claim.model_copy(update=changes).model_dump(mode="json"))

    def mark_released(self, task: str) -> None:
        """Record that we no longer hold a claim."""
        self._held.pop(task, None)
        self._claims.pop(task, None)

    def mark_lost(self, task: str) -> None:
        """Record that a write was rejected because the claim has another owner."""
        self._others.count(refused=1)
        _log.warning("claim lost: run %s, task %s was taken over", self._others.run, task)
        self.mark_released(task)

    async def release(self, task: str, how: ReleaseReason, reason: str | None = None, *, counts: bool = False) -> None:
        """Release a claim in a separate commit. Raises LeaseLost if it has another owner.

        On other errors the claim is kept.
        """
        guard = self._held.get(task)
        if guard is None:
            claim = await self.read(task)
            raise LeaseLost(f"the claim on task {task!r}", 0, None if claim is None else claim.epoch)
        event = Event.of(ClaimReleased(run=self._others.run, task=task, release=how, reason=reason))
        try:
            await self._store.commit(Commit([self.release_write(task, how, reason, counts=counts)], [event], [guard]))
        except LeaseLost:
            if not await self._was_released(task, guard):
                self.mark_lost(task)
                raise
        except CouncilError as error:
            _log.warning("claim release failed: run %s, task %s: %s", self._others.run, task, error)
            raise
        _log.info("claim released: run %s, task %s as %s", self._others.run, task, how)
        self.mark_released(task)

    async def _was_released(self, task: str, guard: Guard) -> bool:
        """Return whether our unconfirmed commit has released the claim."""
        claim = await self.read(task)
        if claim is None or claim.released is None or claim.epoch != guard.epoch + 1:
            return False
        return claim.owner.id == self._others.me.id

    async def reset_retries(self, task: str) -> list[Write]:
        """Return the writes that reset the retry count of a task without an owner."""
        document = await self._store.get(claim_key(self._others.run, task))
        if document is None or document.damaged or not document.value["retries"]:
            return []
        value = {**document.value, "epoch": document.version + 1, "retries": 0}
        return [Write(document.key, document.version, value)]


async def read_claims(store: Store, run: str) -> dict[str, Claim]:
    """Return the readable claims of a run by task."""
    found = {one.key.id.partition("/")[2]: _read(one) for one in await store.list(CLAIM_KIND, f"{run}/")}
    return {task: claim for task, claim in found.items() if claim is not None}


def _read(document: Document | None) -> Claim | None:
    """Return a claim, or None if missing or damaged."""
    return None if document is None or document.damaged else Claim.model_validate_json(document.encoded)
