"""The topic `checkpoints`: creation, listing and restoration."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.api import execution
from orchestrator.api.topic import Topic
from orchestrator.engine.scheduler.restore import RestoreResult
from orchestrator.state.documents import checkpoints
from orchestrator.state.documents.checkpoints import Checkpoint, RestorePlan


class Checkpoints(Topic):
    """Named, restorable positions of the log, available as `council.checkpoints`."""

    async def create(self, run: str | None = None, *, reason: str = "manual", whole: bool = False) -> Checkpoint:
        """Create a checkpoint of a run, or with `whole` of all runs of the project."""
        store, index = self._context.store, self._index
        if whole:
            return await checkpoints.create_checkpoint(store, None, reason)
        run = await index.find(run)
        return await checkpoints.create_checkpoint(store, run, reason, is_live=await index.has_live_process(run))

    async def list(self, run: str | None = None) -> Sequence[Checkpoint]:
        """Return checkpoints, oldest first: those of one run, or all.

        The run `all` selects the checkpoints of all runs together.
        """
        return await checkpoints.list_checkpoints(self._context.store, run)

    async def plan_restore(self, checkpoint: str) -> RestorePlan:
        """Return the changes that `restore` would make now.

        Raises RefusedError if the position was pruned.
        """
        return await checkpoints.plan_restore(self._context.store, checkpoint)

    async def restore(self, checkpoint: str, *, force: bool = False) -> RestoreResult:
        """Restore a checkpoint by its id, after creating one of the current state.

        `resume` continues from it. Landed commits stay on their targets. Raises RefusedError if a process is active in
        a run that this would change; with `force`, the run is taken over instead, and that process ends at its next
        step.
        """
        await self._context.check_writable()
        controller = execution.RunController(self._context)
        return await controller.restore(checkpoint, force=force)
