"""Take over the claims of orchestrators that are gone."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from orchestrator.domain.events.coordination import ClaimsTakenOver
from orchestrator.domain.scheduling.claims import Claim, OwnerStatus, describe_loss
from orchestrator.errors import CouncilError, VersionConflict
from orchestrator.locking.claims import CLAIM_KIND, Claims, PlannedClaim
from orchestrator.locking.orchestrators import RunMembership
from orchestrator.protocols import Commit, Document, Event, Guard, Store, Write
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: Returns additional writes for a takeover, given the guards of the claims and the new owner's name.
TakeoverWrites = Callable[[Sequence[Guard], str], Awaitable[Sequence[Write]]]

_log = logging.getLogger("orchestrator.claims")


class ClaimTakeovers:
    """Finds claims that have lost their owner, and adds them to an orchestrator's."""

    def __init__(self, store: Store, clock: Clock, orchestrators: RunMembership, claims: Claims) -> None:
        self._store, self._clock, self._others, self._claims = store, clock, orchestrators, claims
        self._owners: dict[str, tuple[int, str | None]] = {}
        """The version of each claim and its owner in that version (None if released), keyed by task."""
        self._unrecorded: dict[str, int] = {}
        """Claims that had us as owner at the last sweep but are not ours, with their versions."""

    async def sweep(self, *, counts: bool = True, also: TakeoverWrites | None = None) -> Mapping[str, str]:
        """Take over the claims of orchestrators that are gone; return owners by task.

        `also` returns additional writes, given the guards and our name. `counts` counts each claim as a retry of its
        task, which is right unless a user resumed the run. Claims that have had us as owner since the last sweep
        without our knowledge are taken over from ourselves.
        """
        self._others.count(sweeps=1)
        gone = await self._others.peers.find_gone()
        left: dict[str, dict[str, Document]] = {name: {} for name in gone}
        for task, owner, document in await self._unreleased():
            if task not in self._claims:
                left.setdefault(owner, {})[task] = document
        ours = left.pop(self._others.me.id, {})
        taken: dict[str, str] = {}
        for name, theirs in left.items():
            # An orchestrator that has ended may have taken claims after the previous sweep.
            if name in gone or await self._others.peers.read_liveness(name) is OwnerStatus.ENDED:
                fence = [self._others.fence_write(*gone[name])] if name in gone else []
                reason = describe_loss(*gone[name][1:], self._clock.now()) if name in gone else "it left the run"
                taken |= dict.fromkeys(await self._take_over(name, reason, theirs, fence, also, counts=counts), name)
        strays = {task: document for task, document in ours.items() if self._unrecorded.get(task) == document.version}
        self._unrecorded = {task: document.version for task, document in ours.items()}
        if strays:
            name = self._others.me.id
            reason = "its claims were not recorded by this process"
            taken |= dict.fromkeys(await self._take_over(name, reason, strays, (), also, counts=False), name)
        return taken

    async def _unreleased(self) -> list[tuple[str, str, Document]]:
        """Return the claimed tasks, each with its owner and its claim."""
        claims: list[tuple[str, str, Document]] = []
        for document in await self._store.list(CLAIM_KIND, f"{self._others.run}/"):
            if document.damaged:  # no writes are accepted under it
                continue
            task = document.key.id.partition("/")[2]
            version, owner = self._owners.get(task, (0, None))
            if version != document.version:  # of thousands of claims, few change between sweeps
                claim = document.value
                owner = claim["owner"]["id"] if claim["released"] is None else None
                self._owners[task] = document.version, owner
            if owner is not None:
                claims.append((task, owner, document))
        return claims

    async def _take_over(
        self,
        name: str,
        reason: str,
        claims: Mapping[str, Document],
        fence: Sequence[Write],
        also: TakeoverWrites | None,
        *,
        counts: bool,
    ) -> list[str]:
        is_takeover = name != self._others.me.id
        plans = {
            task: self._plan_takeover(document, counts=counts, is_takeover=is_takeover)
            for task, document in claims.items()
        }
        tasks = sorted(plans)
        event = ClaimsTakenOver(run=self._others.run, orchestrator=name, reason=reason, count=len(tasks), tasks=tasks)
        writes = [*fence, *(planned.write for planned in plans.values())]
        if also is not None:
            writes += await also([planned.guard for planned in plans.values()], self._others.me.id)
        try:
            await self._store.commit(Commit(writes, [Event.of(event)], [self._others.guard]))
        except VersionConflict:  # the owner is alive, or another orchestrator was faster
            return []
        except CouncilError as error:
            _log.warning("claim takeover failed: run %s, %d of %s: %s", self._others.run, len(tasks), name, error)
            raise
        failpoint("claims.taken_over")
        for task in tasks:
            self._claims.mark_claimed(task, plans[task])
        _log.info(
            "claims taken over: run %s, %d of %s: %s", self._others.run, len(tasks), name, ", ".join(tasks) or "none"
        )
        return tasks

    def _plan_takeover(self, document: Document, *, counts: bool, is_takeover: bool) -> PlannedClaim:
        claim, epoch = Claim.model_validate_json(document.encoded), document.version + 1
        changes = {"owner": self._others.me, "epoch": epoch, "since": self._clock.now()}
        after = claim.model_copy(update={**changes, "retries": claim.retries + int(counts)})
        write = Write(document.key, document.version, after.model_dump(mode="json"))
        return PlannedClaim(write, Guard(document.key, epoch), after, is_takeover=is_takeover)
