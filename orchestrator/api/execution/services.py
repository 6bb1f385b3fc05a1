"""Services of an executing run: event sinks, trackers, views, and handling of store outages."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

import anyio
import anyio.to_thread

from orchestrator.api.context import ProjectContext
from orchestrator.api.run_reader import RunReader
from orchestrator.config.store import MEMORY
from orchestrator.domain.events.base import TypedEvent
from orchestrator.domain.events.runs import ViewsFailing
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.domain.settings.run_settings import CoordinationSettings
from orchestrator.engine.sinks import EventSubscriber, forward_events
from orchestrator.engine.tracker_sync import (
    SyncReport,
    TrackedRun,
    TrackerLink,
    TrackerStatus,
    TrackerSync,
    read_tracker_statuses,
    sync_trackers,
)
from orchestrator.engine.views import export_views
from orchestrator.errors import CouncilError, PluginFailed, RefusedError
from orchestrator.locking.claims import read_claims
from orchestrator.plugins import Plugins
from orchestrator.protocols import Commit, Event
from orchestrator.state.documents.validation import DOCUMENT_KINDS
from orchestrator.state.offline.fork import survive_outages
from orchestrator.state.offline.outage import end_pauses, flush_outage_events, is_full, is_outage, log_event

#: Seconds to update the views at the end of a run.
_VIEWS_TIMEOUT = 10.0


@asynccontextmanager
async def background_services(context: ProjectContext, run: RunDocument) -> AsyncIterator[None]:
    """Forward events to sinks and synchronize with trackers during the body; update views after it."""
    redactor = Redactor(secret_values(context.environ))
    plugins = await context.plugins.load()
    forward = partial(forward_events, context.store, context.clock, redactor, run.id, _subscribers(plugins, run))
    links, read = tracker_links(plugins, run), partial(read_tracked_run, context, run.id)
    async with forward(), sync_trackers(context.store, context.clock, redactor, run.id, links, read):
        yield
        await flush_outage_events(context.store)
    while await flush_outage_events(context.store):  # of an outage during the last delivery
        async with forward():
            pass
    await _update_views(context, run.id)


async def _update_views(context: ProjectContext, run: str) -> None:
    """Update the views if they exist; record a failure as an event."""
    store, project = context.store, context.project
    if not await anyio.to_thread.run_sync(os.path.lexists, project.views):
        return
    try:
        with anyio.fail_after(_VIEWS_TIMEOUT):
            await export_views(store, project, context.clock.now())
    except (CouncilError, OSError, TimeoutError) as error:
        reason = str(error) or f"not finished within {_VIEWS_TIMEOUT:g} s"
        with suppress(CouncilError, OSError):
            await store.commit(Commit([], [Event.of(ViewsFailing(run=run, reason=reason))]))


def _subscribers(plugins: Plugins, run: RunDocument) -> list[EventSubscriber]:
    """Return the subscribers for a run's sinks.

    Opening a subscriber reports a missing plugin.
    """
    return [
        EventSubscriber(name, sink.events, partial(plugins.open, "sink", name, sink))
        for name, sink in run.sinks.items()
    ]


def tracker_links(plugins: Plugins, run: RunDocument) -> list[TrackerLink]:
    """Return the trackers of a run; opening one reports a missing plugin."""
    return [
        TrackerLink(name, tracker.sync_interval, partial(plugins.open, "tracker", name, tracker))
        for name, tracker in run.trackers.items()
    ]


async def read_tracked_run(context: ProjectContext, run: str) -> TrackedRun:
    """Return a run as its trackers see it."""
    reader = RunReader(context)
    record = await reader.record(run)
    report = reader.describe(record, is_live=record.run.ended is None)
    return TrackedRun(record, report, await read_claims(context.store, run))


async def sync_with_trackers(context: ProjectContext, run: RunDocument) -> list[SyncReport]:
    """Synchronize a run with all of its trackers once.

    Raises RefusedError if a tracker fails; the others are synchronized.
    """
    redactor, read = Redactor(secret_values(context.environ)), partial(read_tracked_run, context, run.id)
    reports, failures = [], []
    for link in tracker_links(await context.plugins.load(), run):
        sync = TrackerSync(context.store, context.clock, redactor, run.id, link, read)
        try:
            reports.append(await sync.once())
        except TimeoutError:
            failures.append(RefusedError(f"tracker {link.name!r} timed out", "try again later"))
        except (PluginFailed, RefusedError) as error:
            remedy = error.remedy if isinstance(error, RefusedError) else "fix the tracker"
            message = error.message if isinstance(error, RefusedError) else str(error)
            failures.append(RefusedError(f"tracker {link.name!r}: {redactor.text(message)}", remedy))
    if failures:
        raise failures[0]
    return reports


async def read_sync_status(context: ProjectContext, run: RunDocument) -> list[TrackerStatus]:
    """Return what is recorded about the trackers of a run."""
    return await read_tracker_statuses(context.store, await read_tracked_run(context, run.id))


@asynccontextmanager
async def survive_store_outages(
    context: ProjectContext, run: str, settings: CoordinationSettings, *, gives_up: Callable[[], bool]
) -> AsyncIterator[ProjectContext]:
    """Yield the context with a store that survives outages.

    While the store is unreachable, it waits or continues offline. A store on this machine waits only while its disk is
    full.
    """
    if context.url == MEMORY:
        yield context
        return
    store, clock = end_pauses(context.store), context.clock
    is_local = bool(context.store.local_paths())

    async def record_event(event: TypedEvent) -> None:
        log_event(event)
        await survived.commit(Commit([], [Event.of(event.within(run=run))]))

    folder = context.project.folder / "outage"
    mode = "pause" if is_local else settings.when_unreachable
    is_temporary = is_full if is_local else is_outage
    async with survive_outages(
        store,
        mode,
        clock,
        folder,
        record_event,
        is_temporary=is_temporary,
        gives_up=gives_up,
        kinds=DOCUMENT_KINDS,
    ) as survived:
        yield replace(context, store=survived)
