"""Find leftovers on this machine: of runs, hubs, unknown runs and killed commands.

Read-only. A result stays valid while the caller holds the lock that changing it would require.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISDIR

import anyio.to_thread

from orchestrator.domain.runs.leftovers import (
    Leftover,
    LeftoverKind,
    LeftoverStatus,
    assess_hub,
    assess_orphan,
    assess_run,
    assess_worktree,
    classify_worktree,
    is_stale_file,
)
from orchestrator.domain.runs.model import RunDocument, TaskDocument
from orchestrator.domain.scheduling.dispatch import with_subtasks
from orchestrator.engine.reports.report import RunRecord
from orchestrator.engine.state.port_leases import delete_port_leases, find_stale_port_leases
from orchestrator.engine.state.records import read_entries, read_tasks, task_documents
from orchestrator.errors import GitError, RefusedError
from orchestrator.project import Project, find_stale_exclude_files
from orchestrator.protocols import Document, Store
from orchestrator.repo.git.command import Git
from orchestrator.repo.git.stale_files import is_git_running, list_partial_objects
from orchestrator.repo.landing import salvage
from orchestrator.repo.source.user_checkouts import find_repository
from orchestrator.repo.worktrees import origin, worktrees
from orchestrator.repo.worktrees.hub import INTERNAL_REFS, Hub, find_hub, is_inside_hub
from orchestrator.repo.worktrees.origin import HubOrigin, StoreLocation
from orchestrator.repo.worktrees.slots import WorktreeSlot, assess_slot, list_slots
from orchestrator.repo.worktrees.worktrees import Worktree, list_lock_files
from orchestrator.state.documents.validation import is_readable
from orchestrator.system.clock import Clock
from orchestrator.system.file_lock import FileLock
from orchestrator.system.files import find_paths

_KILLED = "left by a killed command"
_HUB = re.compile(r".+-[0-9a-f]{12}")
_LIVE_DIFF = re.compile(r".+\.live-[a-z0-9_]{8}")  # the prefix that `repo.intake.diffs` passes to tempfile
#: The entries of a hub.
_PARTS = frozenset(
    {
        "hub.git",
        "trusted.git",
        "session.git",
        "sessions",
        "indexes",
        "slots",
        "trash",
        "locks",
        "origin.json",
        "origin.json.new",
    }
)


class OrphanFinder:
    """Finds leftovers in `home`, the folder of all hubs, and in a project.

    `url` is the location of the project's store, if there is one.
    """

    def __init__(
        self,
        home: Path,
        environ: Mapping[str, str],
        clock: Clock,
        project: Project | None,
        store: Store | None,
        url: str | None,
    ) -> None:
        self._home, self._environ, self._clock = home, environ, clock
        self.project, self._store, self._url = project, store, url

    async def runs(self) -> Mapping[str, RunDocument | None]:
        """Return all runs in the project's state; None for an unreadable one."""
        found: Sequence[Document] = [] if self._store is None else await self._store.list("run")
        return {one.key.id: _readable(one) for one in found}

    async def release_stale_ports(self) -> None:
        """Delete the port leases of worktree slots that no longer exist."""
        if self._store is not None:
            await delete_port_leases(self._store, await find_stale_port_leases(self._store))

    async def find_all(self) -> list[Leftover]:
        """Return all leftovers except logs, of inactive runs and hubs."""
        found = [*await self.stale_excludes(), *await self._half_built()]
        for run in (await self.runs()).values():
            found += [] if run is None else await _without_active_runs(await self.worktrees(run))
        for hub in await self._hubs():
            found += await self._of_hub(hub)
        return found

    async def worktrees(self, run: RunDocument) -> list[Leftover]:
        """Return the worktrees of an inactive run, with their cleanup status."""
        assert self._store is not None, "a run is known by its store"  # noqa: S101  the caller found the run there
        documents = {
            task: TaskDocument.model_validate_json(one.encoded) if is_readable(one) else None
            for task, one in (await read_tasks(self._store, run.id)).items()
        }
        hub = find_hub(run, self._environ)
        found = await _empty_run_folders(hub, run.id)
        for worktree in await anyio.to_thread.run_sync(worktrees.list_worktrees, hub, run.id, run.tasks):
            document = documents.get(worktree.task)
            held = classify_worktree(document, worktree.attempt, is_check=worktree.is_check)
            found.append(_leftover(worktree, *assess_worktree(run.id, document, held)))
        return found

    async def logs(self, age: float) -> list[Leftover]:
        """Return the logs of runs that ended more than `age` seconds ago."""
        if self.project is None:
            return []
        found = []
        for run in (await self.runs()).values():
            if run is None or run.ended is None or self._clock.now() - run.ended <= age:
                continue
            logs = self.project.logs(run.id)
            if await anyio.to_thread.run_sync(logs.is_dir):
                reason, hub = "output of an ended run", str(find_hub(run, self._environ).root)
                found.append(Leftover(LeftoverKind.LOGS, str(logs), LeftoverStatus.LEFT_OVER, reason, hub, run.id))
        return await _without_active_runs(found)

    async def old_runs(self, age: float, *, include_interrupted: bool) -> list[Leftover]:
        """Return inactive runs older than `age` seconds, with their cleanup status.

        A run's age counts from its end or interruption.
        """
        known = [run for run in (await self.runs()).values() if run is not None]
        ends = {run.id: await self._last(run) for run in known}
        old = [run for run in known if self._clock.now() - ends[run.id] > age]
        return await _without_active_runs(
            [await self.old_run(run, include_interrupted=include_interrupted) for run in old]
        )

    async def old_run(self, run: RunDocument, *, include_interrupted: bool) -> Leftover:
        """Return the cleanup status of an inactive run's record, at any age."""
        assert self._store is not None, "a run is known by its store"  # noqa: S101  the caller found the run there
        hub, ended = find_hub(run, self._environ), f"{datetime.fromtimestamp(await self._last(run), UTC):%Y-%m-%d}"
        branches: int | None = 0
        try:
            if await hub_exists(hub):
                branches = len(await salvage.list_unmerged_work(Git(hub.trusted, environ=self._environ), run.id))
            is_finished = await self._is_finished(run)
        except (GitError, RefusedError):
            branches, is_finished = None, run.ended is not None
        left = [one for one in await self.worktrees(run) if one.status is not LeftoverStatus.LEFT_OVER]
        status, reason = assess_run(
            run.id, ended, branches, len(left), is_finished=is_finished, include_interrupted=include_interrupted
        )
        return Leftover(LeftoverKind.RUN, run.id, status, reason, str(hub.root), run.id)

    async def _is_finished(self, run: RunDocument) -> bool:
        """Return True if no task of a run can continue.

        Raises RefusedError if the run's records are damaged.
        """
        assert self._store is not None, "a run is known by its store"  # noqa: S101  the caller found the run there
        documents = await read_tasks(self._store, run.id)
        if any(task not in documents or documents[task].damaged for task in run.tasks):
            raise RefusedError(f"task records of run {run.id} are damaged", "run `council state verify`")
        tasks = task_documents(documents, run.tasks)
        entries = with_subtasks(await read_entries(self._store, run, () if run.imported is None else run.tasks), tasks)
        return RunRecord(run, tasks, entries, {}).is_finished

    async def _last(self, run: RunDocument) -> float:
        """Return when a run ended or was last changed (wall-clock seconds)."""
        assert self._store is not None, "a run is known by its store"  # noqa: S101  the caller found the run there
        if run.ended is not None:
            return run.ended
        written = [one.time for one in (await read_tasks(self._store, run.id)).values()]
        return max([run.started, *written])

    async def _hubs(self) -> list[Hub]:
        known = {find_hub(run, self._environ).root for run in (await self.runs()).values() if run is not None}
        home = await anyio.to_thread.run_sync(list_hubs, self._home)
        return [Hub(root) for root in sorted(known | {hub.root for hub in home}) if await hub_exists(Hub(root))]

    async def _of_hub(self, hub: Hub) -> list[Leftover]:
        orphan = await self.orphaned_hub(hub)
        if orphan is not None:
            return [] if any([await lock.is_held() for lock in await run_locks(hub)]) else [orphan]
        return [
            *await _without_active_runs(await self.unknown_runs(hub)),
            *await self.slots(hub),
            *await self.stale_files(hub),
        ]

    async def slots(self, hub: Hub) -> list[Leftover]:
        """Return the unused worktree slots of a hub, except those preserved for a session."""
        found = [await inspect_slot(slot) for slot in await anyio.to_thread.run_sync(list_slots, hub)]
        return [leftover for leftover in found if leftover is not None]

    async def orphaned_hub(self, hub: Hub) -> Leftover | None:
        """Return an inactive hub whose repositories and stores no longer exist."""
        known = await anyio.to_thread.run_sync(origin.read_origin, hub.root)
        if known is None or not await anyio.to_thread.run_sync(known.is_gone):
            return None
        if any(run is None or find_hub(run, self._environ) == hub for run in (await self.runs()).values()):
            return None
        try:
            refs = len(await salvage.list_unmerged_work(Git(hub.trusted, environ=self._environ)))
        except GitError:
            refs = None
        left = await anyio.to_thread.run_sync(lambda: len(find_paths(hub.sessions, "*/*")))
        status, reason = assess_hub(known.name, refs, left)
        return Leftover(LeftoverKind.HUB, str(hub.root), status, reason, str(hub.root))

    async def unknown_runs(self, hub: Hub) -> list[Leftover]:
        """Return leftovers of runs that are certainly in no state store."""
        left = await anyio.to_thread.run_sync(_folders, hub.sessions)
        refs = await anyio.to_thread.run_sync(_folders, hub.trusted / INTERNAL_REFS)
        # Read the runs last: a run is recorded before it has a folder.
        runs = await self.runs()
        known = await anyio.to_thread.run_sync(origin.read_origin, hub.root)
        if known is None or not await anyio.to_thread.run_sync(self._is_only_store, known):
            return []
        found = []
        for run in sorted(left.keys() - runs.keys()):
            found += await _empty_run_folders(hub, run)
            for worktree in await anyio.to_thread.run_sync(worktrees.list_worktrees, hub, run, None):
                held = classify_worktree(None, worktree.attempt, is_check=worktree.is_check)
                found.append(_leftover(worktree, *assess_orphan(held)))
        for run in sorted(refs.keys() - runs.keys()):
            # A run that is being created has refs before it is recorded.
            if is_stale_file(refs[run], self._clock.now()):
                reason = "refs of an unknown run; their commits were fetched from the repository"
                place = f"{INTERNAL_REFS}/{run}/"
                found.append(Leftover(LeftoverKind.REFS, place, LeftoverStatus.LEFT_OVER, reason, str(hub.root), run))
        return found

    def _is_only_store(self, known: HubOrigin) -> bool:
        """Return True if every other store that may record a hub's runs was deleted.

        Also requires that ours is intact. Blocks.
        """
        if self._store is not None and any(one.keys is None or one.keys for one in self._store.damage):
            return False
        paths = () if self._store is None else self._store.local_paths()
        ours = None if self._url is None else StoreLocation.of(self._url, paths).url
        return all(one.url == ours or one.is_gone() for one in known.stores)

    async def stale_files(self, hub: Hub) -> list[Leftover]:
        """Return files that killed commands left in a hub."""
        found = await anyio.to_thread.run_sync(list_stale_files, hub, self._clock.now())
        if not any(
            [await lock.is_held() for lock in await run_locks(hub)]
        ):  # otherwise the running process deletes them
            found += await anyio.to_thread.run_sync(list_trash, hub)
        return [_temporary(path, hub) for path in found]

    async def _half_built(self) -> list[Leftover]:
        found = await anyio.to_thread.run_sync(list_incomplete_hubs, self._home)
        return [_temporary(hub.staging_root, hub) for hub in found if not await hub.creation_lock.is_held()]

    async def stale_excludes(self) -> list[Leftover]:
        """Return temporary files of interrupted writes to the user's `info/exclude`."""
        if self.project is None:
            return []
        try:
            repository = await find_repository(self.project.top, Git(None, as_user=True, environ=self._environ))
        except RefusedError:  # the project of a URL
            return []
        found = await anyio.to_thread.run_sync(find_stale_exclude_files, repository.git_dir)
        return [_temporary(path, None) for path, changed in found.items() if is_stale_file(changed, self._clock.now())]


def _readable(found: Document) -> RunDocument | None:
    return RunDocument.model_validate_json(found.encoded) if is_readable(found) else None


async def inspect_slot(slot: WorktreeSlot, *, is_ours: bool = False) -> Leftover | None:
    """Return a worktree slot with its cleanup status; None if it is in use or locked.

    `is_ours`: the caller holds the lock.
    """
    if not is_ours and await slot.lock.is_held():
        return None
    verdict = await anyio.to_thread.run_sync(assess_slot, slot)
    return None if verdict is None else Leftover(LeftoverKind.SLOT, str(slot.root), *verdict, str(slot.hub.root))


def _leftover(worktree: Worktree, status: LeftoverStatus, reason: str) -> Leftover:
    place, hub = str(worktree.root), str(worktree.hub.root)
    return Leftover(LeftoverKind.WORKTREE, place, status, reason, hub, worktree.run, worktree.task)


def _temporary(path: Path, hub: Hub | None) -> Leftover:
    return Leftover(
        LeftoverKind.TEMPORARY, str(path), LeftoverStatus.LEFT_OVER, _KILLED, None if hub is None else str(hub.root)
    )


async def _empty_run_folders(hub: Hub, run: str) -> list[Leftover]:
    """Return a run's folder of worktrees if it is empty."""
    folder = hub.sessions / run
    if not await anyio.to_thread.run_sync(lambda: _is_empty(folder) and is_inside_hub(hub, folder)):
        return []
    return [Leftover(LeftoverKind.WORKTREE, str(folder), LeftoverStatus.LEFT_OVER, "empty folder", str(hub.root), run)]


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


async def hub_exists(hub: Hub) -> bool:
    """Return True if a hub exists."""
    return await anyio.to_thread.run_sync(hub.trusted.is_dir)


async def _without_active_runs(found: Sequence[Leftover]) -> list[Leftover]:
    """Return the leftovers of inactive runs.

    Only runs with leftovers are checked: the check briefly takes the lock of the run, and a process that joins the run
    at that moment is refused.
    """
    active = set()
    for hub, run in {(Path(str(leftover.hub)), str(leftover.run)) for leftover in found}:
        if await hub_exists(Hub(hub)) and await _is_active(Hub(hub), run):
            active.add(run)
    return [leftover for leftover in found if leftover.run not in active]


async def _is_active(hub: Hub, run: str) -> bool:
    return await hub.run_lock(run).is_held() or bool(await hub.liveness_locks.held(run))


async def run_locks(hub: Hub) -> list[FileLock]:
    """Return the locks of all runs that have used a hub, and of their orchestrators."""
    found = await anyio.to_thread.run_sync(lambda: find_paths(hub.root / "locks", "run-*"))
    return [FileLock(path) for path in found]


def _folders(parent: Path) -> dict[str, float]:
    """Return subfolders by name, with modification times (wall-clock seconds)."""
    found = {}
    for path in find_paths(parent, "*"):
        with suppress(FileNotFoundError):  # removed meanwhile
            status = path.stat()
            if S_ISDIR(status.st_mode):
                found[path.name] = status.st_mtime
    return found


def list_hubs(home: Path) -> list[Hub]:
    """Return the hubs in the home folder. Blocks."""
    folders = [path for path in sorted(home.iterdir()) if not path.is_symlink()] if home.is_dir() else []
    return [Hub(path) for path in folders if _HUB.fullmatch(path.name) and (path / "trusted.git").is_dir()]


def list_incomplete_hubs(home: Path) -> list[Hub]:
    """Return the hubs whose creation or removal is running or was interrupted. Blocks."""
    paths = sorted(home.iterdir()) if home.is_dir() else []
    hubs = [Hub(path.with_name(path.name.removesuffix(".new"))) for path in paths if path.name.endswith(".new")]
    return [hub for hub in hubs if _HUB.fullmatch(hub.root.name) and _has_only_hub_parts(hub.staging_root)]


def _has_only_hub_parts(folder: Path) -> bool:
    """Return whether a folder contains only parts of a hub."""
    return folder.is_dir() and not folder.is_symlink() and {path.name for path in folder.iterdir()} <= _PARTS


def list_trash(hub: Hub) -> list[Path]:
    """Return the folders in a hub's trash, even while they are deleted. Blocks."""
    return [path for path in find_paths(hub.trash, "*") if is_inside_hub(hub, path)]


def list_stale_files(hub: Hub, now: float) -> list[Path]:
    """Return a hub's temporary files and locks without an owner at `now`. Blocks.

    None of them is the only copy of any data. They are unused if no git command is running for the repository and, for
    files of our other commands, if they are old enough.
    """
    git_files = {
        file.path
        for file in (*list_lock_files(hub), *list_partial_objects(hub.trusted))
        if is_inside_hub(hub, file.path)
    }
    temporaries = [path for path in dict.fromkeys(_temporaries(hub)) if is_inside_hub(hub, path)]
    stale = git_files.union(path for path in temporaries if is_stale_file(_modified(path, now), now))
    return sorted(stale) if stale and not is_git_running(hub.trusted) else []


def _temporaries(hub: Hub) -> Iterator[Path]:
    yield from hub.root.glob("*.json.new")
    sessions = {f"{path.parent.name}-{path.name}" for path in find_paths(hub.sessions, "*/*")}
    for path in hub.indexes.glob("*"):
        if (path.is_dir() and _LIVE_DIFF.fullmatch(path.name)) or not _owners(path.name) & sessions:
            yield path


def _owners(name: str) -> set[str]:
    """Return the sessions that an entry of the `indexes` folder may belong to."""
    parts = name.split(".")
    return {".".join(parts[: end + 1]) for end in range(len(parts))}


def _modified(path: Path, now: float) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return now
