"""The topic `reports`: summary, metrics, usage, failures, sizes of changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Final

import anyio.to_thread

from orchestrator.api.topic import Topic
from orchestrator.domain.events.runs import RunCreated
from orchestrator.domain.runs.metrics import Metrics, compute_metrics
from orchestrator.domain.runs.model import INTERRUPTED, Attempt, RunDocument, TaskDocument
from orchestrator.domain.runs.usage import RunUsage, compute_usage
from orchestrator.domain.scheduling.active_time import compute_run_active_time, find_last_heartbeat
from orchestrator.engine.reports.report import AdapterFailure, RunRecord, last_failures
from orchestrator.engine.reports.run_summary import RunSummary, build_run_summary, landing_times
from orchestrator.engine.state.records import read_run, read_run_with_tasks, read_tasks, task_documents, task_key
from orchestrator.errors import HistoryCompacted, RefusedError
from orchestrator.locking.orchestrators import read_orchestrators
from orchestrator.protocols import CommitRecord, Document, RecordedEvent, Store
from orchestrator.repo.git.change_counts import Changes, count_many
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees.hub import find_hub
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.log_files import last_activity
from orchestrator.state.documents.log_reader import read_backwards

#: The number of events in the summary of a run.
MAX_EVENTS: Final = 100
#: The number of tasks that a query of all tasks reads in the time of a query of one, from a server.
_WORTH_OF_ONE_READ: Final = 50


class RunReports(Topic):
    """Computed reports on runs, available as `council.reports`.

    `run` is a name that `council.runs.find` accepts.
    """

    async def summary(self, run: str | None = None) -> RunSummary:
        """Return the summary of a run, even if its repositories are missing."""
        reader = self._reader
        record = await reader.record(await self._find(run))
        name, store = record.run.id, self._context.store
        landed_at = await find_landing_times(store, record.run, record.tasks, await read_tasks(store, name))
        checkouts = await anyio.to_thread.run_sync(_find_worktrees, record.run, record.tasks, self._context.environ)
        now = self._context.clock.now()
        active = compute_run_active_time(record.orchestrators, record.tasks.values(), landed_at, now)
        is_live = record.run.ended is None and await reader.index.has_live_process(name)
        report = reader.describe(record, is_live=is_live)
        return build_run_summary(record, report, landed_at, checkouts, await self._events(name), active)

    async def metrics(self, run: str | None = None) -> Metrics:
        """Return the metrics of a run."""
        store = self._context.store
        known, documents = await read_run_with_tasks(store, await self._find(run))
        tasks = task_documents(documents, known.tasks)
        landed_at = await find_landing_times(store, known, tasks, documents)
        orchestrators = (await read_orchestrators(store, known.id)).values()
        now = self._context.clock.now()
        return compute_metrics(tasks, landed_at, compute_run_active_time(orchestrators, tasks.values(), landed_at, now))

    async def usage(self, run: str | None = None) -> RunUsage:
        """Return the usage of a run's sessions."""
        context, reader = self._context, self._reader
        name, now = await self._find(run), context.clock.now()
        record = await reader.record(name)
        tasks: Mapping[str, TaskDocument] = record.tasks
        if not await reader.index.has_live_process(name):
            tasks = await anyio.to_thread.run_sync(mark_interrupted, record, tasks, context.project.logs(name), now)
        return compute_usage(record.run, tasks, now, sorted(record.damaged))

    async def last_failures(self, run: str | None = None) -> dict[str, AdapterFailure]:
        """Return the last failed session of each adapter of a run, by the adapter's name."""
        return last_failures(await self._reader.record(await self._find(run)))

    async def landed_changes(self, run: str, commits: Mapping[str, str]) -> dict[str, Changes]:
        """Return the size of each task's changes; `commits` has its landed commit.

        The user's commits that a landing moves from the base to the target do not count.
        """
        document = await read_run(self._context.store, run)
        document.check_not_imported()
        works = await self._landed_works(document, commits)
        git = Git(find_hub(document, self._context.environ).trusted, environ=self._context.environ)
        counted = await count_many(git, dict(works.values()))
        return {task: counted[commit] for task, (commit, _) in works.items()}

    async def _landed_works(self, run: RunDocument, commits: Mapping[str, str]) -> dict[str, tuple[str, str | None]]:
        """Return the commit of each task and its base; None if the base is unknown."""
        store = self._context.store
        if len(commits) * _WORTH_OF_ONE_READ < len(run.tasks):
            found = {task: one for task in commits if (one := await store.get(task_key(run.id, task))) is not None}
        else:
            found = dict(await read_tasks(store, run.id))
        works: dict[str, tuple[str, str | None]] = {}
        for task, landed in commits.items():
            works[task] = landed, None
            with suppress(RefusedError):
                document = task_documents(found, [task])[task]
                if document.landed == landed and document.commit is not None:
                    works[task] = document.commit, document.built_base
        return works

    async def _events(self, run: str) -> list[RecordedEvent]:
        found: deque[RecordedEvent] = deque()
        store = self._context.store
        with suppress(HistoryCompacted):
            async with aclosing(read_backwards(store, await store.position())) as parts:
                async for part in parts:
                    for one in _events_of(part, run):
                        found.appendleft(one)
                        if len(found) == MAX_EVENTS or one.event.type == RunCreated.type:
                            return list(found)
        return list(found)


async def find_landing_times(
    store: Store, run: RunDocument, tasks: Mapping[str, TaskDocument], documents: Mapping[str, Document]
) -> dict[str, float]:
    """Return landing times by task, even of a run that was removed and restored."""
    found = landing_times(tasks, documents)
    for task, time in found.items():
        if run.imported is None and run.ended is not None and time > run.ended:
            versions = await store.history(documents[task].key)
            same = [one.time for one in versions if (one.value or {}).get("landed") == tasks[task].landed]
            found[task] = min(same, default=time)
    return found


def mark_interrupted(
    record: RunRecord, tasks: Mapping[str, TaskDocument], logs: Path, now: float
) -> dict[str, TaskDocument]:
    """Return these tasks of an inactive run, with unfinished sessions as interrupted. Blocks."""

    def end(task: str, one: Attempt) -> Attempt:
        if one.ended is not None:
            return one
        ended = last_activity(logs, task, one.number, find_last_heartbeat(record.orchestrators, one.started), now)
        return one.model_copy(update={"ended": ended, "outcome": INTERRUPTED})

    return {
        name: task.model_copy(update={"attempts": tuple(end(name, one) for one in task.attempts)})
        for name, task in tasks.items()
    }


def _events_of(part: Sequence[CommitRecord], run: str) -> Iterator[RecordedEvent]:
    """Yield the events of a run, newest first."""
    for record in reversed(part):
        for event in reversed(record.events):
            if event.data.get("run") == run:
                yield RecordedEvent(record.position, record.time, event)


def _find_worktrees(run: RunDocument, tasks: Mapping[str, TaskDocument], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the worktrees of the newest attempts, by task. Blocks.

    Imported tasks have their original worktrees.
    """
    hub = find_hub(run, environ)
    newest = {task: Worktree(hub, run.id, task, one.attempt.number) for task, one in tasks.items() if one.attempts}
    found = {task: str(slot.tree) for task, worktree in newest.items() if (slot := worktree.slot) is not None}
    return found | {
        task: one.imported.worktree for task, one in tasks.items() if one.imported and one.imported.worktree
    }
