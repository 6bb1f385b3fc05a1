"""The orchestrators of a run: each has a record in the store, by which the others know that it is at work.

Signs of life are commits that need not be durable. Who has given none for too long, or whose process is proven to have
ended, is taken for gone by whoever notices first; its record then carries another epoch, so that nothing of what it may
still want to write is accepted.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Awaitable, Callable

from orchestrator.clock import Clock
from orchestrator.domain.claims import Counters, Orchestrator, Owner, Role, Standing, Timing, standing
from orchestrator.errors import Fenced, VersionConflict
from orchestrator.filelock import start_ticks
from orchestrator.protocols import Commit, Document, Guard, Key, Store, Write
from orchestrator.state.boot import boot_id

_KIND = "orchestrator"


def orchestrator_key(run: str, orchestrator: str) -> Key:
    """Return the key of an orchestrator's record."""
    return Key(_KIND, f"{run}/{orchestrator}")


def this_process(role: Role) -> Owner:
    """Return this process as an orchestrator under a new name."""
    host, pid = socket.gethostname(), os.getpid()
    return Owner(
        id=f"{host}-{pid}-{secrets.token_hex(3)}",
        host=host,
        boot=boot_id(),
        pid=pid,
        started=start_ticks(pid),
        role=role,
    )


async def read_orchestrators(store: Store, run: str) -> dict[str, Orchestrator]:
    """Return the records of all that were ever at work in a run, by their names."""
    found = await store.list(_KIND, f"{run}/")
    return {one.key.id.partition("/")[2]: Orchestrator.model_validate(one.value) for one in found if not one.damaged}


class Orchestrators:
    """Those of one run, as one of them, `me`, sees them."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        run: str,
        me: Owner,
        timing: Timing,
        is_dead: Callable[[str, Owner], Awaitable[bool]],
    ) -> None:
        """Take a run; `is_dead` tells whether a process is proven to have ended, by its run and itself."""
        self.run, self.me, self.timing = run, me, timing
        self.counters = Counters()
        self.guard = Guard(orchestrator_key(run, me.id), 1)
        """What makes a commit refused once this orchestrator is taken for gone."""
        self._store, self._clock, self._is_dead = store, clock, is_dead
        self._version = 0
        self._record: Orchestrator | None = None
        self._seen: dict[tuple[str, str], tuple[float, float]] = {}
        """By run and name: the last heartbeat that was seen, and since when (monotonic seconds)."""

    def promote(self) -> None:
        """This orchestrator has become the coordinator of its run."""
        self.me = self.me.model_copy(update={"role": Role.COORDINATOR})

    def count(self, **more: int) -> None:
        """Count what became of claims; it is recorded with the next sign of life."""
        self.counters = self.counters.plus(**more)

    def joining(self) -> Write:
        """Return the write that makes this process one of them; `joined` is to follow."""
        now = self._clock.now()
        expires = now + self.timing.stale
        self._record = Orchestrator(owner=self.me, epoch=1, since=now, heartbeat=now, expires=expires)
        return Write(self.guard.key, 0, self._record.model_dump(mode="json"))

    def joined(self) -> None:
        """The write of `joining` was committed."""
        self._version = 1

    async def join(self) -> None:
        """Become one of them."""
        await self._store.commit(Commit([self.joining()]))
        self.joined()

    async def renew(self) -> None:
        """Give a sign of life for this orchestrator and all of its claims. Fenced where another took over."""
        now = self._clock.now()
        self.count(renewals=1)
        await self._write(heartbeat=now, expires=now + self.timing.stale)

    async def leave(self, reason: str | None = None) -> None:
        """Say that this orchestrator is at work no more, which holds no claims by then; nothing where it is fenced."""
        try:
            await self._write(ended=self._clock.now(), reason=reason, epoch=2)
        except Fenced:
            return

    async def _write(self, **changes: object) -> None:
        assert self._record is not None, "it has joined"  # noqa: S101
        record = self._record.model_copy(update={**changes, "counters": self.counters})
        write = Write(self.guard.key, self._version, record.model_dump(mode="json"))
        try:
            await self._store.commit(Commit([write], durable=False))
        except VersionConflict:
            raise await self.fenced() or Fenced(
                self.run, self.me.id, "its record was changed by somebody else"
            ) from None
        self._version, self._record = self._version + 1, record

    async def fenced(self) -> Fenced | None:
        """Return the error that says why this orchestrator may write nothing any more; None if it still may."""
        found = await self._store.get(self.guard.key)
        record = None if found is None else Orchestrator.model_validate(found.value)
        if record is not None and record.epoch == self.guard.epoch:
            return None
        why = None if record is None else record.reason
        return Fenced(self.run, self.me.id, why or "its record is gone")

    async def all(self) -> dict[str, Orchestrator]:
        """Return the records of all that were ever at work in the run, by their names."""
        return await read_orchestrators(self._store, self.run)

    async def find(self, orchestrator: str, run: str | None = None) -> Orchestrator | None:
        """Return the record of one, of this run or another."""
        found = await self._store.get(orchestrator_key(run or self.run, orchestrator))
        return None if found is None or found.damaged else Orchestrator.model_validate(found.value)

    async def standing_of(self, orchestrator: str, run: str | None = None) -> Standing:
        """Return how one stands by its name; one without a record has ended."""
        found = await self.find(orchestrator, run)
        return Standing.ENDED if found is None else await self.standing(found, run)

    async def standing(self, one: Orchestrator, run: str | None = None) -> Standing:
        """Return how one stands."""
        if one.owner.id == self.me.id:
            return Standing.ALIVE if one.ended is None else Standing.ENDED
        is_here = (one.owner.host, one.owner.boot) == (self.me.host, self.me.boot)
        run = run or self.run
        # Nothing of a process outlives the machine's start; whose host has the same name is told by its lock.
        is_dead = one.ended is None and one.owner.host == self.me.host and await self._is_dead(run, one.owner)
        now, watched = self._clock.now(), self._watched(run, one)
        return standing(one, now, watched, self.timing, is_here=is_here, is_dead=is_dead)

    def _watched(self, run: str, one: Orchestrator) -> float:
        now = self._clock.monotonic()
        heartbeat, since = self._seen.get((run, one.owner.id), (None, now))
        if heartbeat != one.heartbeat:
            since = now
            self._seen[run, one.owner.id] = (one.heartbeat, now)
        return now - since

    async def gone(self) -> dict[str, tuple[Document, Orchestrator, Standing]]:
        """Return those that are taken for gone and have not been told so yet."""
        self.count(sweeps=1)
        found: dict[str, tuple[Document, Orchestrator, Standing]] = {}
        for document in await self._store.list(_KIND, f"{self.run}/"):
            one = Orchestrator.model_validate(document.value)
            if (stands := await self.standing(one)) in {Standing.STALE, Standing.DEAD}:
                found[one.owner.id] = (document, one, stands)
        return found

    def ending(self, document: Document, one: Orchestrator, stands: Standing) -> Write:
        """Return the write that fences one that is gone."""
        seconds = round(self._clock.now() - one.heartbeat)
        why = "its process had ended" if stands is Standing.DEAD else f"nothing had been heard of it for {seconds} s"
        changes = {"ended": self._clock.now(), "reason": f"{self.me.id} took over: {why}", "epoch": one.epoch + 1}
        return Write(document.key, document.version, one.model_copy(update=changes).model_dump(mode="json"))
