"""The removal of leftovers of runs from this machine.

Each one is checked again before its removal, under the lock of its possible users. Leftovers with work that may exist
nowhere else are removed only on request; preserved branches are handled by `council salvage`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import anyio.to_thread

from orchestrator.domain.documents.stored import CheckpointOrigin
from orchestrator.domain.events.runs import RunRemoved
from orchestrator.domain.runs.leftovers import Leftover, LeftoverKind, is_unchanged
from orchestrator.engine.cleanup.orphans import OrphanFinder, hub_exists, inspect_slot, run_locks
from orchestrator.engine.scheduler.recovery import end_orphaned_session
from orchestrator.engine.session_api.notes import KIND as NOTE
from orchestrator.engine.state.records import run_key
from orchestrator.errors import GitError, LockHeld, StoreUnavailable
from orchestrator.locking.ownership import ownership_scope
from orchestrator.project import Project
from orchestrator.protocols import Commit, Document, Event, Store, Write
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.files.file_trees import disk_usage, remove_all
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.slots import WorktreeSlot, empty_trash, move_to_trash, read_session_slot
from orchestrator.state.documents.checkpoints import CHECKPOINT_KIND as CHECKPOINT
from orchestrator.state.documents.checkpoints import create_checkpoint
from orchestrator.state.documents.log_reader import is_run_document
from orchestrator.state.documents.update import retry_on_conflict
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: The kinds of documents that remain when a run is removed.
_KEPT_KINDS: Final = frozenset({"lease", "claim", "cursor", CHECKPOINT})


@dataclass(frozen=True, slots=True)
class RemovalResult:
    """The outcome of a removal; `error` is the reason for a failed one."""

    leftover: Leftover
    error: str | None


class Cleaner:
    """The removal of leftovers in `home` and, with a project, of its runs."""

    def __init__(
        self,
        home: Path,
        environ: Mapping[str, str],
        clock: Clock,
        project: Project | None = None,
        store: Store | None = None,
        url: str | None = None,
    ) -> None:
        """Set up a cleaner; `home` is the folder of all hubs.

        A project requires its store and the store's URL.
        """
        self._environ, self._store = environ, store
        self._checkpoints: dict[str, str] = {}
        self._survey = OrphanFinder(home, environ, clock, project, store, url)

    async def find(
        self, *, logs: float | None = None, runs: float | None = None, include_interrupted: bool = False
    ) -> list[Leftover]:
        """Return all leftovers, including those that must stay, with their sizes.

        `logs` adds the output of runs that ended more than this many seconds ago. `runs` likewise adds the records of
        such runs, and with `include_interrupted` those of interrupted runs without a commit in that time.
        """
        found = await self._survey.find_all()
        if logs is not None:
            found += await self._survey.logs(logs)
        if runs is not None:
            found += await self._survey.old_runs(runs, include_interrupted=include_interrupted)
        return [await anyio.to_thread.run_sync(_with_size, one, self._survey.project) for one in found]

    async def remove(self, found: Sequence[Leftover]) -> list[RemovalResult]:
        """Remove leftovers returned by `find`, except those that are needed again.

        A checkpoint of each affected run is created first. It can restore a removed record, but not the run's output.
        """
        self._checkpoints |= await self._make_checkpoints({one.run for one in found if one.run is not None})
        return [RemovalResult(one, await self._problem(replace(one, bytes=0))) for one in found]

    async def _make_checkpoints(self, runs: Collection[str]) -> dict[str, str]:
        known, made = await self._survey.runs(), {}
        for run in sorted(known.keys() & runs):
            with suppress(StoreUnavailable):  # cleaning is the remedy for a full disk
                if self._store is not None:
                    one = await create_checkpoint(
                        self._store, run, "before clean", created_by=CheckpointOrigin.COMMAND, is_live=False
                    )
                    made[run] = one.id
        return made

    async def _problem(self, one: Leftover) -> str | None:
        removals = {
            LeftoverKind.WORKTREE: self._remove_worktree,
            LeftoverKind.SLOT: self._remove_place,
            LeftoverKind.REFS: self._remove_refs,
            LeftoverKind.HUB: self._remove_hub,
            LeftoverKind.TEMPORARY: self._remove_temporary,
            LeftoverKind.LOGS: self._remove_logs,
            LeftoverKind.RUN: self._remove_run,
        }
        try:
            is_done = await removals[one.kind](one)
        except GitError as error:
            return error.stderr
        except (LockHeld, StoreUnavailable) as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)
        return None if is_done else "it is in use again, or has changed"

    async def _remove_worktree(self, one: Leftover) -> bool:
        async with self._hold_run(one) as (git, run):
            known = (await self._survey.runs()).get(run)
            found = await (self._survey.unknown_runs(_hub(one)) if known is None else self._survey.worktrees(known))
            if one not in found:
                return not await anyio.Path(one.name).exists()
            folder = _hub(one).sessions / run
            for worktree in await anyio.to_thread.run_sync(worktrees.list_worktrees, _hub(one), run, None):
                if str(worktree.root) == one.name:
                    await end_orphaned_session(worktree)
                    await self._delete(worktree.hub, await worktrees.remove_worktree(worktree), git.keep_fds)
            await anyio.to_thread.run_sync(worktrees.remove_if_empty, folder)
        return True

    async def _remove_place(self, one: Leftover) -> bool:
        place = WorktreeSlot(_hub(one), int(Path(one.name).name))
        async with place.lock.hold(0) as lock:
            if not await anyio.Path(place.root).exists():
                return True
            if await inspect_slot(place, is_ours=True) != one:
                return False
            thrown = await anyio.to_thread.run_sync(move_to_trash, place.hub, place.root)
            await self._delete(place.hub, thrown, (lock.fd,))
        await self._survey.release_stale_ports()
        return True

    async def _delete(self, hub: Hub, thrown: Sequence[Path], keep_fds: Sequence[int]) -> None:
        await remove_all(thrown, self._environ, keep_fds)
        with suppress(GitError):  # other content of the trash is irrelevant here
            await empty_trash(hub, self._environ, keep_fds)

    async def _remove_refs(self, one: Leftover) -> bool:
        async with self._hold_run(one) as (git, _):
            if one not in await self._survey.unknown_runs(_hub(one)):
                return False
            listed = await git("for-each-ref", "--format=delete %(refname) %(objectname)", one.name)
            await git("update-ref", "--stdin", input_=listed.stdout)
        return True

    async def _remove_logs(self, one: Leftover) -> bool:
        async with self._hold_run(one) as (git, run):
            known = (await self._survey.runs()).get(run)
            if known is None or known.ended is None:
                return False
            await remove_all([Path(one.name)], self._environ, git.keep_fds)
        return True

    async def _remove_run(self, one: Leftover) -> bool:
        async with self._hold_run(one) as (git, run):
            known = (await self._survey.runs()).get(run)
            if known is None:
                return True
            project, store, checkpoint = self._survey.project, self._store, self._checkpoints.get(run)
            if project is None or store is None:
                return False
            if checkpoint is None:
                raise StoreUnavailable(
                    f"run {run}", "its checkpoint could not be created", "free some disk space, and clean again"
                )
            # An interrupted run is included only on request; an ended one is recorded as ended.
            if not is_unchanged(one, await self._survey.old_run(known, include_interrupted=True)):
                return False
            # Logs first: while the run is recorded, a later clean finds them again.
            await remove_all([project.logs(run)], self._environ, git.keep_fds)
            await remove_run(store, run, checkpoint)
        return True

    @asynccontextmanager
    async def _hold_run(self, one: Leftover) -> AsyncIterator[tuple[Git, str]]:
        """Prevent processes from joining a run. Raises LockHeld if one is active.

        Yields git in the trusted repository, whose commands inherit the lock, and the run's id.
        """
        assert one.run is not None, "the leftover belongs to a run"  # noqa: S101
        async with AsyncExitStack() as stack:
            fds: tuple[int, ...] = ()
            if await hub_exists(_hub(one)):  # without a hub no process can be active
                fds = ((await stack.enter_async_context(_hub(one).run_lock(one.run).hold(0))).fd,)
                if living := await _hub(one).liveness_locks.held(
                    one.run
                ):  # additional workers, or workers after the leader has ended
                    raise await living[0].held_error()
            yield Git(_hub(one).trusted, keep_fds=fds, environ=self._environ), one.run

    async def _remove_hub(self, one: Leftover) -> bool:
        hub = _hub(one)
        async with AsyncExitStack() as stack:
            fds = ((await stack.enter_async_context(hub.creation_lock.hold(0))).fd,)
            if not await hub_exists(hub):
                return True
            for lock in await run_locks(hub):
                await stack.enter_async_context(lock.hold(0))
            if one != await self._survey.orphaned_hub(hub):
                return False
            for place in await anyio.to_thread.run_sync(lambda: list(hub.sessions.iterdir())):
                for worktree in await anyio.to_thread.run_sync(worktrees.list_worktrees, hub, place.name, None):
                    await end_orphaned_session(worktree)
            await remove_all([hub.staging_root], self._environ, fds)
            await anyio.to_thread.run_sync(hub.root.rename, hub.staging_root)
            await remove_all([hub.staging_root], self._environ, fds)
        return True

    async def _remove_temporary(self, one: Leftover) -> bool:
        async with AsyncExitStack() as stack:
            fds: tuple[int, ...] = ()
            if one.hub is not None:
                fds = ((await stack.enter_async_context(_hub(one).creation_lock.hold(0))).fd,)
            if not await self._is_stale_file(one):
                return not await anyio.Path(one.name).exists()
            await remove_all([Path(one.name)], self._environ, fds)
        return True

    async def _is_stale_file(self, one: Leftover) -> bool:
        if one.hub is None:
            return one in await self._survey.stale_excludes()
        return one.name == str(_hub(one).staging_root) or one in await self._survey.stale_files(_hub(one))


def _hub(one: Leftover) -> Hub:
    assert one.hub is not None, "the leftover is in a hub"  # noqa: S101
    return Hub(Path(one.hub))


def _with_size(one: Leftover, project: Project | None) -> Leftover:
    if one.kind is LeftoverKind.REFS:
        return one
    folders = [Path(one.name)]
    if one.kind is LeftoverKind.RUN and project is not None:
        folders = [project.logs(one.name)]
    if one.kind is LeftoverKind.WORKTREE and (place := read_session_slot(_hub(one), Path(one.name))) is not None:
        folders.append(place.root)
    return replace(one, bytes=sum(map(disk_usage, folders)))


async def remove_run(store: Store, run: str, checkpoint: str) -> None:
    """Delete the documents of an inactive run in one commit, which the checkpoint `checkpoint` can restore.

    Some small documents are not restored by checkpoints, and remain: the lease and the claims, whose epochs must keep
    increasing, and the cursors of sinks and trackers. The run's checkpoints remain as well. Notes of its sessions
    remain for later runs, unless the target was the run's own branch. Records of its orchestrators are deleted: their
    ids are never reused, and an orchestrator without a record counts as ended, so that its claims can be taken.
    """
    await retry_on_conflict(partial(_remove, store, run, checkpoint))
    failpoint("run.removed")


async def _remove(store: Store, run: str, checkpoint: str) -> None:
    found = (await store.at(await store.position())).documents
    notes = _notes_prefix(found.get(run_key(run)), run)
    writes = [
        Write(key, one.version, None)
        for key, one in found.items()
        if (is_run_document(key, run) and key.kind not in _KEPT_KINDS)
        or (notes and key.kind == NOTE and key.id.startswith(notes))
    ]
    if writes:
        removed = Event.of(RunRemoved(run=run, checkpoint=checkpoint))
        await store.commit(Commit(writes, [removed]))


def _notes_prefix(document: Document | None, run: str) -> str | None:
    """Return the id prefix of notes that no other run uses; None if there are none."""
    value = {} if document is None or document.damaged else document.value
    if value.get("target") != f"council/{run}":
        return None
    return f"{ownership_scope(value['repo'], value['target'])}/"
