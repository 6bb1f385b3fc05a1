"""Read the recorded state of a project, now and at earlier positions."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio.to_thread

from orchestrator.api.runs import ProjectRuns
from orchestrator.domain.runs.metrics import Metrics, compute_metrics
from orchestrator.domain.runs.model import INTERRUPTED, Attempt, RunDocument, TaskDocument
from orchestrator.domain.runs.usage import RunUsage, compute_usage
from orchestrator.domain.scheduling.active_time import compute_run_active_time
from orchestrator.engine.reports.overview import RunOverview, build_overview, landing_times
from orchestrator.engine.reports.report import AdapterFailure, last_failures
from orchestrator.engine.state.records import (
    check_task,
    read_handoffs,
    read_run,
    read_run_with_tasks,
    read_spec,
    read_tasks,
    task_documents,
)
from orchestrator.errors import HistoryCompacted, RefusedError
from orchestrator.locking.orchestrators import read_orchestrators
from orchestrator.protocols import (
    VERSIONS_KEPT,
    CommitRecord,
    Document,
    DocumentVersion,
    Key,
    RecordedEvent,
    StateSnapshot,
)
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.log_files import last_activity
from orchestrator.state.documents.checkpoints import CHECKPOINT_KIND
from orchestrator.state.documents.log_reader import find_position, is_run_document, read_backwards, read_range

if TYPE_CHECKING:
    from orchestrator.engine.reports.task_details import TaskDetails

#: The number of events in the overview of a run.
MAX_EVENTS: Final = 100


def is_about_run(record: CommitRecord, run: str) -> bool:
    """Return True if a commit changed a document of a run, or recorded an event of it."""
    keys = (*record.documents, *record.unreadable)
    return any(is_run_document(key, run) for key in keys) or any(one.data.get("run") == run for one in record.events)


@dataclass(frozen=True, slots=True)
class StateHistory:
    """The recorded state of a project, as its log has it; `run` is a run's id."""

    runs: ProjectRuns

    async def position(self) -> int:
        """Return the position of the newest commit."""
        return await self.runs.store.position()

    async def position_at(self, instant: float) -> int:
        """Return the position of the newest commit up to a time; 0 if all commits are later.

        RefusedError if the log does not go back that far.
        """
        return await find_position(self.runs.store, instant)

    async def position_of(self, checkpoint: str) -> int | None:
        """Return the position of a checkpoint; None if there is none with this id."""
        found = await self.runs.store.get(Key(CHECKPOINT_KIND, checkpoint))
        return None if found is None else int(found.value["position"])

    async def at(self, position: int, *, run: str | None = None, names: Sequence[str] = ()) -> StateSnapshot:
        """Return the documents right after the commit at a position: all, those of a run, or those in `names`.

        A name is `kind/id`, `kind/rest` for `kind/<run>/rest` (by default of the newest run), or either with `*` for
        any characters. RefusedError for a name without a match, and if the log does not go back that far.
        """
        with _refuse_compacted():
            state = await self.runs.store.at(position)
        documents = {key: one for key, one in state.documents.items() if run is None or is_run_document(key, run)}
        if names:
            home = run or await self._newest()
            keys = [key for name in names for key in _named(name, documents, home, f"at position {position}")]
            documents = {key: documents[key] for key in keys}
        return StateSnapshot(state.position, state.time, documents)

    async def key(self, name: str) -> Key:
        """Return the key of a name as in `at`, also of a deleted document. RefusedError if there is none."""
        kind, _, rest = name.partition("/")
        exact, newest = Key(kind, rest), await self._newest()
        for key in (exact, *([Key(kind, f"{newest}/{rest}")] if newest else [])):
            if await self.runs.store.history(key, 1):
                return key
        with _refuse_compacted():
            state = await self.runs.store.at(await self.position())
        raise _unknown(name, state.documents, newest, "in the state")

    async def history(self, key: Key, limit: int = VERSIONS_KEPT) -> Sequence[DocumentVersion]:
        """Return the newest versions of a document in the log, the newest first: at most `limit`."""
        return await self.runs.store.history(key, limit)

    async def commits(self, *, run: str | None = None, after: int = 0, until: int) -> AsyncGenerator[CommitRecord]:
        """Yield the commits after position `after` up to `until`, of a run or all; 0 starts at the oldest one.

        RefusedError if the log does not go back to `after`.
        """
        try:
            async with aclosing(read_range(self.runs.store, after, until)) as records:
                async for record in records:
                    if run is None or is_about_run(record, run):
                        yield record
        except HistoryCompacted as gone:
            if after:
                raise _compacted_refusal(gone) from None
            start = gone.first
        else:
            return
        async with aclosing(self.commits(run=run, after=start, until=until)) as rest:
            async for record in rest:
                yield record

    async def newest_commits(
        self, limit: int, *, run: str | None = None, after: int = 0, until: int
    ) -> Sequence[CommitRecord]:
        """Return the newest commits after `after` up to `until`, at most `limit`, in the log's order."""
        found: deque[CommitRecord] = deque()
        with suppress(HistoryCompacted):
            async with aclosing(read_backwards(self.runs.store, until, after)) as parts:
                async for part in parts:
                    for record in reversed(part):
                        if run is None or is_about_run(record, run):
                            found.appendleft(record)
                        if len(found) == limit:
                            return found
        return found

    async def metrics(self, run: str) -> Metrics:
        """Return the metrics of a run."""
        known, documents = await read_run_with_tasks(self.runs.store, run)
        tasks = task_documents(documents, known.tasks)
        landed_at = await self._landed_at(known, tasks, documents)
        others = await read_orchestrators(self.runs.store, run)
        return compute_metrics(
            tasks, landed_at, compute_run_active_time(others.values(), tasks.values(), landed_at, self.runs.clock.now())
        )

    async def usage(self, run: str) -> RunUsage:
        """Return the usage of a run's sessions."""
        record, now = await self.runs.record(run), self.runs.clock.now()
        tasks: Mapping[str, TaskDocument] = record.tasks
        if not await self.runs.has_live_process(run):
            tasks = await anyio.to_thread.run_sync(_mark_interrupted, tasks, self.runs.project.logs(run), now)
        return compute_usage(record.run, tasks, now, sorted(record.damaged))

    async def last_failures(self, run: str) -> dict[str, AdapterFailure]:
        """Return the last failed session of each adapter of a run, by the adapter's name."""
        return last_failures(await self.runs.record(run))

    async def task_details(self, run: str, task: str) -> TaskDetails:
        """Return a task in full. RefusedError if the run has no such task."""
        from orchestrator.engine.reports.task_details import TaskDefinition, build_task_details  # noqa: PLC0415  seldom needed

        document = await read_run(self.runs.store, run)
        await check_task(self.runs.store, document, task)
        record = await self.runs.without_dropped(await self.runs.record(run), task)
        shown, now, logs = record.tasks[task], self.runs.clock.now(), self.runs.project.logs(run)
        is_live = record.run.ended is None and await self.runs.has_live_process(run)
        if not is_live:
            shown = (await anyio.to_thread.run_sync(_mark_interrupted, {task: shown}, logs, now))[task]
        report = next(one for one in self.runs.describe(record, is_live=is_live).tasks if one.id == task)
        definition = TaskDefinition()
        if record.run.imported is None:
            spec = await read_spec(self.runs.store, run, task)
            definition = TaskDefinition(spec.prompt, spec.tracker, spec.needs, plan=spec.plan)
            if spec.workflow is not None:
                names = [phase["name"] for phase in record.run.workflows[spec.workflow]]
                definition = replace(definition, workflow=spec.workflow, phases=names)
        handoffs = await read_handoffs(self.runs.store, run, task)
        documents = await read_tasks(self.runs.store, run)
        landed_at = await self._landed_at(record.run, {task: record.tasks[task]}, documents)
        details = build_task_details(
            run,
            report,
            shown,
            definition,
            {name: one for name, (_, one) in handoffs.items()},
            target=record.run.target,
            landed_at=landed_at.get(task),
            logs=str(logs),
            now=now,
            is_merge=record.run.merges is not None,
            damage=self.runs.damage,
        )
        return await anyio.to_thread.run_sync(_without_missing_logs, details)

    async def overview(self, run: str) -> RunOverview:
        """Return the overview of a run, even if its repositories are missing."""
        record = await self.runs.record(run)
        documents = await read_tasks(self.runs.store, run)
        is_live = record.run.ended is None and await self.runs.has_live_process(run)
        checkouts = await anyio.to_thread.run_sync(_worktrees, record.run, record.tasks)
        landed_at = await self._landed_at(record.run, record.tasks, documents)
        active = compute_run_active_time(record.orchestrators, record.tasks.values(), landed_at, self.runs.clock.now())
        report = self.runs.describe(record, is_live=is_live)
        return build_overview(record, report, landed_at, checkouts, await self._events(run), active)

    async def _landed_at(
        self, run: RunDocument, tasks: Mapping[str, TaskDocument], documents: Mapping[str, Document]
    ) -> dict[str, float]:
        """Return when tasks landed, by task, even if the run's record was removed and restored since."""
        found = landing_times(tasks, documents)
        for task, time in found.items():
            if run.imported is None and run.ended is not None and time > run.ended:
                versions = await self.runs.store.history(documents[task].key)
                same = [one.time for one in versions if (one.value or {}).get("landed") == tasks[task].landed]
                found[task] = min(same, default=time)
        return found

    async def _events(self, run: str) -> list[RecordedEvent]:
        found: deque[RecordedEvent] = deque()
        with suppress(HistoryCompacted):
            async with aclosing(read_backwards(self.runs.store, await self.position())) as parts:
                async for part in parts:
                    for one in _events_of(part, run):
                        found.appendleft(one)
                        if len(found) == MAX_EVENTS or one.event.type == "run.created":
                            return list(found)
        return list(found)

    async def _newest(self) -> str | None:
        with suppress(RefusedError):
            return await self.runs.newest()
        return None


def _events_of(part: Sequence[CommitRecord], run: str) -> Iterator[RecordedEvent]:
    """Yield the events of a run, the newest first."""
    for record in reversed(part):
        for event in reversed(record.events):
            if event.data.get("run") == run:
                yield RecordedEvent(record.position, record.time, event)


def _worktrees(run: RunDocument, tasks: Mapping[str, TaskDocument]) -> dict[str, str]:
    """Return the worktrees of the newest attempts, by task. Blocks."""
    hub = Hub(Path(run.hub))
    newest = {task: Worktree(hub, run.id, task, one.attempt.number) for task, one in tasks.items() if one.attempts}
    return {task: str(slot.tree) for task, worktree in newest.items() if (slot := worktree.slot) is not None}


def _named(name: str, documents: Mapping[Key, Document], run: str | None, where: str) -> Sequence[Key]:
    kind, _, rest = name.partition("/")
    exact, short = Key(kind, rest), Key(kind, f"{run}/{rest}")
    for key in (exact, short):
        if key in documents:
            return [key]
        if "*" in name and (found := [one for one in documents if fnmatchcase(str(one), str(key))]):
            return sorted(found)
    raise _unknown(name, documents, run, where)


def _unknown(name: str, keys: Collection[Key], run: str | None, where: str) -> RefusedError:
    """Return the error for a name that matches no document."""
    short = {str(key).replace(f"/{run}/", "/", 1): str(key) for key in keys} if run else {}
    names = [*short, *(full for full in map(str, keys) if full not in short)]
    folded = name.casefold()  # the name in other case, or without its kind, is a match
    near = [one for one in names if folded in {one.casefold(), one.casefold().partition("/")[2]}]
    near = near or difflib.get_close_matches(name, names, n=3)
    remedy = f"did you mean {' or '.join(near)}?" if near else "`council state at now` lists the documents"
    if "/" not in name and not near:
        remedy = f"write kind/id, such as task/models: {remedy}"
    return RefusedError(f"there is no document {name!r} {where}", remedy)


@contextmanager
def _refuse_compacted() -> Iterator[None]:
    """Turn HistoryCompacted into a RefusedError with the oldest position."""
    try:
        yield
    except HistoryCompacted as gone:
        raise _compacted_refusal(gone) from None


def _compacted_refusal(gone: HistoryCompacted) -> RefusedError:
    what = f"the state log does not go back to position {gone.position}, only to {gone.first}"
    return RefusedError(what, f"name a position from {gone.first} on, or a later time")


def _without_missing_logs(details: TaskDetails) -> TaskDetails:
    """Return details that name only logs that exist: a session that ended in setup has none. Blocks."""
    sessions = [
        one if one.log is None or Path(one.log).exists() else one.model_copy(update={"log": None})
        for one in details.sessions
    ]
    return replace(details, sessions=sessions)


def _mark_interrupted(tasks: Mapping[str, TaskDocument], logs: Path, now: float) -> dict[str, TaskDocument]:
    """Return the tasks of an inactive run, with sessions without an end marked as interrupted. Blocks."""

    def end(task: str, one: Attempt) -> Attempt:
        if one.ended is not None:
            return one
        ended = last_activity(logs, task, one.number, one.started, now)
        return one.model_copy(update={"ended": ended, "outcome": INTERRUPTED})

    return {
        name: task.model_copy(update={"attempts": tuple(end(name, one) for one in task.attempts)})
        for name, task in tasks.items()
    }
