"""The registry of ownership: which session may change which paths, on the store's contract alone.

For order, not for safety: it keeps sessions from working at the same paths, and what lands is looked at once more
(`on_out_of_scope`). A holding is a document; whoever takes anything also writes the turnstile of the scope, so that
of two who take at once one sees what the other has taken. Giving back needs no turnstile. What was left behind by a claim that
is over or taken over does not count once its session has ended, and goes with the next taking.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Final, NamedTuple

import anyio

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.deadlocks import LockWait, find_deadlock, merge_waits
from orchestrator.domain.scheduling.path_ownership import (
    OwnershipConflict,
    OwnershipWait,
    PathOwnership,
    check_ownership_limit,
    check_patterns,
    find_ownership_conflict,
    is_current,
)
from orchestrator.errors import LockUnavailable
from orchestrator.protocols import Commit, Document, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.state.documents.log_reader import follow_log
from orchestrator.state.documents.update import retry_on_conflict
from orchestrator.state.documents.validation import find_document_error
from orchestrator.system.clock import Clock

OWNERSHIP_KIND: Final = "ownership"
CLAIM_KIND: Final = "claim"

#: Returns whether anything of a session lives, as far as this machine can see.
LivenessCheck = Callable[[SessionName], Awaitable[bool]]

#: How often a taking is tried where others are faster: each time somebody gets something, so somebody is done.
_TRIES: Final = 50


def ownership_scope(repository: str, target: str) -> str:
    """Return the name of what is owned in: the paths of one target branch of the repository at one place."""
    return hashlib.sha256(f"{repository}\0{target}".encode(errors="surrogateescape")).hexdigest()[:16]


def claim_key(session: SessionName) -> Key:
    """Return the key of the claim that a session's holding is part of."""
    return Key(CLAIM_KIND, f"{session.run}/{session.task}")


class _RegistryState(NamedTuple):
    """What the registry holds, be it stale or not: documents' versions, and what they say."""

    scope_version: int
    """The version of the turnstile, which was read first: a commit fails if anything was taken since."""
    holdings: dict[SessionName, tuple[int, PathOwnership]]


class OwnershipRegistry:
    """Who owns what of one scope."""

    def __init__(self, store: Store, clock: Clock, scope: str, lives: LivenessCheck | None = None) -> None:
        """Ask `lives` whether a session that has lost its claim has yet to end: it owns its paths until then."""
        self._store, self._clock, self.scope, self._lives = store, clock, scope, lives
        self._scope_key = Key(OWNERSHIP_KIND, scope)
        self._known: dict[Key, tuple[int, PathOwnership]] = {}

    def key(self, session: SessionName) -> Key:
        """Return the key of what a session holds."""
        return Key(OWNERSHIP_KIND, f"{self.scope}/{session}")

    async def plan(
        self, session: SessionName, patterns: Sequence[str], *, orchestrator: str, claim: Guard, is_lock: bool = False
    ) -> Sequence[Write] | OwnershipConflict:
        """Return what a commit must also write to have the session own patterns, or who stands in the way.

        With `is_lock` the session asks for it itself: `locked_by_others` tells who would land there.

        `claim` names the claim's epoch, which that commit itself may write. It fails with a VersionConflict if anybody
        takes anything of the scope in between: plan anew then. RefusedError for what is no pattern.
        """
        wanted = check_patterns(patterns)
        if not wanted:
            return []
        found = await self._read()
        over: list[PathOwnership] = []
        live: list[PathOwnership] = []
        for _, one in found.holdings.values():
            # Attempts of a task follow each other: what an earlier one left is over with the next.
            if one.session[:2] == session[:2]:
                over += [one] if one.session != session else []
            elif one.has_conflict_with(session, wanted):
                (live if await self._counts(one) else over).append(one)
        held = find_ownership_conflict(session, wanted, live)
        if held is not None:
            return held
        version, holding = found.holdings.get(session, (0, None))
        if holding is None or holding.epoch != claim.epoch:
            holding = self._blank(session, orchestrator, claim)
        taken = holding.with_patterns(wanted, self._clock.now(), is_lock=is_lock).with_waiting(None)
        return [
            Write(self._scope_key, found.scope_version, {"since": self._clock.now()}),
            Write(self.key(session), version, taken.to_json()),
            *(Write(self.key(one.session), found.holdings[one.session][0], None) for one in over),
        ]

    async def take(
        self,
        session: SessionName,
        patterns: Sequence[str],
        *,
        orchestrator: str,
        claim: Guard,
        is_lock: bool = False,
        wait: float = 0.0,
        also: Callable[[], Awaitable[Mapping[str, LockWait]]] | None = None,
    ) -> OwnershipConflict | None:
        """Have a session own more patterns, all or none; return who stood in the way, None if it owns them now.

        `wait` is for how many seconds it is waited for whoever holds them, recorded for all to see. Raises LeaseLost if
        the claim is not the session's any more, RefusedError for what is no pattern and for too many. LockRefused is
        raised at once where sessions wait for each other in a circle, of which this one began to wait last; `also`
        returns what they wait for besides paths of this scope. A cancelled wait takes nothing.
        """
        own = await self._own(session)
        check_ownership_limit(() if own is None else own[1].patterns, patterns)
        position = await self._store.position()
        held = await self._take(session, patterns, orchestrator, claim, is_lock=is_lock)
        if held is None:
            return None
        facts = {"patterns": list(patterns), "holder": str(held.holder), "held": held.pattern}
        await self._commit([], _event("ownership.refused", session, **facts), claim)
        if wait <= 0:
            return held
        until = self._clock.monotonic() + wait
        await self.waits(session, patterns, orchestrator=orchestrator, claim=claim)
        try:
            while held is not None and self._clock.monotonic() < until:
                known = merge_waits(await self.list_waits(), {} if also is None else await also())
                circle = find_deadlock(str(session), known)
                if circle is not None:
                    what = ", ".join(patterns)
                    why = f"waiting for it would never end: {circle}"
                    raise LockUnavailable(what, why, "unlock something, and ask again")
                await self._change(position, until)
                position = await self._store.position()
                held = await self._take(session, patterns, orchestrator, claim, is_lock=is_lock)
        finally:
            with anyio.CancelScope(shield=True):
                await self.stop_waiting(session)
        return held

    async def plan_transfer(self, claims: Sequence[Guard], orchestrator: str) -> Sequence[Write]:
        """Return what the commit that takes over claims must also write, so that their sessions own what they owned.

        A session may outlive its process: nobody else may have its paths before it is proven dead. `claims` have the
        new epochs.
        """
        epochs = {claim.key: claim.epoch for claim in claims}
        found = (await self._read()).holdings.values()
        theirs = [(*one, epochs.get(claim_key(one[1].session), 0)) for one in found]
        return [
            Write(self.key(one.session), version, replace(one, orchestrator=orchestrator, epoch=epoch).to_json())
            for version, one, epoch in theirs
            if one.epoch == epoch - 1
        ]

    async def inherit(self, session: SessionName, *, orchestrator: str, claim: Guard) -> None:
        """Have a session of a process that is gone own what it owned, under the claim of who goes on with its task.

        Nothing of that where somebody else has taken any of it meanwhile.
        """
        last = await self._last(session)  # also where it was swept meanwhile, as nobody's
        if last is not None and last.epoch != claim.epoch and last.patterns:
            held = await self._take(session, last.patterns, orchestrator, claim)
            if held is None and last.locked:
                await self._take(session, last.locked, orchestrator, claim, is_lock=True)

    async def give_back(self, session: SessionName, patterns: Sequence[str], claim: Guard) -> Sequence[str]:
        """Have a session own patterns no more, as it took them; return those that it did own."""

        async def attempt() -> Sequence[str]:
            found = await self._own(session)
            if found is None:
                return []
            version, holding = found
            given = [one for one in check_patterns(patterns) if one in holding.taken]
            if given:
                write = Write(self.key(session), version, holding.without(given).to_json())
                event = _event("ownership.released", session, patterns=given)
                await self._commit([write], event, claim)
            return given

        return await retry_on_conflict(attempt, _TRIES)

    async def release(self, session: SessionName) -> Sequence[Write]:
        """Return what the commit that ends a session must also write, so that it holds and waits for nothing."""
        found = await self._store.get(self.key(session))
        return [] if found is None else [Write(found.key, found.version, None)]

    async def locked_by_others(self, session: SessionName) -> Sequence[PathOwnership]:
        """Return what sessions of other tasks have locked, the oldest first; all of it counts."""
        found = [one for _, one in (await self._read()).holdings.values()]
        others = [one for one in found if one.locked and one.session[:2] != session[:2]]
        return sorted([one for one in others if await self._counts(one)], key=lambda one: one.since)

    async def holdings(self) -> Sequence[PathOwnership]:
        """Return what counts of the scope: who owns and waits for what, the oldest first."""
        live = [one for one in await self._live() if not one.is_idle]
        return sorted(live, key=lambda one: (one.since, one.session))

    async def list_waits(self) -> dict[str, LockWait]:
        """Return which sessions of the scope wait for paths, and for whom."""
        live = await self._live()
        return {
            str(one.session): LockWait(
                one.waiting.since,
                ", ".join(one.waiting.patterns),
                {
                    str(other.session)
                    for other in live
                    if other.session != one.session and other.has_conflict_with(one.session, one.waiting.patterns)
                },
            )
            for one in live
            if one.waiting is not None
        }

    async def sweep(self) -> Sequence[Write]:
        """Return what a commit must write to be rid of all that claims which are over have left."""
        found = await self._read()
        stale = [one for _, one in found.holdings.values() if not await self._counts(one)]
        return [Write(self.key(one.session), found.holdings[one.session][0], None) for one in stale]

    async def extend(self, session: SessionName, patterns: Sequence[str]) -> OwnershipConflict | None:
        """Have a session own more patterns after its end, unless somebody else does: who does is returned.

        Without a claim on its task nothing is recorded as owned.
        """
        claim = _value(await self._store.get(key := claim_key(session)))
        if claim is None or claim.get("released") is not None:
            return find_ownership_conflict(session, check_patterns(patterns), await self._live())
        own = await self._own(session)
        orchestrator = "" if own is None else own[1].orchestrator
        return await self.take(session, patterns, orchestrator=orchestrator, claim=Guard(key, claim["epoch"]))

    async def owner(self, session: SessionName, path_pattern: str) -> OwnershipConflict | None:
        """Return who else owns what a pattern names; None where nobody does."""
        return find_ownership_conflict(session, [path_pattern], await self._live())

    async def waits(self, session: SessionName, patterns: Sequence[str], *, orchestrator: str, claim: Guard) -> None:
        """Record that a session waits for patterns from now on."""
        waiting = OwnershipWait(tuple(check_patterns(patterns)), self._clock.now())

        async def attempt() -> None:
            found = await self._own(session)
            version, holding = found or (0, self._blank(session, orchestrator, claim))
            write = Write(self.key(session), version, holding.with_waiting(waiting).to_json())
            event = _event("ownership.waiting", session, patterns=list(waiting.patterns))
            await self._commit([write], event, claim)

        await retry_on_conflict(attempt, _TRIES)

    async def stop_waiting(self, session: SessionName) -> None:
        """Record that a session waits for nothing any more, if it did."""

        async def attempt() -> None:
            found = await self._own(session)
            if found is None or found[1].waiting is None:
                return
            version, holding = found[0], found[1].with_waiting(None)
            value = None if holding.is_idle else holding.to_json()
            await self._store.commit(Commit([Write(self.key(session), version, value)], durable=False))

        await retry_on_conflict(attempt, _TRIES)

    async def _take(
        self, session: SessionName, patterns: Sequence[str], orchestrator: str, claim: Guard, *, is_lock: bool = False
    ) -> OwnershipConflict | None:
        async def attempt() -> OwnershipConflict | None:
            planned = await self.plan(session, patterns, orchestrator=orchestrator, claim=claim, is_lock=is_lock)
            if isinstance(planned, OwnershipConflict):
                return planned
            if planned:
                event = _event("ownership.taken", session, patterns=list(patterns))
                await self._commit(planned, event, claim)
            return None

        return await retry_on_conflict(attempt, _TRIES)

    def _blank(self, session: SessionName, orchestrator: str, claim: Guard) -> PathOwnership:
        return PathOwnership(session, (), self._clock.now(), orchestrator, claim.epoch)

    async def _commit(self, writes: Sequence[Write], event: Event, claim: Guard) -> None:
        # What sessions own counts while they live: the end of the machine's power is theirs, too.
        await self._store.commit(Commit(writes, [event], [claim], durable=False))

    async def _last(self, session: SessionName) -> PathOwnership | None:
        """Return what was recorded of a session last, whether or not it is over."""
        for version in await self._store.history(self.key(session)):
            if version.value is not None:
                return PathOwnership.from_json(version.value)
        return None

    async def _own(self, session: SessionName) -> tuple[int, PathOwnership] | None:
        found = await self._store.get(self.key(session))
        return None if found is None else (found.version, PathOwnership.from_json(found.value))

    async def _read(self) -> _RegistryState:
        turnstile = await self._store.get(self._scope_key)
        documents = await self._store.list(OWNERSHIP_KIND, f"{self.scope}/")
        known, self._known = self._known, {}
        for document in documents:
            before = known.get(document.key)
            if before is None or before[0] != document.version:
                if find_document_error(document) is not None:
                    continue
                before = document.version, PathOwnership.from_json(document.value)
            self._known[document.key] = before
        holdings = {holding.session: (version, holding) for version, holding in self._known.values()}
        return _RegistryState(turnstile.version if turnstile else 0, holdings)

    async def _counts(self, holding: PathOwnership) -> bool:
        # A claim that is not the holding's now was not any more when the holding was read, or has ended since: epochs
        # never come back.
        if is_current(holding, _value(await self._store.get(claim_key(holding.session)))):
            return True
        return self._lives is not None and await self._lives(holding.session)

    async def _live(self) -> list[PathOwnership]:
        found = await self._read()
        return [one for _, one in found.holdings.values() if await self._counts(one)]

    async def _change(self, position: int, until: float) -> None:
        """Wait until something of what decides who owns what has changed since a position, or the time has come."""
        changed = anyio.Event()

        async def look() -> None:
            async with aclosing(follow_log(self._store, position)) as records:
                async for record in records:
                    if any(key.kind in {OWNERSHIP_KIND, CLAIM_KIND} for key in record.documents):
                        break
            changed.set()

        async with anyio.create_task_group() as group:
            group.start_soon(look)
            await self._clock.wait(changed, None if math.isinf(until) else until)
            group.cancel_scope.cancel()


def _value(document: Document | None) -> JsonObject | None:
    return None if document is None else document.value


def _event(type_: str, session: SessionName, **facts: object) -> Event:
    return Event(type_, {**session._asdict(), **facts})
