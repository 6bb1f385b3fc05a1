"""The topic `sessions`: the sessions of a run, and the values that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.api.topic import Topic
from orchestrator.api.topics.activity import RunActivity
from orchestrator.api.topics.changes import TaskChanges, trusted_git
from orchestrator.api.topics.logs import find_run_adapters, no_running_session_error, read_named_task
from orchestrator.api.topics.reports import RunReports
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.domain.sessions.contexts import (
    STALE_CONTEXT_SECONDS,
    SessionContext,
    TaskSummary,
    find_file_conflicts,
    summarize_task,
)
from orchestrator.domain.sessions.predicted_conflicts import PredictedConflict, list_conflicts
from orchestrator.engine.session_api.contexts import clean_contexts, read_contexts
from orchestrator.engine.session_api.details import SessionDetails, find_workspace, read_session_details
from orchestrator.engine.session_api.shared_values import SharedValues
from orchestrator.engine.state.records import check_task, read_run


class Sessions(Topic):
    """The sessions of a run, available as `council.sessions`.

    `run` is a name that `council.runs.find` accepts.
    """

    async def list(self, run: str | None = None) -> Sequence[SessionContext]:
        """Return the session contexts of a run, each of the last half hour."""
        return await read_contexts(self._context.store, await self._find(run))

    async def file_conflicts(self, run: str | None = None) -> Mapping[str, Sequence[SessionContext]]:
        """Return files that several sessions edit or have locked, by session."""
        return find_file_conflicts(await self.list(run))

    async def predicted_conflicts(self, run: str | None = None) -> Sequence[PredictedConflict]:
        """Return the predicted merge conflicts between the running sessions of a run."""
        return list_conflicts(await self.list(run))

    async def summarize_task(self, task: str, run: str | None = None) -> TaskSummary:
        """Return a summary of a task's sessions.

        Raises RefusedError if the run has no such task.
        """
        run = await self._find(run)
        await check_task(self._context.store, await read_run(self._context.store, run), task)
        return summarize_task(task, await self.list(run))

    async def prune(self, after: float = STALE_CONTEXT_SECONDS) -> Sequence[str]:
        """Remove contexts not updated for `after` seconds; return their names."""
        return await clean_contexts(self._context.store, self._context.clock.now(), after)

    async def details(self, task: str, run: str | None = None) -> SessionDetails:
        """Return the progress of a task's running session.

        Raises RefusedError if none is running.
        """
        context, name = self._context, await self._find(run)
        run_document, document = await read_named_task(context.store, name, task)
        if document.status is not TaskStatus.RUNNING or not await self._index.is_live(name):
            raise no_running_session_error(name, task)
        session, redactor = SessionName(name, task, document.attempt.number), self._redactor()
        adapters = await find_run_adapters(context, run_document)
        logs, environ = context.project.logs_folder, context.environ
        workspace = await find_workspace(context.store, adapters, logs, redactor, environ, session)
        return await read_session_details(trusted_git(run_document, context.environ), workspace, redactor)

    async def activity(self, run: str | None = None) -> RunActivity:
        """Return a snapshot of a run, to follow its live activity."""
        context, name = self._context, await self._find(run)
        position, record = await context.store.position(), await self._reader.record(name)
        specs = await context.store.list("spec", f"{name}/")
        attempts = {spec.key.id.partition("/")[2]: int(spec.value["attempts"]) for spec in specs}
        adapters = await find_run_adapters(context, record.run)
        logs = context.project.logs(name)
        return RunActivity(record, position, attempts, RunReports(context), TaskChanges(context), adapters, logs)

    async def shared_values(self, run: str | None = None) -> SharedValues:
        """Return the key-value store of a run's sessions.

        Raises RefusedError if there is no such run.
        """
        document = await read_run(self._context.store, await self._find(run))
        return SharedValues(self._context.store, self._context.clock, self._redactor(), document.id)

    def _redactor(self) -> Redactor:
        return Redactor(secret_values(self._context.environ))
