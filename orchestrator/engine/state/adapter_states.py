"""The states of a run's adapters: cooldowns, and whether they are disabled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from orchestrator.domain.events.runs import AdapterCooldown, AdapterDisabled, AdapterEnabled, AdapterEvent
from orchestrator.domain.runs.model import AdapterDocument, SharedCooldown, TaskDocument
from orchestrator.domain.runs.retry import compute_cooldown_end
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.scheduling.claims import OwnerStatus
from orchestrator.engine.state.records import adapter_key, cooldown_key, task_key
from orchestrator.engine.state.run_state import RunState
from orchestrator.engine.state.writer import RunWriter
from orchestrator.errors import VersionConflict
from orchestrator.locking.orchestrators import read_orchestrators
from orchestrator.protocols import Commit, Key, Store, Write
from orchestrator.system.failpoints import failpoint

#: The minimum change of a cooldown's end to record it again, in seconds: programs report whole seconds.
_MIN_EXTENSION: Final = 1.0
#: Seconds between two checks whether the probe of another run has ended.
PROBE_CHECK_INTERVAL: Final = 5.0


class AdapterUpdate(NamedTuple):
    """A new adapter document and its event, to which `AdapterStates` adds the adapter's name."""

    document: AdapterDocument
    event: AdapterEvent


class AdapterStates:
    """The states of a run's adapters, as seen by one orchestrator.

    A cooldown is also recorded for the other runs of the store. They adopt it before they start a session.
    """

    def __init__(self, writer: RunWriter, run_state: RunState) -> None:
        self._writer, self._shared = writer, SharedCooldowns(writer, run_state)

    async def read(self, adapter: str) -> AdapterDocument:
        """Return the state of an adapter in this run, with its probe only while that session runs.

        While another run probes its account, it is in cooldown until the next check.
        """
        known, now = (await self._read_probed(adapter))[1], self._writer.clock.now()
        if known.cooldowns and not known.is_cooling_down(now) and await self._shared.is_probed_elsewhere(adapter):
            return known.model_copy(update={"cooldown_until": now + PROBE_CHECK_INTERVAL, "cooldown_since": now})
        return known

    async def update(
        self, adapter: str, decide: Callable[[AdapterDocument], AdapterUpdate | None]
    ) -> tuple[AdapterDocument, bool]:
        """Record the update that `decide` derives from an adapter's state, and share a cooldown in it.

        Return the state and whether it changed. `decide` is called again if another orchestrator updates the adapter
        concurrently.
        """
        while True:
            version, known = await self._read(adapter)
            if (update := decide(known)) is None:
                return known, False
            reason = update.event.reason if isinstance(update.event, AdapterCooldown) else ""
            shared = await self._shared.plan(adapter, known, update.document, reason)
            with suppress(VersionConflict):
                await self._commit(adapter, version, update, shared)
                return update.document, True

    async def adopt_cooldown(self, adapter: str) -> bool:
        """Adopt the cooldown that another run has started or cleared; return whether this changed the state."""
        while True:
            _, shared = await self._shared.read(adapter)
            version, known = await self._read(adapter)
            if (update := _adopt(known, shared, self._writer.clock.now())) is None:
                return False
            with suppress(VersionConflict):
                await self._commit(adapter, version, update)
                return True

    async def enable(self, adapter: str) -> AdapterDocument:
        """Enable an adapter that is cooling down or disabled; return its state."""
        enabled = AdapterUpdate(AdapterDocument(enabled_at=self._writer.clock.now()), AdapterEnabled())
        known, _ = await self.update(
            adapter, lambda known: enabled if known.disabled_reason or known.cooldown_until else None
        )
        return known

    async def start_cooldown(self, adapter: str, until: float | None, reason: str) -> AdapterDocument:
        """Record an adapter's cooldown until the reported time, if known; return its state."""
        await self.adopt_cooldown(adapter)
        now = self._writer.clock.now()

        def decide(known: AdapterDocument) -> AdapterUpdate | None:
            # Concurrent sessions that reach the same limit count as one cooldown.
            known_end = known.cooldown_until if known.is_cooling_down(now) else None
            cooldowns = known.cooldowns + (known_end is None)
            end = compute_cooldown_end(now, until, cooldowns)
            if known_end is not None and (until is None or end - known_end < _MIN_EXTENSION):
                return None
            cooling = AdapterDocument(cooldown_until=end, cooldown_since=now, cooldowns=cooldowns)
            return AdapterUpdate(cooling, AdapterCooldown(until=end, reason=reason))

        known, is_new = await self.update(adapter, decide)
        if is_new:
            failpoint("adapter.cooling_down")
        return known

    async def disable(self, adapter: str, reason: str, started: float) -> AdapterDocument:
        """Disable an adapter unless it was enabled after `started`; return its state."""
        disabled = AdapterUpdate(AdapterDocument(disabled_reason=reason), AdapterDisabled(reason=reason))

        def decide(known: AdapterDocument) -> AdapterUpdate | None:
            return disabled if known.disabled_reason is None and started >= (known.enabled_at or 0.0) else None

        return (await self.update(adapter, decide))[0]

    async def plan_probe(self, adapter: str, task: str) -> Sequence[Write] | None:
        """Return the writes that let a task's session probe an adapter after a cooldown.

        None if another session does, perhaps of another run, or if it is unavailable. Empty if it needs no probe.
        """
        version, known = await self._read_probed(adapter)
        if known.probe or known.disabled_reason is not None or known.is_cooling_down(self._writer.clock.now()):
            return None
        if not known.cooldowns:
            return []
        shared = await self._shared.plan_probe(adapter, task)
        probed = known.model_copy(update={"probe": task}).model_dump(mode="json")
        return None if shared is None else [Write(adapter_key(self._writer.run, adapter), version, probed), *shared]

    async def clear_cooldown(self, adapter: str) -> None:
        """Forget the cooldowns of an adapter, because a later session had a response."""
        enabled, now = AdapterUpdate(AdapterDocument(), AdapterEnabled()), self._writer.clock.now()
        await self.update(
            adapter, lambda known: enabled if known.cooldowns and not known.is_cooling_down(now) else None
        )

    async def _commit(self, adapter: str, version: int, update: AdapterUpdate, also: Sequence[Write] = ()) -> None:
        writer, value = self._writer, self._writer.sanitize(update.document.model_dump(mode="json"))
        write = Write(adapter_key(writer.run, adapter), version, value)
        await writer.commit(Commit([write, *also], [writer.event(update.event.within(adapter=adapter))]))

    async def _read_probed(self, adapter: str) -> tuple[int, AdapterDocument]:
        version, known = await self._read(adapter)
        if known.probe and not await is_probing(self._writer.store, self._writer.run, known.probe, adapter):
            known = known.model_copy(update={"probe": None})
        return version, known

    async def _read(self, adapter: str) -> tuple[int, AdapterDocument]:
        stored = await self._writer.store.get(adapter_key(self._writer.run, adapter))
        if stored is None:
            return 0, AdapterDocument()
        return stored.version, AdapterDocument.model_validate(stored.value)


def _adopt(known: AdapterDocument, shared: SharedCooldown | None, now: float) -> AdapterUpdate | None:
    """Return the update of a run's adapter to the shared cooldown; None if the run knows it, or has its own reason."""
    if known.disabled_reason is not None:
        return None
    if shared is None:
        is_cleared = known.cooldowns > 0 and not known.is_cooling_down(now)
        return AdapterUpdate(AdapterDocument(), AdapterEnabled()) if is_cleared else None
    if shared.until <= (known.cooldown_until or 0.0):
        return None
    cooling = AdapterDocument(cooldown_until=shared.until, cooldown_since=shared.since, cooldowns=shared.cooldowns)
    reason = f"{shared.reason} (in run {shared.run})"
    return AdapterUpdate(cooling, AdapterCooldown(until=shared.until, reason=reason))


class SharedCooldowns:
    """The cooldowns that the runs of a store share, as seen by one orchestrator.

    Runs share the cooldown of an adapter if its name and its definition, with the account, are the same in both.
    """

    def __init__(self, writer: RunWriter, run_state: RunState) -> None:
        self._writer, self._run_state = writer, run_state

    async def read(self, adapter: str) -> tuple[int, SharedCooldown | None]:
        """Return the cooldown of an adapter with its version; None if it has none."""
        stored = await self._writer.store.get(self._key(adapter))
        if stored is None:
            return 0, None
        return stored.version, SharedCooldown.model_validate_json(stored.encoded)

    async def plan(self, adapter: str, known: AdapterDocument, updated: AdapterDocument, reason: str) -> list[Write]:
        """Return the writes that share a cooldown which this run starts or clears with an update."""
        version, shared = await self.read(adapter)
        if updated.cooldown_until is not None:
            cooldown = SharedCooldown(
                until=updated.cooldown_until,
                since=updated.cooldown_since,
                cooldowns=updated.cooldowns,
                reason=reason,
                run=self._writer.run,
            )
            return [self._write(adapter, version, cooldown)]
        return [self._write(adapter, version, None)] if known.cooldowns and shared is not None else []

    async def plan_probe(self, adapter: str, task: str) -> list[Write] | None:
        """Return the writes that let a session of this run probe an account; None if one of another run does."""
        version, shared = await self.read(adapter)
        if shared is None:
            return []
        if await self._is_probed_elsewhere(adapter, shared):
            return None
        return [self._write(adapter, version, shared.model_copy(update={"run": self._writer.run, "probe": task}))]

    async def is_probed_elsewhere(self, adapter: str) -> bool:
        """Return True while a session of another run probes the account."""
        _, shared = await self.read(adapter)
        return shared is not None and await self._is_probed_elsewhere(adapter, shared)

    async def _is_probed_elsewhere(self, adapter: str, shared: SharedCooldown) -> bool:
        if shared.probe is None or shared.run == self._writer.run:
            return False
        if not await is_probing(self._writer.store, shared.run, shared.probe, adapter):
            return False
        # The processes of that run may have been killed.
        peers, leases = self._writer.orchestrators.peers, await read_orchestrators(self._writer.store, shared.run)
        for lease in leases.values():
            if await peers.assess(lease, shared.run) is OwnerStatus.ALIVE:
                return True
        return False

    def _write(self, adapter: str, version: int, cooldown: SharedCooldown | None) -> Write:
        value = None if cooldown is None else self._writer.sanitize(cooldown.model_dump(mode="json"))
        return Write(self._key(adapter), version, value)

    def _key(self, adapter: str) -> Key:
        definition = self._run_state.document.adapters[adapter].model_copy(update={"capacity": None})
        return cooldown_key(adapter, hashlib.sha256(definition.model_dump_json().encode()).hexdigest()[:16])


async def is_probing(store: Store, run: str, task: str, adapter: str) -> bool:
    """Return whether a task's session on an adapter runs, according to the store.

    Its start may not have reached this process.
    """
    stored = await store.get(task_key(run, task))
    document = TaskDocument() if stored is None else TaskDocument.model_validate_json(stored.encoded)
    return document.status is TaskStatus.RUNNING and document.attempt.adapter == adapter
