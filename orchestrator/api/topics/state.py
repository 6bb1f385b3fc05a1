"""The topic `state`: the documents, and the maintenance of the store."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from orchestrator.api.run_index import RunIndex
from orchestrator.api.topic import Topic
from orchestrator.api.topics.health import Health, StateHealth, read_retention
from orchestrator.api.transfer import export_store, import_store
from orchestrator.domain.documents.conflicts import DocumentUpdate
from orchestrator.domain.events.state import SteeringCalled
from orchestrator.domain.security.secrets import Redactor, redact_urls, secret_values
from orchestrator.engine.phases.verification import RunVerification, verify_run
from orchestrator.engine.state.records import read_run
from orchestrator.engine.views import ViewPosition, export_views
from orchestrator.errors import RefusedError
from orchestrator.protocols import (
    Commit,
    CompactionResult,
    Document,
    Event,
    JsonObject,
    Key,
    VerificationReport,
)
from orchestrator.repo.worktrees.hub import find_hub
from orchestrator.state.documents import conflicts
from orchestrator.state.documents.conflicts import Conflict, ConflictResolution, UpdateResult
from orchestrator.state.documents.log_reader import DocumentChange, is_run_document, subscribe
from orchestrator.state.documents.update import compact_log, delete_expired, update_document
from orchestrator.state.documents.validation import check_manual_change, repair_documents, verify_store
from orchestrator.state.transfer.copying import CopyResult

#: The most characters of the name of a client or tool, and of the arguments, in a recorded call.
_LONGEST_NAME: Final = 100
_MOST_CHARS: Final = 2000


@dataclass(frozen=True, slots=True)
class ProjectPaths:
    """The paths of a project's files; the repositories are None before its first run."""

    repository: str | None
    state: str
    """The folder of the store, or its URL if it has no folder."""
    log: Path
    logs: Path
    """The output of sessions, in one folder per run."""
    hub: Path | None
    trusted: Path | None


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
        """Replace a document's value with `change(value)`, and return the new document.

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

    async def paths(self) -> ProjectPaths:
        """Return the paths of the project's files."""
        context, project = self._context, self._context.project
        local = context.store.local_paths()
        state = str(local[0]) if local else redact_urls(context.url)
        if not await context.store.list("run"):
            return ProjectPaths(None, state, project.log_file, project.logs_folder, None, None)
        run = await read_run(context.store, await RunIndex(context).newest())
        hub = find_hub(run, context.environ)
        return ProjectPaths(
            redact_urls(run.repo), state, project.log_file, project.logs_folder, hub.objects.parent, hub.trusted
        )

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
