"""The registry of ownership: which session may change which paths, on the store's contract alone.

For order, not for safety: it keeps sessions from working at the same paths, and what lands is looked at once more
(`on_escape`). A holding is a document; whoever takes anything also writes the turnstile of the scope, so that of two
who take at once one sees what the other has taken. Giving back needs no turnstile. What was left behind by a claim that
is over or taken over does not count, and goes with the next taking.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import aclosing
from typing import Final, NamedTuple

import anyio

from orchestrator.clock import Clock
from orchestrator.domain.holdings import HeldBy, Holding, Waiting, checked, counts, in_the_way
from orchestrator.domain.sessions import SessionName
from orchestrator.protocols import Commit, Document, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.state.reading import following
from orchestrator.state.update import retried

KIND: Final = "ownership"
CLAIM: Final = "claim"

#: How often a taking is tried where others are faster: each time somebody gets something, so somebody is done.
_TRIES: Final = 50


def scope_of(repository: str, target: str) -> str:
    """Return the name of what is owned in: the paths of one target branch of the repository at one place."""
    return hashlib.sha256(f"{repository}\0{target}".encode(errors="surrogateescape")).hexdigest()[:16]


def claim_key(session: SessionName) -> Key:
    """Return the key of the claim that a session's holding is part of."""
    return Key(CLAIM, f"{session.run}/{session.task}")


class _Known(NamedTuple):
    """The registry as it was read, the turnstile's version first: a commit fails if anything was taken since."""

    turnstile: int
    live: dict[SessionName, tuple[int, Holding]]
    """What counts, with the versions of its documents."""
    stale: dict[Key, int]
    """Documents that nothing stands behind any more, with their versions."""


class Registry:
    """Who owns what of one scope."""

    def __init__(self, store: Store, clock: Clock, scope: str) -> None:
        self._store, self._clock, self.scope = store, clock, scope
        self._turnstile = Key(KIND, scope)

    def key(self, session: SessionName) -> Key:
        """Return the key of what a session holds."""
        return Key(KIND, f"{self.scope}/{session}")

    async def plan(
        self, session: SessionName, patterns: Sequence[str], *, orchestrator: str, claim: Guard
    ) -> Sequence[Write] | HeldBy:
        """Return what a commit must also write to have the session own patterns, or who stands in the way.

        `claim` names the claim's epoch, which that commit itself may write. It fails with a VersionConflict if anybody
        takes anything of the scope in between: plan anew then. RefusedError for what is no pattern.
        """
        wanted = checked(patterns)
        if not wanted:
            return []
        known = await self._read()
        held = in_the_way(session, wanted, (one for _, one in known.live.values()))
        return held or self._taking(session, wanted, orchestrator, claim, known)

    async def take(
        self,
        session: SessionName,
        patterns: Sequence[str],
        *,
        orchestrator: str,
        claim: Guard,
        wait: float = 0.0,
    ) -> HeldBy | None:
        """Have a session own more patterns, all or none; return who stood in the way, None if it owns them now.

        `wait` is for how many seconds it is waited for whoever holds them, recorded for all to see. Raises LeaseLost if
        the claim is not the session's any more, RefusedError for what is no pattern. A cancelled wait takes nothing.
        """
        position = await self._store.position()
        held = await self._take(session, patterns, orchestrator, claim)
        if held is None:
            return None
        facts = {"patterns": list(patterns), "holder": str(held.holder), "held": held.pattern}
        await self._store.commit(Commit([], [_event("ownership.refused", session, **facts)], [claim]))
        if wait <= 0:
            return held
        until = self._clock.monotonic() + wait
        await self.waits(session, patterns, orchestrator=orchestrator, claim=claim)
        try:
            while held is not None and self._clock.monotonic() < until:
                await self._change(position, until)
                position = await self._store.position()
                held = await self._take(session, patterns, orchestrator, claim)
        finally:
            with anyio.CancelScope(shield=True):
                await self.stops_waiting(session)
        return held

    async def give_back(self, session: SessionName, patterns: Sequence[str], claim: Guard) -> Sequence[str]:
        """Have a session own patterns no more, as it took them; return those that it did own."""

        async def attempt() -> Sequence[str]:
            found = await self._own(session)
            if found is None:
                return []
            version, holding = found
            given = [one for one in checked(patterns) if one in holding.taken]
            if given:
                write = Write(self.key(session), version, holding.without(given).to_json())
                event = _event("ownership.given_back", session, patterns=given)
                await self._store.commit(Commit([write], [event], [claim]))
            return given

        return await retried(attempt, _TRIES)

    async def release(self, session: SessionName) -> Sequence[Write]:
        """Return what the commit that ends a session must also write, so that it holds and waits for nothing."""
        found = await self._store.get(self.key(session))
        return [] if found is None else [Write(found.key, found.version, None)]

    async def had(self, session: SessionName) -> Sequence[str]:
        """Return all patterns that a session has ever owned, whether or not it is over."""
        for version in await self._store.history(self.key(session)):
            if version.value is not None:
                return Holding.from_json(version.value).had
        return ()

    async def holdings(self) -> Sequence[Holding]:
        """Return what counts of the scope: who owns and waits for what, the oldest first."""
        known = await self._read()
        return sorted((one for _, one in known.live.values()), key=lambda one: (one.since, one.session))

    async def extend(self, session: SessionName, patterns: Sequence[str]) -> HeldBy | None:
        """Have a session own more patterns after its end, unless somebody else does: who does is returned.

        Without a claim on its task nothing is recorded as owned.
        """
        claim = _value(await self._store.get(key := claim_key(session)))
        known = await self._read()
        if claim is None or claim.get("released") is not None:
            return in_the_way(session, checked(patterns), (one for _, one in known.live.values()))
        orchestrator = known.live[session][1].orchestrator if session in known.live else ""
        return await self.take(session, patterns, orchestrator=orchestrator, claim=Guard(key, claim["epoch"]))

    async def owner(self, session: SessionName, path_pattern: str) -> HeldBy | None:
        """Return who else owns what a pattern names; None where nobody does."""
        known = await self._read()
        return in_the_way(session, [path_pattern], (one for _, one in known.live.values()))

    async def waits(self, session: SessionName, patterns: Sequence[str], *, orchestrator: str, claim: Guard) -> None:
        """Record that a session waits for patterns from now on."""
        waiting = Waiting(tuple(checked(patterns)), self._clock.now())

        async def attempt() -> None:
            found = await self._own(session)
            version, holding = found or (0, self._blank(session, orchestrator, claim))
            write = Write(self.key(session), version, holding.with_waiting(waiting).to_json())
            event = _event("ownership.waiting", session, patterns=list(waiting.patterns))
            await self._store.commit(Commit([write], [event], [claim]))

        await retried(attempt, _TRIES)

    async def stops_waiting(self, session: SessionName) -> None:
        """Record that a session waits for nothing any more, if it did."""

        async def attempt() -> None:
            found = await self._own(session)
            if found is None or found[1].waiting is None:
                return
            version, holding = found[0], found[1].with_waiting(None)
            value = None if holding.is_idle else holding.to_json()
            await self._store.commit(Commit([Write(self.key(session), version, value)]))

        await retried(attempt, _TRIES)

    async def _take(
        self, session: SessionName, patterns: Sequence[str], orchestrator: str, claim: Guard
    ) -> HeldBy | None:
        async def attempt() -> HeldBy | None:
            planned = await self.plan(session, patterns, orchestrator=orchestrator, claim=claim)
            if isinstance(planned, HeldBy):
                return planned
            if planned:
                event = _event("ownership.taken", session, patterns=list(patterns))
                await self._store.commit(Commit(planned, [event], [claim]))
            return None

        return await retried(attempt, _TRIES)

    def _taking(
        self, session: SessionName, patterns: Sequence[str], orchestrator: str, claim: Guard, known: _Known
    ) -> list[Write]:
        mine = self.key(session)
        version, holding = known.live.get(session) or (known.stale.get(mine, 0), None)
        if holding is None or holding.epoch != claim.epoch:
            holding = self._blank(session, orchestrator, claim)
        taken = holding.with_taken(patterns, self._clock.now()).with_waiting(None)
        # Attempts of a task follow each other: what an earlier one left is over with the next.
        over = {
            self.key(one): at for one, (at, _) in known.live.items() if one != session and one[:2] == session[:2]
        } | {key: at for key, at in known.stale.items() if key != mine}
        return [
            Write(self._turnstile, known.turnstile, {"since": self._clock.now()}),
            Write(mine, version, taken.to_json()),
            *(Write(key, at, None) for key, at in over.items()),
        ]

    def _blank(self, session: SessionName, orchestrator: str, claim: Guard) -> Holding:
        return Holding(session, (), self._clock.now(), orchestrator, claim.epoch)

    async def _own(self, session: SessionName) -> tuple[int, Holding] | None:
        found = await self._store.get(self.key(session))
        return None if found is None else (found.version, Holding.from_json(found.value))

    async def _read(self) -> _Known:
        turnstile = await self._store.get(self._turnstile)
        found = await self._store.list(KIND, f"{self.scope}/")
        # Claims come last: one that is not the holding's now was not any more when the holding was read, or has ended
        # since, and epochs never come back.
        live: dict[SessionName, tuple[int, Holding]] = {}
        stale: dict[Key, int] = {}
        claims: dict[Key, JsonObject | None] = {}
        for document in found:
            holding = Holding.from_json(document.value)
            key = claim_key(holding.session)
            if key not in claims:
                claims[key] = _value(await self._store.get(key))
            if counts(holding, claims[key]):
                live[holding.session] = document.version, holding
            else:
                stale[document.key] = document.version
        return _Known(turnstile.version if turnstile else 0, live, stale)

    async def _change(self, position: int, until: float) -> None:
        """Wait until something of what decides who owns what has changed since a position, or the time has come."""
        changed = anyio.Event()

        async def look() -> None:
            async with aclosing(following(self._store, position)) as records:
                async for record in records:
                    if any(key.kind in {KIND, CLAIM} for key in record.documents):
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
