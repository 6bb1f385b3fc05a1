"""Checking and recording of new runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

import anyio
import anyio.to_thread

from orchestrator.api.context import ProjectContext
from orchestrator.api.run_reader import RunReader
from orchestrator.config import adapters, references
from orchestrator.config.coordination import CoordinationOverrides, apply_max_retries, resolve_coordination
from orchestrator.config.load import resolve_needs
from orchestrator.config.model import RunConfig, used_adapters
from orchestrator.config.schema import Task
from orchestrator.config.source.document import Node
from orchestrator.config.source.problems import Position, Problems
from orchestrator.config.source.validation import validate
from orchestrator.config.source.values import read_value
from orchestrator.config.store import MEMORY
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.settings.fields import NO_WORKFLOW
from orchestrator.domain.settings.names import entry_of_adapter
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.wording import suggest
from orchestrator.engine.diagnostics.preflight import (
    check_branches,
    check_checkout,
    delete_run_refs,
    fetch_base_and_target,
    run_preflight,
)
from orchestrator.engine.reports.report import RunRecord
from orchestrator.engine.state.merge_run import MERGE_TASK, build_merge_run
from orchestrator.engine.state.records import new_run_id, read_specs, record_new_run
from orchestrator.errors import NothingToMerge, PluginFailed, RefusedError, plugin_code
from orchestrator.plugins import Plugins
from orchestrator.project import council_home, exclude_from_git
from orchestrator.protocols import AdapterType, TrackedTask, Tracker
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.repo.worktrees.hub import internal_ref_name, work_branch_name
from orchestrator.repo.worktrees.origin import StoreLocation
from orchestrator.state.log.identity import record_store_use

#: The timeout of a tracker, in seconds.
FETCH_TIMEOUT = 60.0


async def create_run(
    context: ProjectContext,
    config: RunConfig,
    *,
    allow_deferred: bool,
    allow_failing_base: bool = False,
    coordination: CoordinationOverrides | None = None,
) -> str:
    """Check that a file can run, and record a run; return its id. See `Runs.create`."""
    plugins = await context.plugins.load()
    coordinated = resolve_coordination(config.coordination, context.environ, coordination)
    config = await add_open_tracked_tasks(apply_max_retries(config, coordinated), plugins)
    run = new_run_id(context.clock.now())
    site = await find_run_repository(config.repo, is_url=config.is_url, environ=context.environ)
    if site.repository is not None and site.repository.top is not None:
        await anyio.to_thread.run_sync(exclude_from_git, site.repository.git_dir)
    location = None
    if context.url != MEMORY:
        location = await anyio.to_thread.run_sync(StoreLocation.of, context.url, context.store.local_paths())
    cleared = await run_preflight(
        config,
        site,
        run,
        used_adapters(config, plugins.adapters),
        context.environ,
        store=location,
        allow_deferred=allow_deferred,
    )
    document = RunDocument(
        **config.to_stored() | {"target": cleared.target, "coordination": coordinated},
        id=run,
        config=str(config.path),
        config_digest=config.digest,
        tasks=tuple(task.id for task in config.tasks),
        start=cleared.start,
        has_target=cleared.has_target,
        allow_failing_base=allow_failing_base,
        hub=str(cleared.hub.root),
        started=context.clock.now(),
    )
    if context.follows_file:
        await anyio.to_thread.run_sync(_use_store, context, config.state.url)
    await record_new_run(context.store, document, {task.id: task for task in config.tasks})
    return run


async def add_open_tracked_tasks(config: RunConfig, plugins: Plugins) -> RunConfig:
    """Return the config with the open tasks of its trackers in addition to its own.

    Raises ConfigError if tracked tasks are invalid, RefusedError if a tracker does not answer or there is no task at
    all.
    """
    if not config.trackers:
        return config
    stored = {name: tracker.to_stored() for name, tracker in config.trackers.items()}
    tracked = {
        name: await _fetch_tracked_tasks(name, partial(plugins.open, "tracker", name, tracker))
        for name, tracker in stored.items()
    }
    config = add_tracked_tasks(config, tracked, plugins.adapters)
    if not config.tasks:
        names = ", ".join(map(repr, tracked))
        raise RefusedError(f"nothing to do: no open task in {names}", "add a task, or try again later")
    return config


async def _fetch_tracked_tasks(
    name: str, open_tracker: Callable[[], AbstractAsyncContextManager[Tracker]]
) -> Sequence[TrackedTask]:
    """Return the open tasks of a tracker; raise RefusedError if it can't list them."""
    remedy = "fix the tracker, or remove it from the file"
    try:
        with plugin_code(RefusedError, TimeoutError), anyio.fail_after(FETCH_TIMEOUT):
            async with open_tracker() as tracker:
                return [_checked(task) for task in await tracker.tasks()]
    except RefusedError as error:
        raise RefusedError(f"tracker {name!r}: {error.message}", error.remedy) from error
    except TimeoutError as error:
        raise RefusedError(f"tracker {name!r} did not list its tasks within {FETCH_TIMEOUT:g} s", remedy) from error
    except PluginFailed as failed:
        raise RefusedError(f"tracker {name!r} can't list its tasks: {failed}", remedy) from failed


def _checked(task: TrackedTask) -> TrackedTask:
    """Return a task of a tracker with tuples; raise AttributeError or TypeError if it is none."""
    return TrackedTask(
        task.id, task.prompt, tuple(task.needs), task.priority, tuple(task.owns), task.adapter, task.workflow
    )


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


def _use_store(context: ProjectContext, url: str | None) -> None:
    if url is not None:
        record_store_use(url, council_home(context.environ))
    context.project.set_store_url(url)


def add_tracked_tasks(
    config: RunConfig, found: Mapping[str, Sequence[TrackedTask]], adapter_types: Mapping[str, AdapterType]
) -> RunConfig:
    """Return the run with the tasks of its trackers (by tracker) after its own tasks.

    They are equivalent to tasks in the file with the same fields. Raises ConfigError with all errors, located by paths
    such as `trackers.todo[0].prompt`.
    """
    problems = Problems(config.path)
    own, tracked = _nodes(config.tasks, found, problems)
    everything, ours = _as_root([*own, *tracked]), _as_root(tracked)
    references.check_size(everything, problems)
    references.check_ids(everything, problems)
    references.check_needs(everything, problems)
    _check_names(tracked, config, problems)
    entries = [validate(Task, node, problems) for node in tracked]
    prompts = references.read_prompts(ours, config.path.parent, problems)
    template = config.template
    if template is not None:
        possible = dict.fromkeys(range(len(tracked)), config.adapters_of(template))
        adapters.try_commands(ours, prompts, possible, config.adapters, adapter_types, problems)
    if problems or template is None:
        raise problems.error()
    trackers = [name for name, tasks in found.items() for _ in tasks]
    specs = [
        template.model_copy(
            update={
                **_settings(entry, config),
                "id": entry.id,
                "prompt": prompts[index],
                **resolve_needs(entry),
                "tracker": trackers[index],
            }
        )
        for index, entry in enumerate(entries)
        if entry is not None
    ]
    return config.model_copy(update={"tasks": (*config.tasks, *specs)})


def _nodes(
    own: Sequence[TaskSpec], found: Mapping[str, Sequence[TrackedTask]], problems: Problems
) -> tuple[list[Node], list[Node]]:
    trackers = {name: [_facts(task) for task in tasks] for name, tasks in found.items()}
    root = read_value({"tasks": [_facts(task) for task in own], "trackers": trackers}, problems)
    if root is None:
        raise problems.error()
    tracked = root.children["trackers"].children.values()
    return list(root.children["tasks"].children.values()), [
        node for tasks in tracked for node in tasks.children.values()
    ]


def _facts(task: TaskSpec | TrackedTask) -> dict[str, object]:
    facts: dict[str, object] = {"id": task.id, "prompt": task.prompt, "needs": list(task.needs)}
    if isinstance(task, TaskSpec):
        return facts
    settings = {"priority": task.priority, "owns": list(task.owns), "adapter": task.adapter, "workflow": task.workflow}
    return facts | {key: value for key, value in settings.items() if value not in (None, [])}


def _check_names(tracked: Sequence[Node], config: RunConfig, problems: Problems) -> None:
    """Report adapters and workflows of tracked tasks that the file does not have."""
    known = {"adapter": [*map(entry_of_adapter, config.adapters), *config.adapters], "workflow": config.workflows}
    for task in tracked:
        for key, names in known.items():
            node = task.get(key)
            if node is not None and node.value not in names and (key, node.value) != ("workflow", NO_WORKFLOW):
                remedy = suggest(str(node.value), names, f"the {key}s of the file")
                problems.add(node.at, f"there is no {key} {node.value!r} in the file", remedy)


def _settings(entry: Task, config: RunConfig) -> dict[str, object]:
    """Return the settings of a tracked task that replace the defaults of the file."""
    update: dict[str, object] = {name: getattr(entry, name) for name in entry.model_fields_set & {"priority", "owns"}}
    if entry.adapter is not None:
        accounts = [one for one in config.adapters if entry.adapter in (one, entry_of_adapter(one))]
        update |= {"adapter": accounts[0], "fallback": tuple(accounts[1:])}
    if entry.workflow is not None:
        is_none = entry.workflow == NO_WORKFLOW
        update |= {"workflow": None if is_none else entry.workflow, "context": {} if is_none else config.context}
    return update


def _as_root(tasks: Sequence[Node]) -> Node:
    listed = Node(Position(0, 0, "tasks"), [task.value for task in tasks], dict(enumerate(tasks)))
    return Node(listed.at, {"tasks": listed.value}, {"tasks": listed})
