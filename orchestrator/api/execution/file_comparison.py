"""Comparison of a run with its file, and reload of changed tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.api.context import ProjectContext
from orchestrator.api.run_index import RunIndex
from orchestrator.config.coordination import apply_max_retries, resolve_coordination
from orchestrator.config.inline import InlineTasks, load_inline
from orchestrator.config.load import load_config, read_digest
from orchestrator.config.model import used_adapters
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.runs.statuses import SUCCESS_STATUSES, TaskStatus
from orchestrator.domain.settings.names import entry_of_adapter
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.engine.diagnostics.preflight import check_programs
from orchestrator.engine.state.records import read_spec, read_specs, run_key, spec_key
from orchestrator.engine.state.reload import TASKS_KEY, FileChanges, build_reload, compare_with_file
from orchestrator.errors import ConfigError, RefusedError, VersionConflict
from orchestrator.protocols import Commit, Store


async def has_same_config_file(run: RunDocument) -> bool:
    """Return True if the file of a run has not changed since its creation."""
    digest = await anyio.to_thread.run_sync(read_digest, Path(run.config))
    return digest is not None and digest == run.config_digest


async def compare_with_config_file(
    context: ProjectContext, run: RunDocument, statuses: Mapping[str, TaskStatus]
) -> FileChanges:
    """Compare a run with its file, if it exists, for tasks that have not succeeded."""
    path = anyio.Path(run.config)
    if run.imported is not None or not await path.is_file():
        return FileChanges(run.config, unreadable=f"{run.config} does not exist")
    plugins = await context.plugins.load()
    kinds = plugins.adapters, plugins.extensions()
    inline = await _inline_tasks(context.store, run)
    try:
        if inline is None:
            config = await anyio.to_thread.run_sync(load_config, Path(run.config), *kinds)
        else:
            file = Path(run.config)
            config = await anyio.to_thread.run_sync(load_inline, inline, file, file.parent, *kinds)
    except ConfigError as error:
        return FileChanges(run.config, unreadable=str(error.problems[0]))
    except RefusedError as error:
        return FileChanges(run.config, unreadable=str(error))
    settings = resolve_coordination(config.coordination, context.environ, None)
    recorded = run.coordination.max_retries
    if recorded != settings.max_retries:  # the limit was set on the command line
        settings = settings.model_copy(update={"max_retries": recorded})
    left = [task for task, status in statuses.items() if status not in SUCCESS_STATUSES]
    specs = await read_specs(context.store, run.id, left)
    return compare_with_file(run, specs, apply_max_retries(config, settings))


async def _inline_tasks(store: Store, run: RunDocument) -> InlineTasks | None:
    """Return the tasks of the command line; None if the tasks are from the file."""
    if TASKS_KEY not in run.overrides:
        return None
    specs = (await read_specs(store, run.id, run.tasks)).values()
    own = [spec for spec in specs if spec.plan is None]
    adapter = _named_adapter(own[0]) if "adapter" in run.overrides else None
    checks = own[0].check_commands if "checks" in run.overrides else ()
    return InlineTasks([one.prompt for one in own], adapter, checks=checks)


def _named_adapter(spec: TaskSpec) -> str:
    """Return the adapter that the command line named: one account, or an adapter with several."""
    entry = entry_of_adapter(spec.adapter)
    return entry if entry in map(entry_of_adapter, spec.fallback) else spec.adapter


async def apply_config_file(context: ProjectContext, run: str, tasks: Sequence[str], changes: FileChanges) -> None:
    """Apply the settings of the file to tasks."""
    while True:
        with suppress(VersionConflict):  # a leader has just changed the run
            return await _try_to_apply(context, run, tasks, changes)


async def _try_to_apply(context: ProjectContext, run: str, tasks: Sequence[str], changes: FileChanges) -> None:
    store, is_live = context.store, await RunIndex(context).is_live(run)
    found, specs = await store.get(run_key(run)), {}
    for task in tasks:
        document = await store.get(spec_key(run, task))
        specs[task] = (0 if document is None else document.version), await read_spec(store, run, task)
    if found is None:
        raise RefusedError(f"there is no run {run!r}", "`council runs` lists them")
    writes, events = build_reload(found, specs, changes, is_live=is_live)
    if changes.config is not None:
        tasks_now = tuple(task for task in changes.config.tasks if task.id in specs)
        config = changes.config.model_copy(update={"tasks": tasks_now})
        adapters = (await context.plugins.load()).adapters
        check_programs(used_adapters(config, adapters), context.environ)
    if writes:
        await store.commit(Commit(writes, events))
