"""Locks that orchestrators hold while alive, so that peers can prove their death."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.domain.scheduling.claims import OrchestratorIdentity
from orchestrator.system.file_lock import FileLock, is_held


@dataclass(frozen=True, slots=True)
class LivenessLocks:
    """The locks of a hub's orchestrators, held by the process and its git commands."""

    folder: Path

    def of(self, run: str, orchestrator: str) -> FileLock:
        """Return the lock of an orchestrator of a run."""
        return FileLock(self.folder / f"run-{run}.{orchestrator}")

    async def is_dead(self, run: str, owner: OrchestratorIdentity) -> bool:
        """Return whether an orchestrator and all of its git commands are proven dead."""
        lock = self.of(run, owner.id)
        # Without a lock file, the orchestrator is on another machine, which may have the same name.
        return await anyio.Path(lock.path).exists() and not await lock.is_held()

    async def held(self, run: str) -> list[FileLock]:
        """Return the held locks of a run's orchestrators."""
        return [FileLock(path) for path in await anyio.to_thread.run_sync(self._held, run)]

    async def list_alive(self, run: str) -> frozenset[str]:
        """Return a run's orchestrators on this machine that are alive or running git."""
        paths = await anyio.to_thread.run_sync(self._held, run)
        return frozenset(path.name.removeprefix(f"run-{run}.") for path in paths)

    def _held(self, run: str) -> list[Path]:
        return [path for path in sorted(self.folder.glob(f"run-{run}.*")) if is_held(path)]
