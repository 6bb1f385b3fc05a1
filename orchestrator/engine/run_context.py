"""The repositories, tools and settings of a run, opened once per process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.config.accounts import account_secrets
from orchestrator.domain.events.base import RunEvent
from orchestrator.domain.events.coordination import SlotPortsChanged
from orchestrator.domain.events.runs import RunHooksSkipped
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.domain.settings.run_settings import (
    AdapterConfig,
    Check,
    SandboxSettings,
    TaskSpec,
    WorktreeSettings,
    known_prices,
)
from orchestrator.engine.accounting import Accounting
from orchestrator.engine.session_api.contexts import SessionContexts
from orchestrator.engine.session_api.details import find_workspace
from orchestrator.engine.session_api.locks import SessionLocks
from orchestrator.engine.session_api.notes import NoteStore
from orchestrator.engine.session_api.service import SessionService
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.port_leases import PortLeases
from orchestrator.engine.worktree_sources import make_provisions
from orchestrator.locking.file_locks import FileLocks
from orchestrator.locking.ownership import OwnershipRegistry, ownership_scope
from orchestrator.project import Project
from orchestrator.protocols import Adapter, Commit, Event, Forge, Guard, McpServer, Store
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing.structural_merge import find_merge_drivers
from orchestrator.repo.landing.target_branch import Target
from orchestrator.repo.source.run_repository import RunRepository, find_run_repository
from orchestrator.repo.source.shared_work import SharedWork
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.source.user_checkouts import LocalRepository
from orchestrator.repo.source.user_programs import SKIPPED_HOOKS_REASON, find_hooks_in_checkouts
from orchestrator.repo.worktrees.capacity import PoolLimits
from orchestrator.repo.worktrees.checkouts import SlotOptions
from orchestrator.repo.worktrees.hub import Hub, internal_ref_name
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.repo.worktrees.provisions import Provisions
from orchestrator.repo.worktrees.reset import KeepRules
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sandbox.credentials import find_credentials
from orchestrator.sessions.assignment import SessionResources
from orchestrator.sessions.sandbox.policy import choose_sandbox
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox
from orchestrator.sessions.setup.checks import CheckRunner
from orchestrator.sessions.setup.worktree_setup import WorktreeSetup
from orchestrator.sessions.supervision.supervisor_client import is_session_alive
from orchestrator.state.log.identity import known_store_folders
from orchestrator.system.clock import Clock


@dataclass(frozen=True, slots=True)
class NewTasks:
    """New tasks of trackers, by id, and the reasons why others are invalid, by tracker and id."""

    specs: Mapping[str, TaskSpec]
    refused: Mapping[tuple[str, str], str]


@dataclass(frozen=True, slots=True)
class RunContext:
    """The resources of an open run.

    `repository` is the user's repository, or None for a URL.
    """

    hub: Hub
    git: Git
    source: UpstreamRepository
    repository: LocalRepository | None
    target: Target
    configs: Mapping[str, AdapterConfig]
    adapters: Mapping[str, Adapter]
    tools: SessionResources
    worktrees: WorktreeSettings
    accounting: Accounting
    refs: Callable[[str], str]
    """Returns the full ref for a name; refs are separate per orchestrator, because concurrent fetches into one fail."""
    registry: OwnershipRegistry
    """Path ownership on the target."""
    shared_work: SharedWork | None
    """The work of the run at its remote; None if the run is on one machine."""
    check_slots: anyio.CapacityLimiter
    """Held by each check of this process, and by commands of its sessions (`council slot`)."""
    mcp_servers: tuple[McpServer, ...] = ()
    session_service: SessionService | None = None
    """The session API; None if it is not served."""
    open_forge: Callable[[], AbstractAsyncContextManager[Forge]] | None = None
    """Opens a connection to the forge; None if tasks do not land by pull requests."""
    find_new_tasks: Callable[[RunDocument], Awaitable[NewTasks]] | None = None
    """Finds the new tasks of the run's trackers; None if the run takes none."""

    def pool(self, *, sessions: int) -> AbstractAsyncContextManager[SlotPool]:
        """Open the worktree slots of the run.

        There is one warm slot per session, and one for checks. With zero sessions, this only discards and deletes
        leftovers of a killed owner.
        """
        setup, config = self.tools.worktree_setup, self.worktrees
        limits = PoolLimits(config.max, config.max_size)
        keep_patterns = [(pattern, "") for pattern in config.keep_ignored]
        keep_patterns += [
            (pattern, name) for name, adapter_config in self.configs.items() for pattern in adapter_config.keep_ignored
        ]
        set_up = setup.set_up if config.setup else None
        clear = setup.tear_down if config.setup or config.teardown else None
        options = SlotOptions(
            config.sparse, KeepRules(tuple(keep_patterns)), set_up, clear, setup.keys if config.setup else None
        )
        warm, checks = min(sessions, config.max), int(0 < sessions < config.max)
        return SlotPool.open(self.git, self.hub, self.tools.clock, limits, options, warm=warm, warm_checks=checks)

    def checks(
        self,
        pool: SlotPool,
        run: str,
        task: str,
        attempt: int,
        spec: TaskSpec,
        checks: Sequence[Check],
        checker: str = "",
    ) -> CheckRunner:
        """Return a runner of checks for the work of an attempt.

        `checker` distinguishes checks of the same attempt that may run concurrently.
        """
        return CheckRunner(
            pool=pool.checks,
            worktree_setup=self.tools.worktree_setup,
            worktree=Worktree(self.hub, run, task, attempt, is_check=True, checker=checker),
            checks=checks,
            timeout=spec.checks_timeout,
            env=spec.checks_env,
            sandbox=self.tools.sandbox,
            redactor=self.tools.redactor,
            logs=self.tools.logs,
            environ=self.tools.environ,
        )


def hidden_folders(site: RunRepository, project: Project, stores: Sequence[Path], hub: Hub) -> tuple[Path, ...]:
    """Return the folders hidden from sessions. Blocks.

    They are the user's repository, all stores (`stores` are the paths of this run's store) and council's repositories.
    """
    hidden = {
        project.folder,
        hub.root.parent,
        *stores,
        *known_store_folders(hub.root.parent),
    }
    if site.repository is not None:
        git_dir = site.repository.git_dir
        # The main checkout of a linked worktree belongs to the user as well.
        hidden |= {git_dir, git_dir.parent if git_dir.name == ".git" else git_dir, site.repository.top or git_dir}
    elif site.location.startswith("file://"):
        hidden.add(Path(site.location.removeprefix("file://")))
    return tuple(sorted(hidden))


async def open_run_context(
    run: RunDocument,
    hub: Hub,
    project: Project,
    configs: Mapping[str, AdapterConfig],
    adapters: Mapping[str, Adapter],
    *,
    store: Store,
    lock_fds: Sequence[int],
    worker: str | None,
    environ: Mapping[str, str],
    clock: Clock,
    open_forge: Callable[[], AbstractAsyncContextManager[Forge]] | None = None,
    find_new_tasks: Callable[[RunDocument], Awaitable[NewTasks]] | None = None,
) -> RunContext:
    """Open the resources of a run.

    Each git command inherits `lock_fds`, and so holds the lock until it exits. `worker` is the name of this
    orchestrator, unless it leads the run.

    Raises RefusedError if the repository is missing, or if this machine lacks the configured sandbox.
    """
    site = await find_run_repository(run.repo, is_url=run.is_url, environ=environ)
    git = Git(hub.trusted, keep_fds=tuple(lock_fds), environ=environ)
    source = site.source(git)
    suffix = "" if worker is None else f"-{worker}"

    def refs(name: str) -> str:
        return internal_ref_name(run.id, f"{name}{suffix}")

    target = Target(
        hub,
        git,
        source,
        branch=run.target,
        start=run.start,
        ref=refs("target"),
        title=None if run.merges is None else f"Land run {run.merges}",
        drivers=await anyio.to_thread.run_sync(find_merge_drivers, environ),
    )
    target.must_exist = run.has_target
    stores = store.local_paths()
    sandbox = await open_sandbox(run.sandbox, site, project, stores, hub, environ)
    worktrees = run.worktrees
    provisions = Provisions(Path())
    if site.repository is not None and site.repository.top is not None:
        provisions = make_provisions(worktrees, site.repository.top, (hub.root.parent, site.repository.git_dir))

    async def is_alive(session: SessionName) -> bool:
        return await is_session_alive(Worktree(hub, *session).lock)

    await _report_skipped_hooks(run.id, site, store, environ)
    return RunContext(
        hub,
        git,
        source,
        site.repository,
        target,
        configs,
        adapters,
        await _open_session_resources(
            *(run.id, git, worktrees, provisions, sandbox, project.logs(run.id), store, clock),
            secrets=account_secrets(configs.values(), environ),
        ),
        worktrees,
        Accounting(known_prices() | run.prices),
        refs,
        OwnershipRegistry(store, clock, ownership_scope(source.location, run.target), is_alive),
        SharedWork(source, git, run.id) if run.hub is None else None,
        anyio.CapacityLimiter(run.checks_capacity or run.capacity),
        tuple(McpServer(name, one.command or (), one.env, one.url) for name, one in run.mcp_servers.items()),
        open_forge=open_forge,
        find_new_tasks=find_new_tasks,
    )


async def open_sandbox(
    config: SandboxSettings,
    site: RunRepository,
    project: Project,
    stores: Sequence[Path],
    hub: Hub,
    environ: Mapping[str, str],
) -> RunSandbox:
    """Return the configured sandbox; raise RefusedError if this machine lacks it.

    `stores` are the local paths of the store.
    """
    kind = await choose_sandbox(config.sandbox, network=config.has_network, hosts=config.hosts, environ=environ)
    hidden = await anyio.to_thread.run_sync(hidden_folders, site, project, stores, hub)
    credentials = await anyio.to_thread.run_sync(find_credentials, environ)
    return RunSandbox(kind, (*hidden, *credentials), config)


async def _report_skipped_hooks(run: str, site: RunRepository, store: Store, environ: Mapping[str, str]) -> None:
    if site.repository is None:
        return
    if hooks := await find_hooks_in_checkouts(site.repository, Git(None, as_user=True, environ=environ)):
        skipped = RunHooksSkipped(run=run, hooks=list(map(str, hooks)), reason=SKIPPED_HOOKS_REASON)
        await store.commit(Commit([], [Event.of(skipped)]))


async def _open_session_resources(
    run: str,
    git: Git,
    worktrees: WorktreeSettings,
    provisions: Provisions,
    sandbox: RunSandbox,
    logs: Path,
    store: Store,
    clock: Clock,
    *,
    secrets: frozenset[str],
) -> SessionResources:
    await anyio.to_thread.run_sync(lambda: logs.mkdir(mode=0o700, exist_ok=True))
    leases = PortLeases(store, clock, worktrees.ports)

    async def record_event(event: RunEvent) -> None:
        await store.commit(Commit([], [Event.of(event.within(run=run))]))

    async def lease(slot: Path) -> Mapping[str, str]:
        port_lease = await leases.lease(slot)
        if port_lease.conflicting:
            await record_event(
                SlotPortsChanged(slot=str(slot), conflicting_ports=port_lease.conflicting, ports=port_lease.ports)
            )
        return port_lease.environment()

    environ = git.environ
    redactor = Redactor(secret_values(environ) | secrets | await provisions.secrets())
    setup = WorktreeSetup(git, worktrees, provisions, lease, record_event, sandbox, redactor, logs, environ)
    return SessionResources(git, sandbox, redactor, logs, environ, clock, setup)


def with_session_service(
    context: RunContext, ledger: Ledger, store: Store, clock: Clock, project: Project, lock_timeout: float
) -> RunContext:
    """Return a run context that serves the session API.

    `lock_timeout` is how long a session waits for a lock by default, in seconds.
    """
    scope, redactor, me = context.registry.scope, context.tools.redactor, ledger.orchestrators.me.id
    claims = ledger.claims

    def claim(session: SessionName) -> Guard | None:
        return None if claims is None else claims.guard(session.task)

    contexts = SessionContexts(store, clock, scope, redactor, orchestrator=me, claim=claim)
    service = SessionService(
        contexts,
        NoteStore(store, clock, scope, redactor),
        SessionLocks(contexts, FileLocks(project.file_locks, clock), context.registry, lock_timeout),
        context.git,
        partial(find_workspace, store, context.adapters, project.logs_folder, redactor, context.git.environ),
        context.check_slots,
    )
    return replace(context, session_service=service, tools=replace(context.tools, session_service=service))
