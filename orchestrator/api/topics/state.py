"""The topic `state`: the documents, and the maintenance of the store."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import anyio.to_thread
from pydantic import ValidationError

from orchestrator.api.context import ProjectContext
from orchestrator.api.run_index import RunIndex
from orchestrator.api.run_reader import RunReader
from orchestrator.api.topic import Topic
from orchestrator.api.transfer import export_store, import_store
from orchestrator.domain.documents.conflicts import DocumentUpdate
from orchestrator.domain.events.state import StateProbed, SteeringCalled
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.domain.settings.run_settings import Retention
from orchestrator.engine.diagnostics import state_findings as findings
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.engine.diagnostics.state_findings import LogGrowth, SilentSession
from orchestrator.engine.phases.verification import RunVerification, verify_run
from orchestrator.engine.state.records import read_run, read_run_with_tasks, read_spec, task_documents
from orchestrator.engine.views import ViewPosition, export_views
from orchestrator.errors import HistoryCompacted, RefusedError, StoreUnavailable, UnreadableDocument
from orchestrator.protocols import (
    Commit,
    CommitRecord,
    CompactionResult,
    Document,
    Event,
    JsonObject,
    Key,
    ServerStatistics,
    Store,
    StoreStatistics,
    VerificationReport,
)
from orchestrator.sessions.output.log_files import log_path
from orchestrator.state.documents import conflicts
from orchestrator.state.documents.conflicts import Conflict, ConflictResolution, UpdateResult, list_pending
from orchestrator.state.documents.log_reader import DocumentChange, is_run_document, read_range, subscribe
from orchestrator.state.documents.update import compact_log, delete_expired, update_document
from orchestrator.state.documents.validation import check_manual_change, repair_documents, verify_store
from orchestrator.state.transfer.copying import CopyResult

#: The most characters of the name of a client or tool, and of the arguments, in a recorded call.
_LONGEST_NAME: Final = 100
_MOST_CHARS: Final = 2000


class State(Topic):
    """The documents of a project and their store. Available as `council.state`.

    Documents of a run can't be changed while a process is active in it, and documents that only council writes can't be
    changed at all (`state.documents.validation`): methods that write raise RefusedError.
    """

    async def get(self, key: Key) -> Document | None:
        """Return the newest version of a document, or None."""
        return await self._context.store.get(key)

    async def update(
        self,
        key: Key,
        change: Callable[[JsonObject | None], JsonObject | None],
        *,
        expected_version: int | None = None,
        ttl: float | None = None,
    ) -> Document | None:
        """Replace a document's value by `change(value)`, and return the new document.

        `change` gets a copy of the value (None: no document), and returns None to delete it; `update` then also returns
        None. If another process commits first, `change` is called again with the newer value, at most five times in
        total, with exponential backoff. The document expires after `ttl` seconds.

        Raises VersionConflict, with the other writer and its time, after the last attempt, or immediately if the
        version is not `expected_version` (0: no document). Raises RefusedError also if the value would make
        one of council's own documents unreadable.
        """
        await self._check_idle(key)
        return await update_document(
            self._context.store, key, change, expected_version=expected_version, ttl=ttl, check=check_manual_change
        )

    def subscribe(self, pattern: str, after: int | None = None) -> AsyncGenerator[DocumentChange]:
        """Yield each new version, by any process, of documents that match a pattern.

        The pattern matches `kind/id`; `*` matches any characters, including `/`. The stream starts after the position
        `after`: 0 is the beginning of the log, None is the time of the first iteration. It never ends on its own.
        """
        return subscribe(self._context.store, pattern, after)

    async def apply_updates(
        self, updates: Sequence[DocumentUpdate[Key]], strategy: str = "last_write_wins"
    ) -> UpdateResult:
        """Apply updates of documents; resolve conflicting ones by a strategy.

        The strategies are `last_write_wins`, `first_write_wins`, `merge`, and `manual`, which records the conflict for
        `resolve_conflict`. Raises RefusedError also if a value would make a run unreadable.
        """
        for key in dict.fromkeys(update.key for update in updates):
            await self._check_idle(key)
        return await conflicts.apply_updates(self._context.store, updates, strategy, check=check_manual_change)

    async def conflicts(self) -> Sequence[Conflict]:
        """Return the update conflicts that a user has to resolve, oldest first."""
        return await conflicts.list_pending(self._context.store)

    async def resolve_conflict(
        self, conflict: str, choice: int | JsonObject, *, force: bool = False
    ) -> ConflictResolution:
        """Resolve a conflict by its id or document, with a candidate or a value.

        Candidates are numbered from 1. Raises RefusedError also if the document has changed since (unless `force`), or
        if the value would make the run unreadable.
        """
        store, newest = self._context.store, None
        with suppress(RefusedError):
            newest = await self._index.newest()
        pending = await conflicts.find_conflict(store, conflict, newest)
        await self._check_idle(pending.key)
        document = await conflicts.resolve_conflict(store, pending.id, choice, force=force, check=check_manual_change)
        return ConflictResolution(pending, document)

    async def _check_idle(self, key: Key) -> None:
        """Raise RefusedError if a process is active in a document's run.

        It would not notice the change.
        """
        index = self._index
        run = next((run for run in await index.ids() if is_run_document(key, run)), None)
        if run is not None and await index.has_live_process(run):
            message = f"{key} belongs to run {run}, which is active"
            raise RefusedError(message, "stop it with SIGINT, or wait until it ends")

    async def record_call(
        self, client: str, tool: str, arguments: JsonObject, *, run: str | None = None, refused: str | None = None
    ) -> None:
        """Record the call of a tool by another agent, as an event `steering.called`.

        `client` is the name that the agent gave itself. `refused` is the reason if the call is not performed.
        """
        context = self._context
        await context.check_writable()
        redactor = Redactor(secret_values(context.environ))

        def text(value: str, limit: int = _MOST_CHARS) -> str:
            shown = redactor.text(value)[:limit]
            return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in shown)

        about = {"run": run, "refused": refused and text(refused)}
        called = SteeringCalled(
            client=text(client, _LONGEST_NAME),
            tool=text(tool, _LONGEST_NAME),
            arguments=text(json.dumps(arguments, ensure_ascii=False)),
            **{name: one for name, one in about.items() if one},
        )
        await context.store.commit(Commit([], [Event.of(called)]))

    async def verify(self) -> VerificationReport:
        """Verify the whole log and all documents."""
        return await verify_store(self._context.store)

    async def verify_run(self, run: str | None = None) -> RunVerification:
        """Verify a run's workflow records against all rules, including those of plugins.

        Changes nothing, and works on active runs.
        """
        context, plugins = self._context, await self._context.plugins.load()
        name = await RunIndex(context).find(run)
        rules = plugins.constraints
        return await verify_run(context.store, name, plugins.checked_kinds(), rules, context.clock, context.environ)

    async def repair(self) -> VerificationReport:
        """Restore the readable state, and return the report of a `verify` afterwards.

        A document that does not match the schema of its kind is reset to its newest readable value, unless a process is
        active in its run. See `Store.repair`.
        """
        store, index = self._context.store, self._index
        await store.repair()
        report = await verify_store(store)
        live = [run for run in await index.ids() if await index.has_live_process(run)]
        idle = [key for key in report.unreadable if not any(is_run_document(key, run) for run in live)]
        await repair_documents(store, idle)
        return await verify_store(store) if idle else report

    async def check_health(self) -> StateHealth:
        """Check integrity, size, latency, server, runs, sessions and open conflicts.

        Makes one durable commit to measure the latency.
        """
        return await Health(self._context).examine()

    async def compact(self, age: float | None = None, size: int | None = None) -> CompactionResult:
        """Delete expired documents, and prune the log.

        The default limits are the newest run's retention. Of commits that are older than `age` seconds or exceed `size`
        bytes of log, only the last versions of each document remain.
        """
        retention = await read_retention(self._context)
        age, size = retention.retention if age is None else age, retention.max_size if size is None else size
        await delete_expired(self._context.store)
        return await compact_log(self._context.store, self._context.clock, age, size)

    async def export_to(self, file: str | Path | IO[bytes], *, force: bool = False) -> CopyResult:
        """Write the whole state to one file, for `import_from`.

        A stream is written directly. Raises RefusedError if the state is damaged, or if the file exists, unless
        `force`.
        """
        return await export_store(self._context.store, file, force=force, clock=self._context.clock)

    async def import_from(self, file: str | Path | IO[bytes]) -> CopyResult:
        """Load an export into an empty store, with all positions and versions.

        Raises RefusedError, with nothing changed, if the store is not empty or the file is incomplete.
        """
        return await import_store(file, self._context.store)

    async def export_views(self) -> ViewPosition:
        """Write readable copies of the state, and return their position.

        They are in `Council.project.views`, and each run updates them when it ends. Raises LockHeld if another process
        writes them and does not finish in time.
        """
        await self._context.check_writable()
        return await export_views(self._context.store, self._context.project, self._context.clock.now())


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
