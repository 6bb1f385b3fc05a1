"""File locks that prove that an orchestrator of this machine has ended: it holds one for as long as it lives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.domain.claims import Owner
from orchestrator.filelock import FileLock


@dataclass(frozen=True, slots=True)
class LifeLocks:
    """The locks of a hub's orchestrators, each held by its process and by the git commands that this started."""

    folder: Path

    def of(self, run: str, orchestrator: str) -> FileLock:
        """Return the lock of one, by its run and its name in that."""
        return FileLock(self.folder / f"run-{run}.{orchestrator}")

    async def is_dead(self, run: str, owner: Owner) -> bool:
        """Whether it is proven that an orchestrator has ended, and all git commands of it have."""
        lock = self.of(run, owner.id)
        # Without it, it is of another machine, though that may have the same name.
        return await anyio.Path(lock.path).exists() and not await lock.is_held()

    async def held(self, run: str) -> list[FileLock]:
        """Return those of a run's orchestrators that live."""
        found = await anyio.to_thread.run_sync(lambda: sorted(self.folder.glob(f"run-{run}.*")))
        return [lock for lock in map(FileLock, found) if await lock.is_held()]
