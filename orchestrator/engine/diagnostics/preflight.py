"""What is looked at before anything starts: each refusal says what to do, and no run has been recorded by then."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

import anyio.to_thread

from orchestrator.config.model import RunConfig
from orchestrator.config.store import folder_url
from orchestrator.config.warnings import Surroundings
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.engine.diagnostics.adapter_programs import look_for_adapter_programs
from orchestrator.engine.diagnostics.sandbox_probe import SandboxProbe
from orchestrator.engine.worktree_sources import Base, check_sources
from orchestrator.errors import GitError, RefusedError, refuse_together, unusable
from orchestrator.project import Project, council_home
from orchestrator.protocols import Adapter
from orchestrator.repo.git.runner import Git
from orchestrator.repo.source.checkout import LocalRepository, changes_in, checkout_of, interrupted_landing
from orchestrator.repo.source.site import Site, find_site
from orchestrator.repo.source.source import Source
from orchestrator.repo.source.supported import check_complete, check_supported
from orchestrator.repo.source.user_programs import filter_in_way, read_configuration
from orchestrator.repo.worktrees.hub import Hub, create_hub, hub_of, internal_ref
from orchestrator.repo.worktrees.origin import User
from orchestrator.sessions.sandbox.sandbox import SandboxKind, choose_sandbox

#: Characters of all prompts of a run together: they are recorded at once.
LARGEST_PROMPTS = 12 << 20
#: What to do with uncommitted changes before a run.
_CLEAN = "commit or stash them, set another `target`, or land later with --allow-deferred"


@dataclass(frozen=True, slots=True)
class Cleared:
    """What nothing stands in the way of: where a run lands, what fences it in, the commit that it starts from.

    Its commits are in the hub, kept by the run's internal refs.
    """

    target: str
    hub: Hub
    start: str
    sandbox: SandboxKind
    has_target: bool


async def check_run(
    config: RunConfig,
    site: Site,
    run: str,
    adapters: Mapping[str, Adapter],
    environ: Mapping[str, str],
    *,
    store: str | None,
    allow_deferred: bool,
) -> Cleared:
    """Look whether a config can run with `adapters`, those that its tasks use; nothing is started or recorded.

    `store` is the URL of the store that is going to record the run, None if none is. RefusedError says what stands in
    the way: no such base, a target with changes of the user's own, a program that is missing.
    """
    if sum(len(task.prompt) for task in config.tasks) > LARGEST_PROMPTS:
        what = f"the prompts are larger than {LARGEST_PROMPTS >> 20} MiB together"
        raise RefusedError(what, "split the tasks into several runs")
    check_programs(adapters, environ)
    sandbox = await choose_sandbox(
        config.fence.sandbox, network=config.fence.network, hosts=config.fence.hosts, environ=environ
    )
    project = project_at(config, site)
    probe = await SandboxProbe.open(config.fence, site, project, store or folder_url(project.own_state), environ)
    if probe is not None:
        hidden = await look_for_adapter_programs(adapters, config.adapters, config.path, probe, environ)
        refuse_together([(one.found, one.remedy or "") for one in hidden], "fix these")
    home = council_home(environ)
    if site.repository is not None:
        if site.repository.top is not None and home.is_relative_to(site.repository.top):
            raise RefusedError(f"{home} is inside the repository", "set COUNCIL_HOME to a folder outside of it")
        await check_complete(site.repository, Git(None, users=True, environ=environ))
    target = config.target or f"council/{run}"
    heads = await check_branches(site.source(Git(None, environ=environ)), config.base, target)
    if not allow_deferred:
        await check_checkout(site.repository, target, environ)
    hub = hub_of(site.identity, home)
    name = Redactor(secret_values(environ)).text(site.identity)  # a URL may have a password in it
    user = User(name, None if site.repository is None else site.repository.git_dir, store)
    await create_hub(hub, site.object_format, environ, user)
    start = await fetch_ends(site, hub, run, (config.base, target if target in heads else config.base), environ)
    base = Base(config.base, internal_ref(run, "base"), Git(hub.trusted, environ=environ))
    await check_sources(config.worktrees, base, site.repository, [home])
    return Cleared(target, hub, start, sandbox, target in heads)


def project_at(config: RunConfig, site: Site) -> Project:
    """Return the project of a config: its repository's checkout, or the file's folder where there is none."""
    if site.repository is None or site.repository.top is None:
        return Project(config.path.parent)
    return Project(site.repository.top)


async def fetch_ends(site: Site, hub: Hub, run: str, branches: tuple[str, str], environ: Mapping[str, str]) -> str:
    """Bring the commits of base and target into the hub and check them; return that of the target."""
    git = Git(hub.trusted, environ=environ)
    source, (base, target) = site.source(git), branches
    tip = await source.fetch(base, internal_ref(run, "base"))
    start = await source.fetch(target, internal_ref(run, "start"))
    for commit in {tip, start}:
        await check_supported(git, commit)
    if (await git("merge-base", tip, start, ok=(0, 1))).returncode:
        raise RefusedError(f"{base!r} and {target!r} have no history in common", "set `base` or `target` anew")
    return start


async def forget(hub: Hub, run: str, environ: Mapping[str, str]) -> None:
    """Let go of the commits that `check_run` brought in, for a run that will not be."""
    git = Git(hub.trusted, environ=environ)
    for name in ("base", "start"):
        await git("update-ref", "-d", internal_ref(run, name))


async def check_branches(source: Source, base: str, target: str) -> dict[str, str]:
    """Return the branches of the source; RefusedError if the base is not there or the target can't be."""
    try:
        heads = await source.heads()
    except GitError as error:
        raise unusable(error, f"{source.location} can't be read", "check `repo`") from None
    if not heads:
        raise RefusedError(f"{source.location} has no commit yet", "commit something first: sessions start from it")
    if base not in heads:
        near = difflib.get_close_matches(base, heads, n=3, cutoff=0.5)
        others = [head for head in sorted(heads) if not head.startswith("council/")]
        names = ", ".join((near or others)[:5])
        raise RefusedError(f"there is no branch {base!r} in {source.location}", f"set `base` to one of: {names}")
    for head in heads:
        if head.startswith(f"{target}/") or target.startswith(f"{head}/"):
            raise RefusedError(
                f"the target {target!r} can't exist beside the branch {head!r}", "set `target` to another name"
            )
    return heads


async def surroundings_of(config: RunConfig, environ: Mapping[str, str]) -> Surroundings:
    """Return what warnings need to know of a config's repository: nothing where git will not work with it."""
    try:
        site = await find_site(config.repo, is_url=config.is_url, environ=environ)
        if site.repository is None:
            return Surroundings()
        git = Git(None, users=True, environ=environ)
        checkout = None if config.target is None else await checkout_of(site.repository, config.target, git)
    except (RefusedError, GitError):
        return Surroundings()
    return Surroundings(site.repository.top, site.repository.git_dir, checkout)


async def check_checkout(
    repository: LocalRepository | None, target: str, environ: Mapping[str, str], *, remedy: str = _CLEAN
) -> None:
    """Refuse a target that is checked out with changes of the user's own, which no landing could get past."""
    if repository is None:
        return
    git = Git(None, users=True, environ=environ)
    checkout = await checkout_of(repository, target, git)
    if checkout is None:
        return
    # First of all, because to look for changes runs it, too.
    configuration = await read_configuration(git, checkout)
    if (found := await filter_in_way(repository, checkout, configuration)) is not None:
        raise RefusedError(*found)
    if changed := await changes_in(checkout, git):
        what = f"{target!r} is checked out in {checkout} with changes that are not committed ({', '.join(changed[:3])})"
        interrupted = await anyio.to_thread.run_sync(interrupted_landing, repository, target)
        raise RefusedError(what, interrupted or remedy)


def check_programs(adapters: Mapping[str, Adapter], environ: Mapping[str, str]) -> None:
    """Refuse adapters whose program is not on PATH, all of them at once."""
    missing = [
        (f"adapter {name!r} runs {program.name!r}, which is not on PATH", program.install)
        for name, adapter in adapters.items()
        for program in adapter.programs()
        if shutil.which(program.name, path=environ.get("PATH")) is None
    ]
    refuse_together(missing, "mend these, or give their tasks another adapter")
