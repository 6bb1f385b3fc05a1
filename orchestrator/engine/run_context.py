"""The places and tools that a run works with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.config.model import AdapterConfig, McpServerConfig, SandboxConfig, TaskSpec, WorktreesConfig
from orchestrator.config.prices import known_prices
from orchestrator.config.store import store_folder
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.runs.prices import Price
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.engine.accounting import Accounting
from orchestrator.engine.session_api.service import SessionService
from orchestrator.engine.state.port_leases import PortLeases
from orchestrator.engine.worktree_sources import make_provisions
from orchestrator.locking.ownership import OwnershipRegistry, ownership_scope
from orchestrator.project import Project
from orchestrator.protocols import Adapter, Commit, Event, JsonObject, McpServer, Store
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing.target_branch import Target
from orchestrator.repo.source.run_repository import RunRepository, find_run_repository
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.source.user_checkouts import LocalRepository
from orchestrator.repo.source.user_programs import SKIPPED_HOOKS_REASON, find_hooks_in_checkouts
from orchestrator.repo.worktrees.hub import Hub, internal_ref_name
from orchestrator.repo.worktrees.pool import PoolLimits, SlotOptions, SlotPool
from orchestrator.repo.worktrees.provisions import Provisions
from orchestrator.repo.worktrees.reset import KeepRules
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sandbox.credentials import find_credentials
from orchestrator.sessions.sandbox.policy import choose_sandbox
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox
from orchestrator.sessions.session import SessionResources
from orchestrator.sessions.setup.checks import CheckRunner
from orchestrator.sessions.setup.worktree_setup import WorktreeSetup
from orchestrator.sessions.supervision.supervisor_client import is_session_alive
from orchestrator.state.log.identity import known_store_folders
from orchestrator.system.clock import Clock


@dataclass(frozen=True, slots=True)
class RunRefs:
    """The refs that keep what an orchestrator has fetched for a run; two that fetched into one would both fail."""

    run: str
    suffix: str

    def __call__(self, name: str) -> str:
        """Return the one of a name."""
        return internal_ref_name(self.run, f"{name}{self.suffix}")


@dataclass(frozen=True, slots=True)
class RunContext:
    """What is opened once for a run; `repository` is the user's, None where it is reached by a URL."""

    hub: Hub
    git: Git
    source: UpstreamRepository
    repository: LocalRepository | None
    target: Target
    configs: Mapping[str, AdapterConfig]
    adapters: Mapping[str, Adapter]
    tools: SessionResources
    worktrees: WorktreesConfig
    accounting: Accounting
    refs: RunRefs
    registry: OwnershipRegistry
    """Who owns which paths of the target."""
    mcp_servers: tuple[McpServer, ...] = ()
    session_service: SessionService | None = None
    """Where sessions are answered; None: nowhere."""

    def pool(self, *, sessions: int) -> AbstractAsyncContextManager[SlotPool]:
        """Open the places of the run; as many are there all the time as are worked in, and one for checks.

        Opened for no session it only throws away what a killed owner left, and deletes that.
        """
        equipment, config = self.tools.worktree_setup, self.worktrees
        limits = PoolLimits(config.max, config.max_size)
        kept = [(pattern, "") for pattern in config.keep_ignored]
        kept += [(pattern, name) for name, one in self.configs.items() for pattern in one.keep_ignored]
        furnish = equipment.set_up if config.setup else None
        strip = equipment.tear_down if config.setup or config.teardown else None
        care = SlotOptions(
            config.sparse, KeepRules(tuple(kept)), furnish, strip, equipment.keys if config.setup else None
        )
        warm, checks = min(sessions, config.max), int(0 < sessions < config.max)
        return SlotPool.open(self.git, self.hub, self.tools.clock, limits, care, warm=warm, warm_checks=checks)

    def checks(
        self,
        pool: SlotPool,
        run: str,
        task: str,
        attempt: int,
        spec: TaskSpec,
        commands: Sequence[str] | None = None,
        by: str = "",
    ) -> CheckRunner:
        """Return the checks of what an attempt built: its task's, unless other commands are given.

        `by` names this process where others may run the same checks at the same time.
        """
        return CheckRunner(
            pool=pool.checks,
            worktree_setup=self.tools.worktree_setup,
            worktree=Worktree(self.hub, run, task, attempt, is_check=True, by=by),
            commands=spec.checks if commands is None else commands,
            timeout=spec.checks_timeout,
            env=spec.checks_env,
            sandbox=self.tools.sandbox,
            redactor=self.tools.redactor,
            logs=self.tools.logs,
            environ=self.tools.environ,
        )


def hidden_folders(site: RunRepository, project: Project, store: str, hub: Hub) -> tuple[Path, ...]:
    """Return the folders that no session is to see: the user's repository, all states, our repositories. Blocks."""
    state = store_folder(store)
    hidden = {
        project.folder,
        hub.root.parent,
        *([] if state is None else [state]),
        *known_store_folders(hub.root.parent),
    }
    if site.repository is not None:
        git_dir = site.repository.git_dir
        # A linked worktree's main checkout is the user's, too.
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
    store_url: str,
    lock_fds: Sequence[int],
    worker: str | None,
    environ: Mapping[str, str],
    clock: Clock,
) -> RunContext:
    """Open what a run works with; every git command of its holds `lock_fds` until it has ended.

    `worker` is the name of this orchestrator, if it is not the one that coordinates the run.

    RefusedError where the repository is gone, or where this machine has no such sandbox.
    """
    site = await find_run_repository(run.repo, is_url=run.is_url, environ=environ)
    git = Git(hub.trusted, keep_fds=tuple(lock_fds), environ=environ)
    source = site.source(git)
    refs = RunRefs(run.id, "" if worker is None else f"-{worker}")
    target = Target(
        hub,
        git,
        source,
        site.repository,
        branch=run.target,
        start=run.start,
        ref=refs("target"),
        must_exist=run.has_target,
        title=None if run.merges is None else f"Land run {run.merges}",
    )
    fence = SandboxConfig.model_validate(run.fence)
    kind = await choose_sandbox(fence.sandbox, network=fence.network, hosts=fence.hosts, environ=environ)
    hidden = await anyio.to_thread.run_sync(hidden_folders, site, project, store_url, hub)
    credentials = await anyio.to_thread.run_sync(find_credentials, environ)
    fencing = RunSandbox(kind, (*hidden, *credentials), fence)
    logs = project.logs(run.id)
    await anyio.to_thread.run_sync(lambda: logs.mkdir(mode=0o700, exist_ok=True))
    worktrees = WorktreesConfig.model_validate(run.worktrees)
    provisions = Provisions(Path())
    if site.repository is not None and site.repository.top is not None:
        provisions = make_provisions(worktrees, site.repository.top, (hub.root.parent, site.repository.git_dir))
    leases = PortLeases(store, clock, worktrees.ports)

    async def tell(what: str, facts: JsonObject) -> None:
        await store.commit(Commit([], [Event(what, {"run": run.id, **facts})]))

    users = Git(None, as_user=True, environ=environ)
    hooks = [] if site.repository is None else await find_hooks_in_checkouts(site.repository, users)
    if hooks:
        await tell("run.hooks_skipped", {"hooks": [str(hook) for hook in hooks], "reason": SKIPPED_HOOKS_REASON})

    async def lease(place: Path) -> Mapping[str, str]:
        found = await leases.lease(place)
        if found.lost:
            facts = {"place": str(place), "lost": list(found.lost), "ports": list(found.ports)}
            await tell("slot.ports_changed", facts)
        return found.environment()

    redactor = Redactor(secret_values(environ) | await provisions.secrets())
    equipment = WorktreeSetup(git, worktrees, provisions, lease, tell, fencing, redactor, logs, environ)
    tools = SessionResources(git, fencing, redactor, logs, environ, clock, equipment)
    accounting = Accounting(known_prices() | {name: Price.model_validate(one) for name, one in run.prices.items()})
    servers = tuple(McpServerConfig.model_validate(one).named(name) for name, one in run.mcp_servers.items())

    async def lives(session: SessionName) -> bool:
        return await is_session_alive(Worktree(hub, *session).lock)

    registry = OwnershipRegistry(store, clock, ownership_scope(source.location, run.target), lives)
    return RunContext(
        hub,
        git,
        source,
        site.repository,
        target,
        configs,
        adapters,
        tools,
        worktrees,
        accounting,
        refs,
        registry,
        servers,
    )
