"""Claims on the tasks of a run: leases in the store, under each of which one orchestrator works.

The version of a claim's document is its epoch: it rises with each change of hands and never comes again. Claims are
written when they are taken, released or taken over; signs of life are given for all of an orchestrator's at once
(`locking.orchestrators`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.clock import Clock
from orchestrator.domain.claims import Claim, Release, Standing, Verdict, may_take, should_try
from orchestrator.errors import LeaseLost, VersionConflict
from orchestrator.failpoints import failpoint
from orchestrator.locking.orchestrators import Orchestrators
from orchestrator.protocols import Commit, Event, Guard, Key, Store, Write

_KIND = "claim"


def claim_key(run: str, task: str) -> Key:
    """Return the key of the claim on a task."""
    return Key(_KIND, f"{run}/{task}")


async def read_claims(store: Store, run: str) -> dict[str, Claim]:
    """Return the claims on a run's tasks, released ones too, by task."""
    found = await store.list(_KIND, f"{run}/")
    return {one.key.id.partition("/")[2]: Claim.model_validate(one.value) for one in found if not one.damaged}


@dataclass(frozen=True, slots=True)
class Taking:
    """A claim that is about to be taken: the write that a commit must have, and the guard of what follows it."""

    write: Write
    guard: Guard
    claim: Claim


@dataclass(frozen=True, slots=True)
class HeldBy:
    """A claim that can't be taken, and how its owner stands; None where that is not known."""

    claim: Claim
    standing: Standing | None


class Claims:
    """What one orchestrator has claimed of its run."""

    def __init__(self, store: Store, clock: Clock, orchestrators: Orchestrators) -> None:
        self._store, self._clock, self._others = store, clock, orchestrators
        self._held: dict[str, Guard] = {}
        self._claims: dict[str, Claim] = {}

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
        """Return the claim on a task, whoever has it."""
        found = await self._store.get(claim_key(self._others.run, task))
        return None if found is None else Claim.model_validate(found.value)

    async def verdict(self, task: str, *, ignored: str | None = None) -> Verdict:
        """Return whether a task should be tried now."""
        claim = await self.read(task)
        return should_try(claim, await self._holder(claim), self._others.timing, ignored=ignored)

    async def _holder(self, claim: Claim | None) -> Standing | None:
        if claim is None or claim.released is not None:
            return None
        return await self._others.standing_of(claim.owner.id)

    async def plan(self, task: str, *, override: bool = False, retries: int | None = None) -> Taking | HeldBy:
        """Return what it takes to claim a task, or who has it; `took` is to follow once that is committed.

        With `override` a coordinator takes it from one that is none. `retries` is the count to go on with, if not the
        one that the claim has.
        """
        key = claim_key(self._others.run, task)
        found = await self._store.get(key)
        before = None if found is None else Claim.model_validate(found.value)
        holder = await self._holder(before)
        if not may_take(before, self._others.me, holder, override=override):
            assert before is not None, "what nobody has is free"  # noqa: S101
            return HeldBy(before, holder)
        version = 0 if found is None else found.version
        count = retries if retries is not None else before.retries if before is not None else 0
        claim = Claim(owner=self._others.me, epoch=version + 1, since=self._clock.now(), retries=count)
        return Taking(Write(key, version, claim.model_dump(mode="json")), Guard(key, version + 1), claim)

    def took(self, task: str, taking: Taking) -> None:
        """A claim that was planned is committed."""
        self._held[task], self._claims[task] = taking.guard, taking.claim
        self._others.count(claims=1, retries=int(taking.claim.retries > 0))

    async def claim(self, task: str, *, override: bool = False) -> Guard | HeldBy:
        """Claim a task by itself; what is written about it from then on is to carry the guard."""
        while True:
            planned = await self.plan(task, override=override)
            if isinstance(planned, HeldBy):
                self._others.count(conflicts=1)
                return planned
            facts = {"run": self._others.run, "task": task, "owner": self._others.me.id, "epoch": planned.claim.epoch}
            try:
                await self._store.commit(Commit([planned.write], [Event("claim.taken", facts)], [self._others.guard]))
            except VersionConflict:
                continue
            self.took(task, planned)
            if override and planned.write.expected:
                self._others.count(takeovers=1)
            return planned.guard

    def ending(self, task: str, how: Release, reason: str | None, *, counts: bool = False) -> Write:
        """Return the write that releases a claim of ours; `released` is to follow once it is committed.

        `counts` says that the task was tried in vain.
        """
        claim, guard = self._claims[task], self._held[task]
        changes = {
            "epoch": guard.epoch + 1,
            "released": how,
            "reason": reason,
            "retries": claim.retries + int(counts),
        }
        return Write(guard.key, guard.epoch, claim.model_copy(update=changes).model_dump(mode="json"))

    def released(self, task: str) -> None:
        """A claim is not ours any more."""
        self._held.pop(task, None)
        self._claims.pop(task, None)

    async def release(self, task: str, how: Release, reason: str | None = None) -> None:
        """Release a claim by itself. LeaseLost where somebody else has it by now."""
        guard = self._held.get(task)
        if guard is None:
            raise LeaseLost(f"the claim on task {task!r}", 0, await self._epoch(task))
        facts = {"run": self._others.run, "task": task, "as": how, "reason": reason}
        event = Event("claim.released", facts)
        try:
            await self._store.commit(Commit([self.ending(task, how, reason)], [event], [guard]))
        finally:
            self.released(task)

    async def afresh(self, task: str) -> list[Write]:
        """Return what a commit must also write so that a task which is nobody's has all of its retries before it."""
        found = await self._store.get(claim_key(self._others.run, task))
        if found is None or not found.value["retries"]:
            return []
        return [Write(found.key, found.version, {**found.value, "epoch": found.version + 1, "retries": 0})]

    async def _epoch(self, task: str) -> int | None:
        claim = await self.read(task)
        return None if claim is None else claim.epoch

    async def sweep(self, *, counts: bool = True) -> Mapping[str, str]:
        """Take over all claims of orchestrators that are gone: they are ours then, each by the name of whose it was.

        `counts` says that each is a retry of its task, as it is unless a person has had the run gone on with.
        """
        gone = await self._others.gone()
        claims = await read_claims(self._store, self._others.run)
        left: dict[str, dict[str, Claim]] = {name: {} for name in gone}
        for task, claim in claims.items():
            if claim.released is None and task not in self._held:
                left.setdefault(claim.owner.id, {})[task] = claim
        taken: dict[str, str] = {}
        for name, theirs in left.items():
            # Who has ended may have claimed something after it was last looked at what it has.
            if name in gone or await self._others.standing_of(name) is Standing.ENDED:
                fence = [self._others.ending(*gone[name])] if name in gone else []
                taken |= dict.fromkeys(await self._take_over(name, theirs, fence, counts=counts), name)
        return taken

    async def _take_over(
        self, name: str, claims: Mapping[str, Claim], fence: Sequence[Write], *, counts: bool
    ) -> list[str]:
        takings = {task: self._taking(task, claim, counts=counts) for task, claim in claims.items()}
        tasks = sorted(takings)
        facts = {"run": self._others.run, "orchestrator": name, "count": len(tasks), "tasks": tasks}
        writes = [*fence, *(one.write for one in takings.values())]
        try:
            await self._store.commit(Commit(writes, [Event("claims.swept", facts)], [self._others.guard]))
        except VersionConflict:  # it lives after all, or somebody else was quicker
            return []
        failpoint("claims.swept")
        self._others.count(takeovers=len(tasks))
        for task in tasks:
            self.took(task, takings[task])
        return tasks

    def _taking(self, task: str, claim: Claim, *, counts: bool) -> Taking:
        key, epoch = claim_key(self._others.run, task), claim.epoch + 1
        changes = {"owner": self._others.me, "epoch": epoch, "since": self._clock.now()}
        after = claim.model_copy(update={**changes, "retries": claim.retries + int(counts)})
        return Taking(Write(key, claim.epoch, after.model_dump(mode="json")), Guard(key, epoch), after)
