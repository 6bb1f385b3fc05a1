"""Claims on the tasks of a run: leases in the store, under each of which one orchestrator works.

The version of a claim's document is its epoch: it rises with each change of hands and never comes again. Claims are
written when they are taken, released or taken over; signs of life are given for all of an orchestrator's at once
(`locking.orchestrators`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.domain.scheduling.claims import (
    Claim,
    ClaimVerdict,
    OwnerStatus,
    ReleaseReason,
    can_claim,
    count_earlier_tries,
    should_try,
)
from orchestrator.errors import CouncilError, LeaseLost, VersionConflict
from orchestrator.locking.orchestrators import RunMembership
from orchestrator.protocols import Commit, Document, Event, Guard, Key, Store, Write
from orchestrator.state.documents.validation import filter_readable
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

_KIND = "claim"

#: Returns what a takeover must also write, by the guards of the claims and the name of who takes them.
TakeoverWrites = Callable[[Sequence[Guard], str], Awaitable[Sequence[Write]]]

_log = logging.getLogger("orchestrator.claims")


def claim_key(run: str, task: str) -> Key:
    """Return the key of the claim on a task."""
    return Key(_KIND, f"{run}/{task}")


async def read_claims(store: Store, run: str) -> dict[str, Claim]:
    """Return the claims on a run's tasks, released ones too, by task."""
    found = await store.list(_KIND, f"{run}/")
    return {one.key.id.partition("/")[2]: Claim.model_validate_json(one.encoded) for one in filter_readable(found)}


@dataclass(frozen=True, slots=True)
class PlannedClaim:
    """A claim that is about to be taken: the write that a commit must have, and the guard of what follows it.

    That commit itself is guarded by the orchestrator's own record, so that none is taken by one that is over.
    """

    write: Write
    guard: Guard
    claim: Claim
    is_takeover: bool = False
    """Whether somebody else has it, who is gone or is overridden."""


@dataclass(frozen=True, slots=True)
class ClaimHolder:
    """A claim that can't be taken, and how its owner stands; None where that is not known."""

    claim: Claim
    standing: OwnerStatus | None


class Claims:
    """What one orchestrator has claimed of its run. Its tasks plan for the same task of the run one at a time."""

    def __init__(self, store: Store, clock: Clock, orchestrators: RunMembership) -> None:
        self._store, self._clock, self._others = store, clock, orchestrators
        self._held: dict[str, Guard] = {}
        self._claims: dict[str, Claim] = {}
        self._owners: dict[str, tuple[int, str | None]] = {}
        """By task: the version of a claim, and whose it was in that, or that it was released."""
        self._unrecorded: dict[str, int] = {}
        """Claims that were ours at the last sweep without our knowing of them, and their versions."""

    def __contains__(self, task: str) -> bool:
        """Whether a task is claimed by this orchestrator."""
        return task in self._held

    def __iter__(self) -> Iterator[str]:
        """Yield the tasks that are claimed by this orchestrator."""
        return iter(list(self._held))

    def guard(self, task: str) -> Guard | None:
        """Return what makes a commit refused once somebody else has the claim; None where it is not ours."""
        return self._held.get(task)

    async def read(self, task: str) -> Claim | None:
        """Return the claim on a task, whoever has it; None where there is none that can be read."""
        return _read(await self._store.get(claim_key(self._others.run, task)))

    async def verdict(self, task: str, *, ignored: str | None = None) -> ClaimVerdict:
        """Return whether a task should be tried now."""
        try:
            _, claim, holder = await self._look(task)
        except CouncilError as error:
            _log.warning("claim check failed: run %s, task %s: %s", self._others.run, task, error)
            raise
        return should_try(claim, holder, self._others.timing, ignored=ignored)

    async def _look(self, task: str) -> tuple[int, Claim | None, OwnerStatus | None]:
        """Return the version of a claim, the claim, and how its owner stands."""
        document = await self._store.get(claim_key(self._others.run, task))
        version, claim = 0 if document is None else document.version, _read(document)
        if claim is None or claim.released is not None:
            return version, claim, None
        if claim.owner.id == self._others.me.id and task not in self._held:
            # It was committed, and we never learned of that: nothing has been done under it.
            return version, claim.model_copy(update={"released": ReleaseReason.ABANDONED}), None
        return version, claim, await self._others.read_liveness(claim.owner.id)

    async def plan(
        self, task: str, *, override: bool = False, is_asked: bool = False, retries: int | None = None
    ) -> PlannedClaim | ClaimHolder:
        """Return what it takes to claim a task, or who has it; `took` is to follow once that is committed.

        From one that is gone this takes the one task, and does not say of it that it is over, as `sweep` does.
        With `override` a leader takes it from one that is none, where a person wants that (`is_asked`) anybody
        from whoever has it. `retries` is the count to go on with, if not the one that follows from the claim.
        """
        key = claim_key(self._others.run, task)
        version, before, holder = await self._look(task)
        if not can_claim(before, self._others.me, holder, override=override, is_asked=is_asked):
            assert before is not None, "what nobody has is free"
            self._others.count(conflicts=1)
            _log.info("claim refused: run %s, task %s is %s's", self._others.run, task, before.owner.id)
            return ClaimHolder(before, holder)
        count = count_earlier_tries(before) if retries is None else retries
        claim = Claim(owner=self._others.me, epoch=version + 1, since=self._clock.now(), retries=count)
        is_takeover = before is not None and before.released is None
        return PlannedClaim(
            Write(key, version, claim.model_dump(mode="json")), Guard(key, version + 1), claim, is_takeover=is_takeover
        )

    def mark_claimed(self, task: str, taking: PlannedClaim) -> None:
        """A claim that was planned is committed."""
        known = self._held.get(task)
        if known is not None and known.epoch >= taking.guard.epoch:
            return
        self._held[task], self._claims[task] = taking.guard, taking.claim
        self._others.count(claims=1, retries=int(taking.claim.retries > 0), takeovers=int(taking.is_takeover))
        _log.info("claim taken: run %s, task %s, epoch %d", self._others.run, task, taking.guard.epoch)

    async def claim(self, task: str, *, override: bool = False, is_asked: bool = False) -> Guard | ClaimHolder:
        """Claim a task by itself; what is written about it from then on is to carry the guard.

        Whether anything is left to do is to be read only then: it may have been done since it was last looked at.
        """
        while True:
            planned = await self.plan(task, override=override, is_asked=is_asked)
            if isinstance(planned, ClaimHolder):
                return planned
            facts = {"run": self._others.run, "task": task, "owner": self._others.me.id, "epoch": planned.claim.epoch}
            try:
                await self._store.commit(
                    Commit([planned.write], [Event("claim.acquired", facts)], [self._others.guard])
                )
            except VersionConflict:
                continue
            except CouncilError as error:
                _log.warning("claim failed: run %s, task %s: %s", self._others.run, task, error)
                raise
            self.mark_claimed(task, planned)
            return planned.guard

    def ending(
        self, task: str, how: ReleaseReason, reason: str | None, *, counts: bool = False, afresh: bool = False
    ) -> Write:
        """Return the write that releases a claim of ours; `released` is to follow once it is committed.

        `counts` says that the task was tried in vain, `afresh` that its tries before this do not count any more.
        """
        claim, guard = self._claims[task], self._held[task]
        changes = {
            "epoch": guard.epoch + 1,
            "released": how,
            "reason": reason,
            "retries": 0 if afresh else claim.retries + int(counts),
        }
        return Write(guard.key, guard.epoch, claim.model_copy(update=changes).model_dump(mode="json"))

    def released(self, task: str) -> None:
        """A claim is not ours any more."""
        self._held.pop(task, None)
        self._claims.pop(task, None)

    def lost(self, task: str) -> None:
        """A write under a claim of ours was refused: somebody else has it by now."""
        self._others.count(refused=1)
        _log.warning("claim lost: run %s, task %s was taken over", self._others.run, task)
        self.released(task)

    async def release(self, task: str, how: ReleaseReason, reason: str | None = None, *, counts: bool = False) -> None:
        """Release a claim by itself. LeaseLost where somebody else has it by now; with any other error it is kept."""
        guard = self._held.get(task)
        if guard is None:
            raise LeaseLost(f"the claim on task {task!r}", 0, await self._epoch(task))
        facts = {"run": self._others.run, "task": task, "as": how, "reason": reason}
        event = Event("claim.released", facts)
        try:
            await self._store.commit(Commit([self.ending(task, how, reason, counts=counts)], [event], [guard]))
        except LeaseLost:
            if not await self._was_released(task, guard):
                self.lost(task)
                raise
        except CouncilError as error:
            _log.warning("claim release failed: run %s, task %s: %s", self._others.run, task, error)
            raise
        _log.info("claim released: run %s, task %s as %s", self._others.run, task, how)
        self.released(task)

    async def _was_released(self, task: str, guard: Guard) -> bool:
        """Whether a commit of ours that we never learned of has released the claim."""
        claim = await self.read(task)
        if claim is None or claim.released is None or claim.epoch != guard.epoch + 1:
            return False
        return claim.owner.id == self._others.me.id

    async def afresh(self, task: str) -> list[Write]:
        """Return what a commit must also write so that a task which is nobody's has all of its retries before it."""
        found = await self._store.get(claim_key(self._others.run, task))
        if found is None or found.damaged or not found.value["retries"]:
            return []
        return [Write(found.key, found.version, {**found.value, "epoch": found.version + 1, "retries": 0})]

    async def _epoch(self, task: str) -> int | None:
        claim = await self.read(task)
        return None if claim is None else claim.epoch

    async def sweep(self, *, counts: bool = True, also: TakeoverWrites | None = None) -> Mapping[str, str]:
        """Take over all claims of orchestrators that are gone: they are ours then, each by the name of whose it was.

        `also` returns what else is written with the claims, by their guards and our name. `counts` says that each is a
        retry of its task, as it is unless a person has had the run gone on with. By our own name come those that we
        have had since the last sweep, or longer, without ever having learned of it.
        """
        gone = await self._others.gone()
        left: dict[str, dict[str, Document]] = {name: {} for name in gone}
        for task, owner, document in await self._unreleased():
            if task not in self._held:
                left.setdefault(owner, {})[task] = document
        ours = left.pop(self._others.me.id, {})
        taken: dict[str, str] = {}
        for name, theirs in left.items():
            # Who has ended may have claimed something after it was last looked at what it has.
            if name in gone or await self._others.read_liveness(name) is OwnerStatus.ENDED:
                fence = [self._others.ending(*gone[name])] if name in gone else []
                why = self._others.describe_loss(*gone[name][1:]) if name in gone else "it left the run"
                taken |= dict.fromkeys(await self._take_over(name, why, theirs, fence, also, counts=counts), name)
        strays = {task: document for task, document in ours.items() if self._unrecorded.get(task) == document.version}
        self._unrecorded = {task: document.version for task, document in ours.items()}
        if strays:
            name = self._others.me.id
            why = "its claims were not recorded here"
            taken |= dict.fromkeys(await self._take_over(name, why, strays, (), also, counts=False), name)
        return taken

    async def _unreleased(self) -> list[tuple[str, str, Document]]:
        """Return tasks that are claimed, by whom, and the claims."""
        found: list[tuple[str, str, Document]] = []
        for document in await self._store.list(_KIND, f"{self._others.run}/"):
            if document.damaged:  # nobody's writes are accepted under it
                continue
            task = document.key.id.partition("/")[2]
            version, owner = self._owners.get(task, (0, None))
            if version != document.version:  # of thousands, few have changed since the last look
                claim = document.value
                owner = claim["owner"]["id"] if claim["released"] is None else None
                self._owners[task] = document.version, owner
            if owner is not None:
                found.append((task, owner, document))
        return found

    async def _take_over(
        self,
        name: str,
        why: str,
        claims: Mapping[str, Document],
        fence: Sequence[Write],
        also: TakeoverWrites | None,
        *,
        counts: bool,
    ) -> list[str]:
        is_takeover = name != self._others.me.id
        takings = {
            task: self._plan_takeover(document, counts=counts, is_takeover=is_takeover)
            for task, document in claims.items()
        }
        tasks = sorted(takings)
        facts = {"run": self._others.run, "orchestrator": name, "reason": why, "count": len(tasks), "tasks": tasks}
        writes = [*fence, *(one.write for one in takings.values())]
        if also is not None:
            writes += await also([one.guard for one in takings.values()], self._others.me.id)
        try:
            await self._store.commit(Commit(writes, [Event("claims.taken_over", facts)], [self._others.guard]))
        except VersionConflict:  # it lives after all, or somebody else was quicker
            return []
        except CouncilError as error:
            _log.warning("claim sweep failed: run %s, %d of %s: %s", self._others.run, len(tasks), name, error)
            raise
        failpoint("claims.taken_over")
        for task in tasks:
            self.mark_claimed(task, takings[task])
        _log.info("claims swept: run %s, %d of %s: %s", self._others.run, len(tasks), name, ", ".join(tasks) or "none")
        return tasks

    def _plan_takeover(self, document: Document, *, counts: bool, is_takeover: bool) -> PlannedClaim:
        claim, epoch = Claim.model_validate_json(document.encoded), document.version + 1
        changes = {"owner": self._others.me, "epoch": epoch, "since": self._clock.now()}
        after = claim.model_copy(update={**changes, "retries": claim.retries + int(counts)})
        write = Write(document.key, document.version, after.model_dump(mode="json"))
        return PlannedClaim(write, Guard(document.key, epoch), after, is_takeover=is_takeover)


def _read(document: Document | None) -> Claim | None:
    """Return a claim; None where there is none, or nobody knows what it is by now."""
    return None if document is None or document.damaged else Claim.model_validate_json(document.encoded)
