"""State health: integrity, growth, interrupted runs and silent sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio.to_thread
from pydantic import ValidationError

from orchestrator.api.context import ProjectContext
from orchestrator.api.run_reader import RunReader
from orchestrator.domain.events.state import StateProbed
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.settings.run_settings import Retention
from orchestrator.engine.diagnostics import state_findings as findings
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.engine.diagnostics.state_findings import LogGrowth, SilentSession
from orchestrator.engine.state.records import read_run, read_run_with_tasks, read_spec, task_documents
from orchestrator.errors import HistoryCompacted, RefusedError, StoreUnavailable, UnreadableDocument
from orchestrator.protocols import Commit, CommitRecord, Event, ServerStatistics, Store, StoreStatistics
from orchestrator.sessions.output.log_files import log_path
from orchestrator.state.documents.conflicts import list_pending
from orchestrator.state.documents.log_reader import read_range
from orchestrator.state.documents.validation import verify_store

#: The number of newest commits from which the growth of the log is estimated.
_RECENT_COMMITS: Final = 1000


@dataclass(frozen=True, slots=True)
class StateHealth:
    """The health of a project's state."""

    findings: Sequence[Finding]
    read_seconds: float
    """The duration of a read."""
    commit_seconds: float | None
    """The duration of a durable commit; None if it failed."""
    server: ServerStatistics | None
    """The store's server; None for a store without one."""


@dataclass(frozen=True, slots=True)
class Health:
    """The health check of a project's state."""

    context: ProjectContext

    @property
    def reader(self) -> RunReader:
        """The reader of runs."""
        return RunReader(self.context)

    async def examine(self) -> StateHealth:
        """Examine everything; makes one durable commit to measure the latency."""
        store = self.context.store
        runs = [run for name in await self.reader.index.ids() if (run := await self._run(name)) is not None]
        open_runs = {run.id: await self.reader.index.has_live_process(run.id) for run in runs if run.ended is None}
        sessions = [one for run, is_live in open_runs.items() if is_live for one in await self._readable_sessions(run)]
        statistics, now = await store.statistics(), self.context.clock.now()
        integrity = await verify_store(store)
        read, commit, latency = await self._latency()
        found = [
            *findings.check_integrity(integrity),
            findings.check_log(statistics, await _growth(store, statistics, now), await read_retention(self.context)),
            *findings.check_documents(statistics),
            findings.check_expired(statistics),
            *findings.check_server(statistics.server),
            latency,
            findings.check_interrupted_runs([run.id for run in runs if await self._is_left(run, open_runs)]),
            *findings.check_silent_sessions(sessions),
            findings.check_conflicts(len(await list_pending(store))),
        ]
        return StateHealth(found, read, commit, statistics.server)

    async def _run(self, run: str) -> RunDocument | None:
        with suppress(RefusedError):  # an unreadable run has its own finding
            return await read_run(self.context.store, run)
        return None

    async def _is_left(self, run: RunDocument, open_runs: Mapping[str, bool]) -> bool:
        """Return True if a run has unfinished tasks and no active process.

        `open_runs` maps each run that has not ended to whether it has an active process.
        """
        if run.ended is None:
            return not open_runs[run.id]
        with suppress(RefusedError, UnreadableDocument):
            return (await self.reader.status(run.id, allow_missing=True)).has_unfinished_tasks
        return False

    async def _latency(self) -> tuple[float, float | None, Finding]:
        """Return the durations of a read and of a commit (None: it failed), and the finding about them."""
        store, clock = self.context.store, self.context.clock
        began = clock.monotonic()
        await store.position()
        read, began = clock.monotonic() - began, clock.monotonic()
        try:
            await store.commit(Commit([], [Event.of(StateProbed())]))
        except StoreUnavailable as error:
            return read, None, Finding("latency", Level.PROBLEM, error.message, error.remedy)
        commit = clock.monotonic() - began
        return read, commit, findings.check_latency(commit, read, is_local=bool(store.local_paths()))

    async def _readable_sessions(self, run: str) -> list[SilentSession]:
        with suppress(UnreadableDocument):
            return await self._sessions(run)
        return []

    async def _sessions(self, run: str) -> list[SilentSession]:
        """Return the running sessions of a run."""
        document, documents = await read_run_with_tasks(self.context.store, run)
        tasks = task_documents(documents, document.tasks)
        sessions = []
        for task, one in tasks.items():
            if one.status is TaskStatus.RUNNING:
                logs = self.context.project.logs(run)
                files = [log_path(logs, task, one.attempt.number, stream) for stream in ("stdout", "stderr")]
                last_output = max(await anyio.to_thread.run_sync(_last_written, files), one.attempt.started)
                limit = (await read_spec(self.context.store, run, task)).idle_timeout
                sessions.append(SilentSession(run, task, max(self.context.clock.now() - last_output, 0.0), limit))
        return sessions


async def read_retention(context: ProjectContext) -> Retention:
    """Return the log retention of the newest readable run."""
    for run in reversed(await RunReader(context).index.ids()):
        with suppress(RefusedError, ValidationError):  # skip unreadable runs
            return (await read_run(context.store, run)).state
    return Retention()


def _last_written(files: Sequence[Path]) -> float:
    """Return the time of the last write to any of the files, 0 if none exists. Blocks."""
    times = [0.0]
    for file in files:
        with suppress(FileNotFoundError):
            times.append(file.stat().st_mtime)
    return max(times)


async def _growth(store: Store, statistics: StoreStatistics, now: float) -> LogGrowth:
    """Return the growth rate of the log, from recent commits, and its age."""
    begin = max(statistics.position - _RECENT_COMMITS, statistics.first)
    oldest, early = await _first_record_after(store, statistics.first), await _first_record_after(store, begin)
    seconds = 0.0 if early is None else max(now - early.time, 0.0)
    return LogGrowth(statistics.position - begin, seconds, 0.0 if oldest is None else max(now - oldest.time, 0.0))


async def _first_record_after(store: Store, position: int) -> CommitRecord | None:
    """Return the first commit after a position; None if pruned or none."""
    with suppress(HistoryCompacted):
        async with aclosing(read_range(store, position, position + 1)) as records:
            return await anext(records, None)
    return None
