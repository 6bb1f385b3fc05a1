"""File locks that prove that an orchestrator of this machine has ended: it holds one for as long as it lives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.domain.scheduling.claims import OrchestratorIdentity
from orchestrator.system.file_lock import FileLock, is_held


@dataclass(frozen=True, slots=True)
class LivenessLocks:
    """The locks of a hub's orchestrators, each held by its process and by the git commands that this started."""

    folder: Path

    def of(self, run: str, orchestrator: str) -> FileLock:
        """Return the lock of one, by its run and its name in that."""
        return FileLock(self.folder / f"run-{run}.{orchestrator}")

    async def is_dead(self, run: str, owner: OrchestratorIdentity) -> bool:
        """Whether it is proven that an orchestrator has ended, and all git commands of it have."""
        lock = self.of(run, owner.id)
        # Without it, it is of another machine, though that may have the same name.
        return await anyio.Path(lock.path).exists() and not await lock.is_held()

    async def held(self, run: str) -> list[FileLock]:
        """Return the held locks of a run's orchestrators."""
        return [FileLock(path) for path in await anyio.to_thread.run_sync(self._held, run)]

    async def list_alive(self, run: str) -> frozenset[str]:
        """Return the ids of a run's orchestrators on this machine whose process, or a git command of it, runs."""
        found = await anyio.to_thread.run_sync(self._held, run)
        return frozenset(path.name.removeprefix(f"run-{run}.") for path in found)

    def _held(self, run: str) -> list[Path]:
        return [path for path in sorted(self.folder.glob(f"run-{run}.*")) if is_held(path)]
