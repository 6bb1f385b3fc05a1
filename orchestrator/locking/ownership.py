"""Ownership registry: which session may change which paths.

It uses only the store's contract. It provides ordering, not safety: it keeps sessions from changing the same paths;
landing checks changes again (`on_out_of_scope`). A session's ownership is a document. Each acquisition also writes the
scope's version guard, so that of two concurrent acquisitions one sees the other. Releases don't need the guard.
Ownership under a released or lost claim becomes invalid once its session has ended, and is removed by the next
acquisition.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, NamedTuple

import anyio

from orchestrator.domain.events.base import TaskEvent
from orchestrator.domain.events.coordination import (
    OwnershipRefused,
    OwnershipReleased,
    OwnershipTaken,
    OwnershipWaiting,
)
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
from orchestrator.protocols import Commit, CommitRecord, Document, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.state.documents.log_reader import wait_for_commit
from orchestrator.state.documents.update import retry_on_conflict
from orchestrator.state.documents.validation import find_document_error
from orchestrator.system.clock import Clock

OWNERSHIP_KIND: Final = "ownership"
CLAIM_KIND: Final = "claim"

#: Returns whether a session's process is alive, as far as this machine can determine.
LivenessCheck = Callable[[SessionName], Awaitable[bool]]

#: Maximum attempts of a conflicting acquisition: each conflict means that another one succeeded.
_TRIES: Final = 50


def ownership_scope(repository: str, target: str) -> str:
    """Return the name of the scope for the paths of a repository's target branch."""
    return hashlib.sha256(f"{repository}\0{target}".encode(errors="surrogateescape")).hexdigest()[:16]


def claim_key(session: SessionName) -> Key:
    """Return the key of the claim that a session's ownership belongs to."""
    return Key(CLAIM_KIND, f"{session.run}/{session.task}")


class _RegistryState(NamedTuple):
    """The registry's documents with their versions, including stale ones."""

    scope_version: int
    """The version of the scope's guard, read first so that a commit fails if anything was acquired since."""
    holdings: dict[SessionName, tuple[int, PathOwnership]]


class OwnershipView:
    """Read access to the path ownership of one scope."""

    def __init__(self, store: Store, clock: Clock, scope: str, lives: LivenessCheck | None = None) -> None:
        """Read the path ownership of one target branch, its `scope`.

        `lives` checks whether a session without a claim is alive and so still owns its paths.
        """
        self._store, self._clock, self.scope, self._lives = store, clock, scope, lives
        self._scope_key = Key(OWNERSHIP_KIND, scope)
        self._known: dict[Key, tuple[int, PathOwnership]] = {}

    def key(self, session: SessionName) -> Key:
        """Return the key of a session's ownership document."""
        return Key(OWNERSHIP_KIND, f"{self.scope}/{session}")

    async def locked_by_others(self, session: SessionName) -> Sequence[PathOwnership]:
        """Return the valid locks of sessions of other tasks, oldest first."""
        holdings = [holding for _, holding in (await self._read()).holdings.values()]
        others = [holding for holding in holdings if holding.locked and holding.session[:2] != session[:2]]
        return sorted(
            [holding for holding in others if await self._is_valid(holding)], key=lambda holding: holding.since
        )

    async def holdings(self) -> Sequence[PathOwnership]:
        """Return the valid owners and waiters of the scope, oldest first."""
        live = [holding for holding in await self._live() if not holding.is_idle]
        return sorted(live, key=lambda holding: (holding.since, holding.session))

    async def list_waits(self) -> dict[str, LockWait]:
        """Return the sessions that wait for paths, with their blockers."""
        live = await self._live()
        return {
            str(waiter.session): LockWait(
                waiter.waiting.since,
                ", ".join(waiter.waiting.patterns),
                {
                    str(other.session)
                    for other in live
                    if other.session != waiter.session
                    and other.has_conflict_with(waiter.session, waiter.waiting.patterns)
                },
            )
            for waiter in live
            if waiter.waiting is not None
        }

    async def _last(self, session: SessionName) -> PathOwnership | None:
        """Return the last recorded ownership of a session, valid or not."""
        for version in await self._store.history(self.key(session)):
            if version.value is not None:
                return PathOwnership.model_validate(version.value)
        return None

    async def _own(self, session: SessionName) -> tuple[int, PathOwnership] | None:
        document = await self._store.get(self.key(session))
        return None if document is None else (document.version, PathOwnership.model_validate(document.value))

    async def _read(self) -> _RegistryState:
        scope_guard = await self._store.get(self._scope_key)
        documents = await self._store.list(OWNERSHIP_KIND, f"{self.scope}/")
        known, self._known = self._known, {}
        for document in documents:
            before = known.get(document.key)
            if before is None or before[0] != document.version:
                if find_document_error(document) is not None:
                    continue
                before = document.version, PathOwnership.model_validate(document.value)
            self._known[document.key] = before
        holdings = {holding.session: (version, holding) for version, holding in self._known.values()}
        return _RegistryState(scope_guard.version if scope_guard else 0, holdings)

    async def _is_valid(self, holding: PathOwnership) -> bool:
        # If the claim does not match now, it did not match when read, or has ended since: epochs are never reused.
        if is_current(holding, _value(await self._store.get(claim_key(holding.session)))):
            return True
        return self._lives is not None and await self._lives(holding.session)

    async def _live(self) -> list[PathOwnership]:
        state = await self._read()
        return [holding for _, holding in state.holdings.values() if await self._is_valid(holding)]


class OwnershipRegistry(OwnershipView):
    """Read and write access to the path ownership of one scope."""

    async def plan(
        self, session: SessionName, patterns: Sequence[str], *, orchestrator: str, claim: Guard, is_lock: bool = False
    ) -> Sequence[Write] | OwnershipConflict:
        """Return the writes that make a session own patterns, or the conflicting owner.

        `is_lock` means that the session itself requested the patterns; `locked_by_others` reports these to landings.
        `claim` has the epoch of the claim, which the same commit may write. The commit fails with a VersionConflict if
        anything in the scope was acquired in between; then plan again. Raises RefusedError for an invalid pattern.
        """
        wanted = check_patterns(patterns)
        if not wanted:
            return []
        state = await self._read()
        stale: list[PathOwnership] = []
        live: list[PathOwnership] = []
        for _, other in state.holdings.values():
            # Attempts of a task never overlap: leftovers of an earlier one are stale.
            if other.session[:2] == session[:2]:
                stale += [other] if other.session != session else []
            elif other.has_conflict_with(session, wanted):
                (live if await self._is_valid(other) else stale).append(other)
        conflict = find_ownership_conflict(session, wanted, live)
        if conflict is not None:
            return conflict
        version, holding = state.holdings.get(session, (0, None))
        if holding is None or holding.epoch != claim.epoch:
            holding = self._blank(session, orchestrator, claim)
        extended = holding.with_patterns(wanted, self._clock.now(), is_lock=is_lock).with_waiting(None)
        return [
            Write(self._scope_key, state.scope_version, {"since": self._clock.now()}),
            self._write(version, extended),
            *(Write(self.key(other.session), state.holdings[other.session][0], None) for other in stale),
        ]

    async def acquire(
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
        """Make a session own more patterns, all or none; return the conflict, if any.

        Waits up to `wait` seconds for the owners; the wait is recorded in the store. `also` returns sessions' waits for
        resources other than paths of this scope. A cancelled wait acquires nothing. Raises LeaseLost if the session no
        longer has the claim, RefusedError for an invalid pattern or too many patterns, and, immediately,
        LockUnavailable if sessions wait for each other in a cycle and this one began to wait last.
        """
        own = await self._own(session)
        check_ownership_limit(() if own is None else own[1].patterns, patterns)
        position = await self._store.position()
        conflict = await self._acquire(session, patterns, orchestrator, claim, is_lock=is_lock)
        if conflict is None:
            return None
        refused = OwnershipRefused(patterns=list(patterns), holder=str(conflict.holder), held_pattern=conflict.pattern)
        await self._commit([], _event(refused, session), claim)
        if wait <= 0:
            return conflict
        deadline = self._clock.monotonic() + wait
        await self.start_waiting(session, patterns, orchestrator=orchestrator, claim=claim)
        try:
            while conflict is not None and self._clock.monotonic() < deadline:
                waits = merge_waits(await self.list_waits(), {} if also is None else await also())
                cycle = find_deadlock(str(session), waits)
                if cycle is not None:
                    reason = f"waiting would deadlock: {cycle}"
                    raise LockUnavailable(", ".join(patterns), reason, "unlock files, then retry")
                await wait_for_commit(self._store, self._clock, position, _is_relevant, deadline)
                position = await self._store.position()
                conflict = await self._acquire(session, patterns, orchestrator, claim, is_lock=is_lock)
        finally:
            with anyio.CancelScope(shield=True):
                await self.stop_waiting(session)
        return conflict

    async def plan_transfer(self, claims: Sequence[Guard], orchestrator: str) -> Sequence[Write]:
        """Return the writes that preserve the ownership under claims being taken over.

        A session may outlive its orchestrator: until it is proven dead, no other session may acquire its paths.
        `claims` have the new epochs.
        """
        epochs = {claim.key: claim.epoch for claim in claims}
        holdings = (await self._read()).holdings.values()
        candidates = [(version, holding, epochs.get(claim_key(holding.session), 0)) for version, holding in holdings]
        return [
            self._write(version, holding.model_copy(update={"orchestrator": orchestrator, "epoch": epoch}))
            for version, holding, epoch in candidates
            if holding.epoch == epoch - 1
        ]

    async def inherit(self, session: SessionName, *, orchestrator: str, claim: Guard) -> None:
        """Restore an interrupted session's ownership under the claim that resumes it.

        Restores nothing if another session has acquired any of the patterns.
        """
        last = await self._last(session)  # read from the history, because a sweep may have removed the document
        if last is not None and last.epoch != claim.epoch and last.patterns:
            conflict = await self._acquire(session, last.patterns, orchestrator, claim)
            if conflict is None and last.locked:
                await self._acquire(session, last.locked, orchestrator, claim, is_lock=True)

    async def release_patterns(self, session: SessionName, patterns: Sequence[str], claim: Guard) -> Sequence[str]:
        """Release patterns, spelled as acquired; return those that the session owned."""

        async def attempt() -> Sequence[str]:
            own = await self._own(session)
            if own is None:
                return []
            version, holding = own
            released = [pattern for pattern in check_patterns(patterns) if pattern in holding.taken]
            if released:
                write = self._write(version, holding.without(released))
                event = _event(OwnershipReleased(patterns=released), session)
                await self._commit([write], event, claim)
            return released

        return await retry_on_conflict(attempt, _TRIES)

    async def sweep(self) -> Sequence[Write]:
        """Return the writes that remove all stale ownership."""
        state = await self._read()
        stale = [holding for _, holding in state.holdings.values() if not await self._is_valid(holding)]
        return [Write(self.key(holding.session), state.holdings[holding.session][0], None) for holding in stale]

    async def extend(self, session: SessionName, patterns: Sequence[str]) -> OwnershipConflict | None:
        """Make a finished session own more patterns; return the conflict, if any.

        Without a claim on its task, nothing is recorded.
        """
        claim = _value(await self._store.get(key := claim_key(session)))
        if claim is None or claim.get("released") is not None:
            return find_ownership_conflict(session, check_patterns(patterns), await self._live())
        own = await self._own(session)
        orchestrator = "" if own is None else own[1].orchestrator
        return await self.acquire(session, patterns, orchestrator=orchestrator, claim=Guard(key, claim["epoch"]))

    async def start_waiting(
        self, session: SessionName, patterns: Sequence[str], *, orchestrator: str, claim: Guard
    ) -> None:
        """Record that a session waits for patterns."""
        waiting = OwnershipWait(tuple(check_patterns(patterns)), self._clock.now())

        async def attempt() -> None:
            own = await self._own(session)
            version, holding = own or (0, self._blank(session, orchestrator, claim))
            write = self._write(version, holding.with_waiting(waiting))
            event = _event(OwnershipWaiting(patterns=waiting.patterns), session)
            await self._commit([write], event, claim)

        await retry_on_conflict(attempt, _TRIES)

    async def stop_waiting(self, session: SessionName) -> None:
        """Record that a session no longer waits."""

        async def attempt() -> None:
            own = await self._own(session)
            if own is None or own[1].waiting is None:
                return
            version, holding = own[0], own[1].with_waiting(None)
            value = None if holding.is_idle else holding.model_dump(mode="json")
            await self._store.commit(Commit([Write(self.key(session), version, value)], durable=False))

        await retry_on_conflict(attempt, _TRIES)

    async def _acquire(
        self, session: SessionName, patterns: Sequence[str], orchestrator: str, claim: Guard, *, is_lock: bool = False
    ) -> OwnershipConflict | None:
        async def attempt() -> OwnershipConflict | None:
            planned = await self.plan(session, patterns, orchestrator=orchestrator, claim=claim, is_lock=is_lock)
            if isinstance(planned, OwnershipConflict):
                return planned
            if planned:
                event = _event(OwnershipTaken(patterns=list(patterns)), session)
                await self._commit(planned, event, claim)
            return None

        return await retry_on_conflict(attempt, _TRIES)

    def _write(self, version: int, holding: PathOwnership) -> Write:
        return Write(self.key(holding.session), version, holding.model_dump(mode="json"))

    def _blank(self, session: SessionName, orchestrator: str, claim: Guard) -> PathOwnership:
        return PathOwnership(
            **session._asdict(), patterns=(), since=self._clock.now(), orchestrator=orchestrator, epoch=claim.epoch
        )

    async def _commit(self, writes: Sequence[Write], event: Event, claim: Guard) -> None:
        # Not durable: ownership matters only while sessions are alive, and a power failure also ends them.
        await self._store.commit(Commit(writes, [event], [claim], durable=False))


def _is_relevant(record: CommitRecord) -> bool:
    return any(key.kind in {OWNERSHIP_KIND, CLAIM_KIND} for key in record.documents)


def _value(document: Document | None) -> JsonObject | None:
    return None if document is None else document.value


def _event(event: TaskEvent, session: SessionName) -> Event:
    return Event.of(event.within(**session._asdict()))
