"""The complete check of a run without starting or recording it."""

from __future__ import annotations

import os
from dataclasses import replace

import anyio

from orchestrator.api.execution.tracked_tasks import add_open_tracked_tasks
from orchestrator.config.adapters import make_trial_request
from orchestrator.config.coordination import CoordinationOverrides, apply_max_retries, resolve_coordination
from orchestrator.config.model import RunConfig, used_adapters
from orchestrator.domain.scheduling.admission import SessionDemand
from orchestrator.engine.diagnostics.doctor import DoctorInput, check_files, run_doctor
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.engine.diagnostics.preflight import delete_run_refs, project_of_config, run_preflight
from orchestrator.engine.diagnostics.sandbox_probe import list_programs
from orchestrator.engine.reports.dry_run import DryRun, build_dry_run, starting_adapters
from orchestrator.engine.scheduler.capacity import measure_capacity
from orchestrator.engine.state.records import new_run_id
from orchestrator.plugins import Plugins
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.repo.source.user_checkouts import refuse_tracked_project_folder
from orchestrator.system.clock import SystemClock


async def perform_dry_run(
    config: RunConfig,
    plugins: Plugins,
    *,
    allow_deferred: bool = False,
    coordination: CoordinationOverrides | None = None,
) -> DryRun:
    """Run the checks of `Runs.create` and `council doctor`, and return the plan.

    Nothing is recorded. Starts only the programs of adapters, to get their versions. Fetches commits into council's own
    repositories, as for a run, and changes nothing else.
    """
    environ = os.environ
    config = apply_max_retries(config, resolve_coordination(config.coordination, environ, coordination))
    config = await add_open_tracked_tasks(config, plugins)
    run = new_run_id(SystemClock().now())
    site = await find_run_repository(config.repo, is_url=config.is_url, environ=environ)
    project = project_of_config(config, site)
    project.check()
    await refuse_tracked_project_folder(project, environ)
    adapters = used_adapters(config, plugins.adapters)
    cleared = await run_preflight(config, site, run, adapters, environ, store=None, allow_deferred=allow_deferred)
    await delete_run_refs(cleared.hub, run, environ)
    room = await measure_capacity(config.capacity, SessionDemand(memory=config.session_memory))
    starting = starting_adapters(config)
    programs = {}
    for task in config.tasks:
        adapter = adapters[starting[task.id][0]]
        programs[task.id] = list_programs(adapter, adapter.command(make_trial_request(task.id, task.prompt)))[-1]
    planned = build_dry_run(
        config,
        starting,
        programs,
        room,
        target=config.target or "council/<run>",
        repository=site.location,
        sandbox=cleared.sandbox,
    )
    file = config.path if await anyio.Path(config.path).is_file() else None
    subject = DoctorInput(config.path.parent, file, config, plugins.adapters, plugins.left_out)
    findings = await run_doctor(subject, environ)
    deferred = {"target"} if allow_deferred else set()
    return replace(
        planned,
        findings=[finding for finding in findings if finding.level is not Level.OK and finding.name not in deferred],
    )


async def find_invisible_files(config: RunConfig, plugins: Plugins) -> list[Finding]:
    """Return warnings about files that adapters and checks need, and sessions can't see."""
    site = await find_run_repository(config.repo, is_url=config.is_url, environ=os.environ)
    top = None if site.repository is None else site.repository.top
    return await check_files(config, plugins.adapters, top, os.environ)
