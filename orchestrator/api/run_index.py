"""Lookup of a project's runs by name, and of their active processes."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import anyio.to_thread

from orchestrator.api.context import ProjectContext
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.scheduling.claims import OrchestratorLease
from orchestrator.domain.wording import suggest_similar
from orchestrator.engine.state.records import read_run
from orchestrator.errors import RefusedError, UnreadableDocument
from orchestrator.locking.orchestrators import read_orchestrators
from orchestrator.protocols import Document
from orchestrator.repo.worktrees.hub import Hub, create_folders, find_hub
from orchestrator.repo.worktrees.origin import StoreLocation

#: The name of the newest run.
LATEST: Final = "latest"
#: The number of runs listed for an ambiguous name.
_MOST_NAMED: Final = 5


@dataclass(frozen=True, slots=True)
class RunIndex:
    """The runs of a project by name, and the processes that are active in them."""

    context: ProjectContext

    async def ids(self) -> list[str]:
        """Return the ids of all readable runs, oldest first."""
        found = await self.context.store.list("run")
        return [one.key.id for one in sorted(found, key=start_key) if not one.damaged]

    async def newest(self) -> str:
        """Return the id of the newest run, ignoring runs that merge another run's branch."""
        runs = await self.context.store.list("run")
        if not runs and self.context.damage:
            message = f"no run can be read, the state log is damaged: {'; '.join(self.context.damage)}"
            raise RefusedError(message, "start a new run; landed commits stay on their targets")
        if not runs:
            raise RefusedError("there is no run in this project", "start one with `council run`")
        if len(runs) == 1:  # reading a run of thousands of tasks is slow
            return runs[0].key.id
        return max([one for one in runs if one.value.get("merges") is None] or runs, key=start_key).key.id

    async def find(self, name: str | None) -> str:
        """Return the id of a run by id, unique prefix or `latest`; None is the newest.

        Raises RefusedError, with the closest ids, if no run or several runs match.
        """
        if name is None:
            return await self.newest()
        known = [one.key.id for one in sorted(await self.context.store.list("run"), key=start_key)]
        if name in known:
            return name
        if name == LATEST:
            return await self.newest()
        matching = [run for run in known if name and run.startswith(name)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            message = f"{len(matching)} runs begin with {name!r}"
            raise RefusedError(message, f"use one of: {', '.join(matching[: -_MOST_NAMED - 1 : -1])}")
        raise RefusedError(f"there is no run {name!r}", suggest_similar(name, known) or "`council runs` lists them")

    async def hub(self, run: RunDocument) -> Hub:
        """Return the repositories of a run on this machine; create those of a run that spans machines.

        Raises RefusedError if they are missing, or the run was imported.
        """
        run.check_not_imported()
        context, hub = self.context, find_hub(run, self.context.environ)
        if run.hub is None:
            from orchestrator.engine.diagnostics.preflight import prepare_hub  # noqa: PLC0415  slow, and only for such runs

            location = await anyio.to_thread.run_sync(StoreLocation.of, context.url, context.store.local_paths())
            return await prepare_hub(run, location, context.environ)
        # An attempt that was still active may have created its own folder again, but nothing else.
        if not await anyio.to_thread.run_sync(hub.trusted.is_dir):
            remedy = "move it away and start a new run" if hub.root.exists() else "start a new run"
            raise RefusedError(f"the repositories of run {run.id} are missing from {hub.root}", remedy)
        await anyio.to_thread.run_sync(create_folders, hub.root)
        return hub

    async def is_live(self, run: str | RunDocument) -> bool:
        """Return True if a process is active in a run.

        Raises RefusedError if the run's repositories are missing.
        """
        document = await read_run(self.context.store, run) if isinstance(run, str) else run
        if document.imported is not None:
            return False
        hub = await self._existing_hub(document)
        if hub is not None and (
            await hub.run_lock(document.id).is_held() or await hub.liveness_locks.held(document.id)
        ):
            return True
        return bool(await self.active_processes(document))

    async def active_processes(self, run: RunDocument) -> list[OrchestratorLease]:
        """Return the processes that are active in a run, sorted by join time.

        Raises RefusedError if its repositories are missing.
        """
        hub, now = await self._existing_hub(run), self.context.clock.now()
        joined = [one for one in (await read_orchestrators(self.context.store, run.id)).values() if one.ended is None]
        here, alive = {one.owner.id for one in joined if one.owner.host == socket.gethostname()}, frozenset[str]()
        if hub is not None:
            alive = await hub.liveness_locks.list_alive(run.id)
        if run.hub is None:  # machines may have the same name: a lock file shows which processes are of this one
            here = set() if hub is None else await hub.liveness_locks.list_known(run.id)
        active = [one for one in joined if (one.owner.id in alive if one.owner.id in here else now < one.expires)]
        return sorted(active, key=lambda one: one.since)

    async def _existing_hub(self, run: RunDocument) -> Hub | None:
        """Return the repositories of a run; None if it spans machines, and this one has none.

        Raises RefusedError if another run's are missing.
        """
        if run.hub is not None:
            return await self.hub(run)
        hub = find_hub(run, self.context.environ)
        return hub if await anyio.to_thread.run_sync(hub.trusted.is_dir) else None

    async def has_live_process(self, run: str) -> bool:
        """Return True if a process is active in a run; False without its repositories."""
        with suppress(RefusedError):
            return await self.is_live(run)
        return False

    async def interrupted(self) -> list[str]:
        """Return the ids of unfinished runs without an active process, oldest first.

        Runs whose repositories are missing can't be resumed, and are skipped.
        """
        found = []
        for run in sorted(await self.context.store.list("run"), key=start_key):
            if run.damaged or run.value.get("ended") is not None or run.value.get("imported") is not None:
                continue
            with suppress(RefusedError, UnreadableDocument):
                if not await self.is_live(run.key.id):
                    found.append(run.key.id)
        return found


def start_key(run: Document) -> tuple[float, str]:
    """Return the sort key of a run, which may have no readable start time."""
    started = run.value.get("started")
    return float(started) if isinstance(started, int | float) else 0.0, run.key.id
