"""Entry into a run, as its leader or as an additional worker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import anyio

from orchestrator.api.context import ProjectContext
from orchestrator.api.execution.tracked_tasks import find_new_tasks
from orchestrator.config.coordination import (
    ENVIRONMENT_VARIABLES,
    CoordinationOverrides,
    read_environment,
)
from orchestrator.config.model import make_adapters, restore_adapters
from orchestrator.domain.events.runs import PluginSkipped
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.scheduling.claims import OrchestratorIdentity, Role
from orchestrator.domain.settings.run_settings import CoordinationSettings
from orchestrator.engine.run_context import RunContext, open_run_context, with_session_service
from orchestrator.engine.scheduler.recovery import recover
from orchestrator.engine.scheduler.requests import RequestHandler
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import LockHeld, RefusedError, StoreUnavailable
from orchestrator.locking.orchestrators import RunMembership, create_owner
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.system.file_lock import HeldLock

#: Seconds to wait for the last git commands of a killed leader before a resume fails.
LOCK_HANDOVER_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class RunEntry:
    """This process's entry into a run: project, run and coordination settings."""

    context: ProjectContext
    run: RunDocument
    hub: Hub
    settings: CoordinationSettings
    labels: tuple[str, ...] = ()
    """The labels of this machine."""

    @asynccontextmanager
    async def lead(self, lock: HeldLock) -> AsyncIterator[tuple[Ledger, RunContext]]:
        """Lead the run: recover an earlier leader's tasks, apply pending requests.

        `lock` is the lock from `hold_run_lock`.
        """
        role = Role.WORKER if self.settings.role == "worker" else Role.LEADER
        me = create_owner(role, shares=self.settings.enabled, labels=self.labels)
        store, clock = self.context.store, self.context.clock
        async with self.hub.liveness_locks.of(self.run.id, me.id).hold(0) as life:
            members = self._membership(me)
            opened = await self._open_run_context([lock.fd, life.fd], None)
            sandbox = opened.tools.sandbox.kind
            redactor = opened.tools.redactor
            work, is_shared = opened.shared_work, self.settings.enabled
            ledger = await Ledger.take(store, clock, redactor, members, sandbox, work, is_shared=is_shared)
            async with _leave_on_exit(members):
                await _check_sharing(members)
                for left_out in (await self.context.plugins.load()).left_out:
                    await ledger.note(PluginSkipped(plugin=left_out.plugin.name, reason=str(left_out)))
                run_context = self._with_session_service(opened, ledger)
                await recover(ledger, run_context)
                handler = RequestHandler(ledger)
                for request in await handler.pending():
                    await handler.apply(request)
                yield ledger, run_context

    @asynccontextmanager
    async def join(self) -> AsyncIterator[tuple[Ledger, RunContext]]:
        """Join the run as an additional worker during the body."""
        role = Role.LEADER if self.settings.role == "leader" else Role.WORKER
        me = create_owner(role, labels=self.labels)
        async with self.hub.liveness_locks.of(self.run.id, me.id).hold(0) as life:
            members = self._membership(me)
            opened = await self._open_run_context([life.fd], me.id)
            sandbox = opened.tools.sandbox.kind
            await _check_sharing(members)  # before and after joining, because another process may join in between
            store, clock = self.context.store, self.context.clock
            redactor, work = opened.tools.redactor, opened.shared_work
            ledger = await Ledger.join(store, clock, redactor, members, sandbox, work)
            async with _leave_on_exit(members):
                await _check_sharing(members)
                yield ledger, self._with_session_service(opened, ledger)

    def _membership(self, me: OrchestratorIdentity) -> RunMembership:
        context, is_dead = self.context, self.hub.liveness_locks.is_dead
        return RunMembership(context.store, context.clock, self.run.id, me, self.settings, is_dead)

    async def _open_run_context(self, lock_fds: Sequence[int], worker: str | None) -> RunContext:
        context, plugins = self.context, await self.context.plugins.load()
        forge = self.run.pull_requests
        configs = restore_adapters(self.run.adapters, plugins.adapters, plugins.explain)
        return await open_run_context(
            self.run,
            self.hub,
            context.project,
            configs,
            make_adapters(configs, plugins.adapters),
            store=context.store,
            lock_fds=lock_fds,
            worker=worker,
            environ=context.environ,
            clock=context.clock,
            open_forge=None if forge is None else partial(plugins.open, "forge", "pull_requests", forge),
            find_new_tasks=None if self.run.follow is None else partial(find_new_tasks, context.store, plugins),
        )

    def _with_session_service(self, run_context: RunContext, ledger: Ledger) -> RunContext:
        if not (self.settings.enabled and self.settings.tools):
            return run_context
        context, timeout = self.context, self.settings.lock_timeout
        return with_session_service(run_context, ledger, context.store, context.clock, context.project, timeout)


@asynccontextmanager
async def hold_run_lock(hub: Hub, run: str) -> AsyncIterator[HeldLock]:
    """Hold the run's lock; wait only for git commands of a dead leader."""
    lock = hub.run_lock(run)
    async with AsyncExitStack() as stack:
        try:
            held = await stack.enter_async_context(lock.hold(0))
        except LockHeld as taken:
            if taken.owner_lives:
                raise
            held = await stack.enter_async_context(lock.hold(LOCK_HANDOVER_TIMEOUT, awaited="a git command"))
        yield held


@asynccontextmanager
async def _leave_on_exit(members: RunMembership) -> AsyncIterator[None]:
    """Record at exit, even after errors, that this process has left the run."""
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True), suppress(StoreUnavailable):
            await members.leave()


async def _check_sharing(members: RunMembership) -> None:
    """Raise RefusedError if another process is active and either does not share."""
    peer = await members.peers.find_exclusive_peer()
    if peer is None:
        return
    message = f"process {peer.owner.pid} on {peer.owner.host} is active in run {members.run}"
    stop = f"stop it with `kill {peer.owner.pid}`"
    if peer.owner.shares:
        raise RefusedError(message, f"wait for it to end, {stop}, or enable sharing for this process")
    command = f"`{ENVIRONMENT_VARIABLES['enabled']}=true council resume {members.run}`"
    raise RefusedError(f"{message} and does not share it", f"wait for it to end, or {stop}, then {command}")


def sharing_disabled_error(run: str, environ: Mapping[str, str], options: CoordinationOverrides | None) -> RefusedError:
    """Return the error for joining a run whose settings disable sharing."""
    name = ENVIRONMENT_VARIABLES["enabled"]
    if options is not None and options.enabled is False:
        remedy = "remove the option that disables sharing for this process"
    elif read_environment(environ).enabled is False:
        remedy = f"unset {name}, or set it to true"
    else:
        command = f"stop it, then `{name}=true council resume {run}`"
        remedy = f"{command}; `coordination: {{enabled: true}}` in the file applies to new runs"
    return RefusedError(f"run {run} is not shared", remedy)


def run_active_error(run: str, held: LockHeld, *, or_else: str = "") -> RefusedError:
    """Return the error for a run with an active process or leftover processes."""
    stop = "stop it with SIGTERM" if held.pid is None else f"stop it with `kill {held.pid}`"
    wait = f"wait until it ends (`council watch {run}` shows it)"
    remedy = ", or ".join(filter(None, (wait, stop, or_else)))
    if not held.owner_lives:
        remedy = f"kill its leftover processes: `fuser {held.path}` lists them"
    return RefusedError(f"run {run} is active in {held.holder}", remedy)
