"""Cooldowns of accounts, shared by the runs of one state store."""

from __future__ import annotations

import hashlib

from orchestrator.domain.runs.model import AdapterDocument, SharedCooldown, TaskDocument
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.scheduling.claims import OwnerStatus
from orchestrator.engine.state.records import cooldown_key, task_key
from orchestrator.engine.state.run_state import RunState
from orchestrator.engine.state.writer import RunWriter
from orchestrator.locking.orchestrators import read_orchestrators
from orchestrator.protocols import Key, Store, Write


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
