"""What a run would do: checked as a run is checked, with nothing started or recorded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import anyio

from orchestrator.api.tracked_tasks import with_tracked
from orchestrator.config.adapters import trial_request
from orchestrator.config.coordination import CoordinationOverrides, coordinate, with_attempts
from orchestrator.config.model import RunConfig, used_adapters
from orchestrator.domain.scheduling.admission import Demand
from orchestrator.engine.diagnostics.doctor import Subject, examine
from orchestrator.engine.diagnostics.findings import Level
from orchestrator.engine.diagnostics.preflight import check_run, forget, project_at
from orchestrator.engine.reports.dry_run import Rehearsal, rehearse, starters
from orchestrator.engine.scheduler.capacity import measure_room
from orchestrator.engine.state.records import new_run_id
from orchestrator.plugins import Plugins
from orchestrator.repo.source.checkout import check_own
from orchestrator.repo.source.site import find_site
from orchestrator.system.clock import Clock, SystemClock


async def rehearse_run(
    config: RunConfig,
    plugins: Plugins,
    *,
    allow_deferred: bool = False,
    coordination: CoordinationOverrides | None = None,
    clock: Clock | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Rehearsal:
    """Check all that `Council.create_run` and `council doctor` check, and say what the run would do.

    Nothing is started or recorded but the programs of adapters, to ask for their versions.

    Only our own repositories change: the commits are fetched into them, as for a run.
    """
    config = with_attempts(config, coordinate(config.coordination, environ, coordination))
    config = await with_tracked(config, plugins)
    run = new_run_id((clock or SystemClock()).now())
    site = await find_site(config.repo, is_url=config.is_url, environ=environ)
    project = project_at(config, site)
    project.check()
    await check_own(project, environ)
    adapters = used_adapters(config, plugins.adapters)
    cleared = await check_run(config, site, run, adapters, environ, store=None, allow_deferred=allow_deferred)
    await forget(cleared.hub, run, environ)
    room = await measure_room(config.capacity, Demand(memory=config.session_memory))
    starting = starters(config)
    programs = {
        task.id: adapters[starting[task.id][0]].command(trial_request(task.id, task.prompt)).argv[0]
        for task in config.tasks
    }
    planned = rehearse(
        config,
        starting,
        programs,
        room,
        target=config.target or "council/<run>",
        repository=site.location,
        sandbox=cleared.sandbox,
    )
    file = config.path if await anyio.Path(config.path).is_file() else None
    left_out = [str(one) for one in plugins.left_out]
    findings = await examine(Subject(config.path.parent, file, config, plugins.adapters, left_out), environ)
    deferred = {"target"} if allow_deferred else set()
    return replace(
        planned, findings=[one for one in findings if one.level is not Level.OK and one.name not in deferred]
    )
