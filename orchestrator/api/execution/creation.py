"""Checking and recording of new runs."""

from __future__ import annotations

from functools import partial

import anyio
import anyio.to_thread

from orchestrator.api.context import ProjectContext
from orchestrator.api.execution.tracked_tasks import add_open_tracked_tasks
from orchestrator.api.run_reader import RunReader
from orchestrator.config.coordination import CoordinationOverrides, apply_max_retries, resolve_coordination
from orchestrator.config.model import RunConfig, used_adapters
from orchestrator.config.store import MEMORY
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.engine.diagnostics.preflight import (
    check_branches,
    check_checkout,
    delete_run_refs,
    fetch_base_and_target,
    run_preflight,
)
from orchestrator.engine.landing.pull_requests import check_forge
from orchestrator.engine.reports.report import RunRecord
from orchestrator.engine.state.merge_run import MERGE_TASK, build_merge_run
from orchestrator.engine.state.records import new_run_id, read_specs, record_new_run
from orchestrator.errors import NothingToMerge, RefusedError
from orchestrator.project import exclude_from_git
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.repo.worktrees.hub import internal_ref_name, work_branch_name
from orchestrator.repo.worktrees.origin import StoreLocation


async def create_run(
    context: ProjectContext,
    config: RunConfig,
    *,
    allow_deferred: bool,
    allow_failing_base: bool = False,
    coordination: CoordinationOverrides | None = None,
    follow: bool = False,
) -> str:
    """Check that a file can run, and record a run; return its id. See `Runs.create`."""
    plugins = await context.plugins.load()
    coordinated = resolve_coordination(config.coordination, context.environ, coordination)
    if follow and config.template is None:
        raise RefusedError("--follow needs a tracker, which has the new tasks", "add `trackers:` to the file")
    config = await add_open_tracked_tasks(apply_max_retries(config, coordinated), plugins, may_be_none=follow)
    run = new_run_id(context.clock.now())
    site = await find_run_repository(config.repo, is_url=config.is_url, environ=context.environ)
    if site.repository is not None and site.repository.top is not None:
        await anyio.to_thread.run_sync(exclude_from_git, site.repository.git_dir)
    location = None
    if context.url != MEMORY:
        location = await anyio.to_thread.run_sync(StoreLocation.of, context.url, context.store.local_paths())
    spans_machines = config.is_url and location is not None and not location.paths
    cleared = await run_preflight(
        config,
        site,
        run,
        used_adapters(config, plugins.adapters),
        context.environ,
        store=location,
        allow_deferred=allow_deferred,
        spans_machines=spans_machines,
    )
    if config.pull_requests is not None:
        forge = config.pull_requests.to_stored()
        await check_forge(partial(plugins.open, "forge", "pull_requests", forge))
    document = RunDocument(
        **config.to_stored() | {"target": cleared.target, "coordination": coordinated},
        id=run,
        config=str(config.path),
        config_digest=config.digest,
        tasks=tuple(task.id for task in config.tasks),
        start=cleared.start,
        has_target=cleared.has_target,
        allow_failing_base=allow_failing_base,
        follow=_template(config) if follow else None,
        hub=None if spans_machines else str(cleared.hub.root),
        started=context.clock.now(),
    )
    if context.follows_file:
        await anyio.to_thread.run_sync(context.use_store, config.state.url)
    await record_new_run(context.store, document, {task.id: task for task in config.tasks})
    return run


def _template(config: RunConfig) -> TaskSpec | None:
    """Return the defaults of tasks of trackers, with the values that a workflow of a task needs."""
    # Each task has its own prompt, and an empty one is invalid.
    return config.template and config.template.model_copy(update={"context": config.context, "prompt": "its text"})


async def create_merge_run(context: ProjectContext, run: str) -> str:
    """Record a run that merges another run's branch into its base; return its id.

    See `Runs.create_merge`.
    """
    reader, name = RunReader(context), new_run_id(context.clock.now())
    if (queued := await reader.queued_merge(run)) is not None:
        return queued
    record = await reader.record(run)
    document, environ = record.run, context.environ
    document.check_not_imported()
    site = await find_run_repository(document.repo, is_url=document.is_url, environ=environ)
    hub = await reader.index.hub(document)
    git = Git(hub.trusted, environ=environ)
    source, base = site.source(git), document.base
    await check_branches(source, base, base)
    await check_checkout(site.repository, base, environ, remedy="commit or stash them, then `council merge`")
    start = await fetch_base_and_target(site, hub, name, (base, base), environ)
    if await source.tip(document.target) is None:
        await delete_run_refs(hub, name, environ)
        raise await _explain_missing_branch(git, record, start)
    commit, branch = (
        await source.fetch(document.target, internal_ref_name(name, "work")),
        work_branch_name(name, MERGE_TASK, "1"),
    )
    if await git.is_ancestor(commit, start):
        await delete_run_refs(hub, name, environ)
        raise NothingToMerge(f"{base!r} already contains {document.target!r}", "there is nothing to merge")
    specs = [*(await read_specs(context.store, run, document.tasks)).values()]
    merge, spec, task = build_merge_run(
        document, specs, name, commit=commit, branch=branch, start=start, now=context.clock.now(),
        common=await git.line("merge-base", commit, start),
    )  # fmt: skip
    await git("update-ref", f"refs/heads/{branch}", commit)
    await record_new_run(context.store, merge, {MERGE_TASK: spec}, {MERGE_TASK: task})
    return name


async def _explain_missing_branch(git: Git, record: RunRecord, start: str) -> RefusedError:
    """Return the error for a missing branch of a run; `start` is its base commit."""
    run = record.run
    message = f"the branch {run.target!r} does not exist"
    commits = [task.landed for task in record.tasks.values() if task.landed is not None]
    tip = (await git.line("merge-base", "--independent", *commits)).split("\n")[0]
    is_merged = await git.is_ancestor(tip, start)
    if not is_merged:  # its commits may have been squashed
        tree, conflicts = await git.merge_tree(start, tip)
        is_merged = not conflicts and tree == await git.line("rev-parse", f"{start}^{{tree}}")
    if is_merged:
        return NothingToMerge(f"{message}, and {run.base!r} already contains its work", "there is nothing to merge")
    remedy = f"`git branch {run.target} {tip}` restores it, then `council merge {run.id}`"
    return RefusedError(f"{message}, and {run.base!r} does not contain all of its work", remedy)
