"""Check that a config can run, before anything is started or recorded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass

import anyio.to_thread

from orchestrator.config.model import RunConfig
from orchestrator.config.warnings import RepositoryPaths
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.security.secrets import Redactor, redact_urls, secret_values
from orchestrator.domain.wording import find_similar, join_names
from orchestrator.engine.diagnostics.programs import explain_missing
from orchestrator.engine.diagnostics.sandbox_probe import SandboxProbe, check_adapter_programs
from orchestrator.engine.worktree_sources import BaseCommit, check_worktree_sources
from orchestrator.errors import GitError, RefusedError, raise_combined_refusal, to_unusable_error
from orchestrator.project import Project, council_home
from orchestrator.protocols import Adapter, Program
from orchestrator.repo.git.command import Git
from orchestrator.repo.git.reading import read_ref
from orchestrator.repo.source.compatibility import check_complete_clone, check_supported
from orchestrator.repo.source.run_repository import RunRepository, find_run_repository
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.source.user_checkouts import (
    LocalRepository,
    describe_interrupted_landing,
    find_checkout,
    list_uncommitted_changes,
)
from orchestrator.repo.source.user_programs import find_unsafe_filter, read_git_config
from orchestrator.repo.worktrees.hub import Hub, create_hub, find_hub, internal_ref_name, locate_hub
from orchestrator.repo.worktrees.origin import HubUser, StoreLocation
from orchestrator.sessions.sandbox.policy import SandboxKind, choose_sandbox

#: The total length of all prompts of a run, in characters: one commit records them all.
MAX_PROMPTS_LENGTH = 12 << 20
#: The remedy for uncommitted changes before a run.
_CLEAN_REMEDY = "commit or stash them, set another `target`, or land later with --allow-deferred"
#: The remedy if git can't use a server.
_GIT_ACCESS = "give git access to it, for example by `gh auth setup-git` or an SSH key"


@dataclass(frozen=True, slots=True)
class PreflightResult:
    """A run that can start: its target, sandbox, and start commit.

    Its commits are in the hub, referenced by the run's internal refs.
    """

    target: str
    hub: Hub
    start: str
    sandbox: SandboxKind
    has_target: bool


async def run_preflight(
    config: RunConfig,
    site: RunRepository,
    run: str,
    adapters: Mapping[str, Adapter],
    environ: Mapping[str, str],
    *,
    store: StoreLocation | None,
    allow_deferred: bool,
    spans_machines: bool = False,
) -> PreflightResult:
    """Check that a config can run with the adapters that its tasks use.

    `store` is the location of the store that will record the run, or None. If the run `spans_machines`, another one may
    have the programs that this one lacks. Raises RefusedError if the run can't start,
    for example because of a missing base, a target with uncommitted changes, or a missing program.
    """
    if sum(len(task.prompt) for task in config.tasks) > MAX_PROMPTS_LENGTH:
        message = f"the prompts exceed {MAX_PROMPTS_LENGTH >> 20} MiB in total"
        raise RefusedError(message, "split the tasks into several runs")
    if spans_machines:
        adapters = {name: adapter for name, adapter in adapters.items() if not _missing_programs(adapter, environ)}
    else:
        check_programs(adapters, environ)
    sandbox = await choose_sandbox(
        config.sandbox.sandbox, network=config.sandbox.has_network, hosts=config.sandbox.hosts, environ=environ
    )
    project = project_of_config(config, site)
    stores = [project.state_folder] if store is None else [one.path for one in store.paths]
    probe = await SandboxProbe.open(config.sandbox, site, project, stores, environ)
    if probe is not None:
        hidden = await check_adapter_programs(adapters, config.adapters, config.path, probe, environ)
        raise_combined_refusal([(one.message, one.remedy or "") for one in hidden], "fix these")
    home = council_home(environ)
    if site.repository is not None:
        if site.repository.top is not None and home.is_relative_to(site.repository.top):
            raise RefusedError(f"{home} is inside the repository", "set COUNCIL_HOME to a folder outside")
        await check_complete_clone(site.repository, Git(None, as_user=True, environ=environ))
    target = config.target or f"council/{run}"
    heads = await check_branches(site.source(Git(None, environ=environ)), config.base, target)
    if not allow_deferred:
        await check_checkout(site.repository, target, environ)
    hub = locate_hub(site.identity, home)
    await create_hub(hub, site.object_format, environ, _hub_user(site, environ, store))
    start = await fetch_base_and_target(
        site, hub, run, (config.base, target if target in heads else config.base), environ
    )
    if site.repository is None:
        await check_push(site.source(Git(hub.trusted, environ=environ)), start)
    base = BaseCommit(config.base, internal_ref_name(run, "base"), Git(hub.trusted, environ=environ))
    await check_worktree_sources(config.worktrees, base, site.repository, [home])
    return PreflightResult(target, hub, start, sandbox, target in heads)


def _hub_user(site: RunRepository, environ: Mapping[str, str], store: StoreLocation | None) -> HubUser:
    name = Redactor(secret_values(environ)).text(site.identity)  # a URL may contain a password
    return HubUser(name, None if site.repository is None else site.repository.git_dir, store)


def project_of_config(config: RunConfig, site: RunRepository) -> Project:
    """Return the checkout of a config's repository, else the folder of the file."""
    if site.repository is None or site.repository.top is None:
        return Project(config.path.parent)
    return Project(site.repository.top)


async def fetch_base_and_target(
    site: RunRepository, hub: Hub, run: str, branches: tuple[str, str], environ: Mapping[str, str]
) -> str:
    """Fetch and check base and target in the hub; return the target's commit."""
    git = Git(hub.trusted, environ=environ)
    source, (base, target) = site.source(git), branches
    tip = await source.fetch(base, internal_ref_name(run, "base"))
    start = await source.fetch(target, internal_ref_name(run, "start"))
    for commit in {tip, start}:
        await check_supported(git, commit)
    if (await git("merge-base", tip, start, ok=(0, 1))).returncode:
        raise RefusedError(f"{base!r} and {target!r} have no common history", "change `base` or `target`")
    return start


async def prepare_hub(run: RunDocument, store: StoreLocation, environ: Mapping[str, str]) -> Hub:
    """Create the hub of a run that another machine has created, with the commits that the run starts from.

    Raises RefusedError if the remote can't be read, or no longer has them.
    """
    site = await find_run_repository(run.repo, is_url=run.is_url, environ=environ)
    hub = find_hub(run, environ)
    git, start = Git(hub.trusted, environ=environ), internal_ref_name(run.id, "start")
    await create_hub(hub, site.object_format, environ, _hub_user(site, environ, store))
    if await read_ref(hub.trusted, start) == run.start:
        return hub
    target = run.target if run.target in await check_branches(site.source(git), run.base, run.target) else run.base
    try:
        await fetch_base_and_target(site, hub, run.id, (run.base, target), environ)
    except GitError as error:
        raise to_unusable_error(error, f"{redact_urls(run.repo)} can't be read", "retry when it is reachable") from None
    try:
        await git("update-ref", start, run.start)
    except GitError as error:
        message = f"{redact_urls(run.repo)} no longer has commit {run.start:.10}, from which the run started"
        raise to_unusable_error(error, message, f"restore the history of {target!r}, or start a new run") from None
    return hub


async def delete_run_refs(hub: Hub, run: str, environ: Mapping[str, str]) -> None:
    """Delete the refs that `run_preflight` created, for a run that does not start."""
    git = Git(hub.trusted, environ=environ)
    for name in ("base", "start"):
        await git("update-ref", "-d", internal_ref_name(run, name))


async def check_branches(source: UpstreamRepository, base: str, target: str) -> dict[str, str]:
    """Return the source's branches; raise RefusedError if base or target is unusable."""
    try:
        heads = await source.heads()
    except GitError as error:
        remedy = "check `repo`" if source.is_local else f"check `repo`, and {_GIT_ACCESS}"
        raise to_unusable_error(error, f"{source.location} can't be read", remedy) from None
    if not heads:
        raise RefusedError(f"{source.location} has no commits yet", "create a first commit: sessions start from it")
    if base not in heads:
        near = find_similar(base, heads, 3, 0.5)
        others = [head for head in sorted(heads) if not head.startswith("council/")]
        raise RefusedError(
            f"there is no base branch {base!r} in {source.location}", f"use one of: {join_names(near or others)}"
        )
    for head in heads:
        if head.startswith(f"{target}/") or target.startswith(f"{head}/"):
            raise RefusedError(
                f"the target {target!r} conflicts with the name of the branch {head!r}", "choose another target"
            )
    return heads


async def check_push(source: UpstreamRepository, commit: str) -> None:
    """Raise RefusedError if the user may not push to a server: all work would be done, and could not land."""
    try:
        await source.check_push(commit)
    except GitError as error:
        raise to_unusable_error(error, f"git can't push to {source.location}", _GIT_ACCESS) from None


async def find_surroundings(config: RunConfig, environ: Mapping[str, str]) -> RepositoryPaths:
    """Return repository paths for warnings; empty if git can't read the repository."""
    try:
        site = await find_run_repository(config.repo, is_url=config.is_url, environ=environ)
        if site.repository is None:
            return RepositoryPaths()
        git = Git(None, as_user=True, environ=environ)
        checkout = None if config.target is None else await find_checkout(site.repository, config.target, git)
    except (RefusedError, GitError):
        return RepositoryPaths()
    return RepositoryPaths(site.repository.top, site.repository.git_dir, checkout)


async def check_checkout(
    repository: LocalRepository | None, target: str, environ: Mapping[str, str], *, remedy: str = _CLEAN_REMEDY
) -> None:
    """Raise RefusedError if uncommitted changes in a checkout would block landings."""
    if repository is None:
        return
    git = Git(None, as_user=True, environ=environ)
    checkout = await find_checkout(repository, target, git)
    if checkout is None:
        return
    # Check filters first, because listing changes runs them.
    configuration = await read_git_config(git, checkout)
    if (found := await find_unsafe_filter(repository, checkout, configuration)) is not None:
        raise RefusedError(*found)
    if changed := await list_uncommitted_changes(checkout, git):
        message = f"{target!r} is checked out in {checkout} with uncommitted changes ({', '.join(changed[:3])})"
        interrupted = await anyio.to_thread.run_sync(describe_interrupted_landing, repository, target)
        raise RefusedError(message, interrupted or remedy)


def check_programs(adapters: Mapping[str, Adapter], environ: Mapping[str, str]) -> None:
    """Raise RefusedError that lists all adapters whose program is not on PATH, or not executable."""
    missing = []
    for name, adapter in adapters.items():
        for program in _missing_programs(adapter, environ):
            reason, remedy = explain_missing(program, environ.get("PATH"))
            missing.append((f"adapter {name!r} runs {program.name!r}, which is {reason}", remedy))
    raise_combined_refusal(missing, "fix these, or use another adapter for their tasks")


def _missing_programs(adapter: Adapter, environ: Mapping[str, str]) -> list[Program]:
    return [one for one in adapter.programs() if shutil.which(one.name, path=environ.get("PATH")) is None]
