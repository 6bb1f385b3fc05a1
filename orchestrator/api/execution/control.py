"""A user's requests to a run: cancel, retry, enable adapters, restore."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import anyio
import anyio.to_thread

from orchestrator.api.context import ProjectContext
from orchestrator.api.execution.file_comparison import apply_config_file
from orchestrator.api.execution.leadership import RunEntry, hold_run_lock, run_active_error
from orchestrator.api.run_reader import RunReader
from orchestrator.config.coordination import resolve_coordination
from orchestrator.domain.documents.stored import CheckpointOrigin
from orchestrator.domain.runs.model import RequestAction, RunDocument, RunRequest
from orchestrator.domain.runs.statuses import FINAL_STATUSES
from orchestrator.domain.scheduling.claims import Role
from orchestrator.engine.reports.report import RunRecord
from orchestrator.engine.scheduler.recovery import has_active_peers
from orchestrator.engine.scheduler.requests import (
    check_adapters_to_enable,
    check_encoding,
    check_phase,
    check_request,
    is_handled,
    submit_request,
)
from orchestrator.engine.scheduler.restore import RestoreResult, restore_checkpoint
from orchestrator.engine.state.records import check_task, read_spec, read_task
from orchestrator.engine.state.reload import FileChanges
from orchestrator.engine.state.writer import take_leadership
from orchestrator.errors import REQUEST_RECORDED, LockHeld, RequestTimeout, RunActive
from orchestrator.locking.orchestrators import create_owner
from orchestrator.protocols import Guard
from orchestrator.repo.worktrees.hub import find_hub
from orchestrator.state.documents.checkpoints import create_checkpoint, plan_restore
from orchestrator.system import slow_waits
from orchestrator.system.file_lock import LockHolder
from orchestrator.system.process_table import process_stat

#: Seconds between two checks whether a request was performed.
_REQUEST_POLL_INTERVAL = 0.1
#: Seconds to wait for a request; the leader needs half of that if a session has to stop first.
_REQUEST_TIMEOUT = 120.0
#: Seconds to wait for the end of cancelled sessions before the command reports the status.
_STOP_TIMEOUT = 15.0


@dataclass(frozen=True, slots=True)
class RunController:
    """Requests on the runs of a project, performed here or by the leader of the run."""

    _context: ProjectContext

    async def perform(
        self,
        run: str,
        action: RequestAction,
        tasks: Sequence[str],
        reason: str | None = None,
        phase: str | None = None,
        reload: FileChanges | None = None,
        adapters: Sequence[str] = (),
    ) -> None:
        """Submit a request to the run's leader, or apply it here if there is none.

        Without `tasks` it applies to all unfinished ones; without `adapters`, to all unavailable ones. With `reload`,
        the settings of the file are applied to the tasks first.
        """
        context, reader = self._context, RunReader(self._context)
        record = await reader.record(run)
        record.run.check_not_imported()
        check_encoding("reason", reason or "")
        for task in tasks:
            await check_task(context.store, record.run, task)
        include_waiting = reload is not None and phase is None
        is_live = await reader.index.has_live_process(run)
        check_request(action, tasks, record, include_waiting=include_waiting, is_live=is_live)
        await self._check_phase(record, tasks, phase)
        adapters = (
            check_adapters_to_enable(record, adapters, context.clock.now()) if action is RequestAction.ENABLE else ()
        )
        requested = _requested_tasks(record, action, tasks)
        if stops_sessions := action in {RequestAction.CANCEL, RequestAction.IGNORE}:
            is_live = await reader.index.is_live(run)
            await create_checkpoint(
                context.store, run, f"before {action}", created_by=CheckpointOrigin.COMMAND, is_live=is_live
            )
        if reload is not None:
            await apply_config_file(context, run, requested, reload)
        request = await submit_request(context.store, context.clock, run, action, requested, reason, phase, adapters)
        await self._wait_until_handled(record.run, request)
        if stops_sessions and await reader.index.is_live(run):
            await self._wait_until_ended(run, requested)

    async def _wait_until_handled(self, run: RunDocument, request: RunRequest) -> None:
        """Wait until the leader has performed a request; without a leader, perform it."""
        context, waiting = self._context, _RequestWait()
        hub = await RunReader(context).index.hub(run)
        entry = RunEntry(context, run, hub, resolve_coordination(run.coordination, context.environ))
        while not await is_handled(context.store, run.id, request):
            try:
                await self._apply_pending(entry)
            except RunActive as other:
                await waiting.pause(other.pid, other.host)
            except LockHeld as held:
                if not held.owner_lives:
                    raise run_active_error(run.id, held) from None
                holder = await anyio.to_thread.run_sync(LockHolder.read, held.path)
                await waiting.pause(None if holder is None else holder.pid, socket.gethostname())

    async def _apply_pending(self, entry: RunEntry) -> None:
        """Lead a run briefly, which applies its pending requests."""
        reader, run = RunReader(self._context), entry.run
        async with hold_run_lock(entry.hub, run.id) as lock, entry.lead(lock) as (ledger, run_context):
            now = await reader.record(run.id)
            has_ended = run.ended is not None or not now.has_open_tasks
            if has_ended and not await has_active_peers(ledger):
                await ledger.run_state.finish(reader.describe(now, is_live=False, has_ended=True).status)
            async with run_context.pool(sessions=0):
                pass  # cleans up: the run may never be resumed

    async def _check_phase(self, record: RunRecord, tasks: Sequence[str], phase: str | None) -> None:
        for task in tasks if phase is not None else ():
            workflow = (await read_spec(self._context.store, record.run.id, task)).workflow
            phases = () if workflow is None else record.run.workflows[workflow]
            check_phase(record.run.id, task, phase or "", [one.name for one in phases], record.tasks[task])

    async def _wait_until_ended(self, run: str, tasks: Sequence[str]) -> None:
        """Wait until cancelled tasks, and a run without other tasks, have ended, at most for `_STOP_TIMEOUT`."""
        store = self._context.store
        with anyio.move_on_after(_STOP_TIMEOUT):
            for task in tasks:
                while (await read_task(store, run, task)).status not in FINAL_STATUSES:  # noqa: ASYNC110  another process
                    await anyio.sleep(_REQUEST_POLL_INTERVAL)
            reader = RunReader(self._context)
            while (record := await reader.record(run)).run.ended is None and not record.has_open_tasks:
                if not await reader.index.has_live_process(run):
                    return
                await anyio.sleep(_REQUEST_POLL_INTERVAL)

    async def restore(self, checkpoint: str, *, force: bool) -> RestoreResult:
        """Restore a checkpoint; see `Checkpoints.restore`."""
        context, guards = self._context, dict[str, Guard]()
        async with AsyncExitStack() as stack:
            # Until this process leads them, runs may continue, and other runs may change so that they need a restore.
            while True:
                plan = await plan_restore(context.store, checkpoint)
                new = [run for run in plan.runs.values() if run.id not in guards]
                if not new:
                    return await restore_checkpoint(context.store, plan, list(guards.values()), context.environ)
                for run in new:
                    await _block_run(stack, run, context.environ, force=force)
                for run in new:
                    me = create_owner(Role.LEADER)
                    guards[run.id] = await take_leadership(context.store, context.clock, run.id, me)


async def _block_run(stack: AsyncExitStack, run: RunDocument, environ: Mapping[str, str], *, force: bool) -> None:
    """Prevent processes from joining a run; with `force`, one may already be active."""
    hub = find_hub(run, environ)
    if not await anyio.to_thread.run_sync(hub.trusted.is_dir):  # no process can be active without it
        return
    try:
        await stack.enter_async_context(hold_run_lock(hub, run.id))
        if (living := await hub.liveness_locks.held(run.id)) and not force:
            raise await living[0].held_error()
    except LockHeld as held:
        if not force:
            raise run_active_error(run.id, held, or_else="take it over with --force") from None


class _RequestWait:
    """The wait until a run's leader has performed a request."""

    def __init__(self) -> None:
        self._began, self._is_noticed = anyio.current_time(), False

    async def pause(self, pid: int | None, host: str) -> None:
        """Sleep until the next check; log a notice if the wait is long.

        Raises RequestTimeout after the limit.
        """
        waited = anyio.current_time() - self._began
        if waited >= _REQUEST_TIMEOUT:
            raise RequestTimeout(_describe_process(pid, host), _REQUEST_TIMEOUT)
        if waited >= slow_waits.NOTICE_AFTER and not self._is_noticed:
            self._is_noticed = True
            slow_waits.logger.warning("waiting for %s: %s", _describe_process(pid, host), REQUEST_RECORDED)
        await anyio.sleep(_REQUEST_POLL_INTERVAL)


def _describe_process(pid: int | None, host: str) -> str:
    """Return a description of a process that does not answer. Blocks."""
    if pid is None:
        return "the run's process, which has not answered yet"
    if host != socket.gethostname():
        return f"process {pid} on {host}, which has not answered yet"
    stat = process_stat(pid)
    return f"process {pid}, which {'is stopped' if stat is not None and stat.is_stopped else 'has not answered yet'}"


def _requested_tasks(record: RunRecord, action: RequestAction, tasks: Sequence[str]) -> Sequence[str]:
    """Return the tasks of a request: the named ones, or all unfinished ones."""
    if action is RequestAction.ENABLE:
        return ()
    return tasks or [task for task, one in record.tasks.items() if one.status not in FINAL_STATUSES]
