"""The record and report of a run, read without importing the execution code."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.api.context import ProjectContext
from orchestrator.api.run_index import RunIndex, start_key
from orchestrator.domain.runs.model import RunDocument, TaskDocument
from orchestrator.domain.runs.statuses import FINAL_STATUSES, LANDING_STATUSES, TaskStatus
from orchestrator.domain.scheduling.dispatch import with_subtasks
from orchestrator.engine.reports.report import RunRecord, RunReport, RunStatus, SessionReport, build_report
from orchestrator.engine.state.records import (
    read_adapters,
    read_entries,
    read_run,
    read_tasks,
    read_whole,
    task_documents,
)
from orchestrator.errors import GitError, RefusedError, UnreadableDocument
from orchestrator.locking.orchestrators import read_orchestrators
from orchestrator.protocols import Document
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.run_repository import has_unmerged_commits
from orchestrator.repo.worktrees.hub import find_hub

#: Bytes at the end of a background log that are searched for an error, and the prefix of its line.
_TAIL, _OF_COUNCIL = 8192, "council: "


@dataclass(frozen=True, slots=True)
class RunReader:
    """The records and reports of a project's runs."""

    context: ProjectContext

    @property
    def index(self) -> RunIndex:
        """The index of runs."""
        return RunIndex(self.context)

    async def record(self, run: str, *, whole: bool = True) -> RunRecord:
        """Return the record of a run.

        Unless `whole`, only tasks that wait or never started have their specs.
        """
        return await read_whole(self.context.store, run, partial(self._read_record, run, whole=whole))

    async def _read_record(self, run: str, *, whole: bool) -> RunRecord:
        document = await read_run(self.context.store, run)
        found = await read_tasks(self.context.store, run)
        is_imported = document.imported is not None
        tasks = task_documents(found, document.tasks)
        begun = {task for task, one in tasks.items() if one.status is not TaskStatus.PENDING and one.attempts}
        blank = document.tasks if is_imported else () if whole else begun
        entries = with_subtasks(await read_entries(self.context.store, document, blank), tasks)
        damaged = [task for task, one in found.items() if one.damaged]
        adapters, others = (
            await read_adapters(self.context.store, document),
            await read_orchestrators(self.context.store, run),
        )
        return RunRecord(document, tasks, entries, adapters, damaged, list(others.values()))

    async def without_dropped(self, record: RunRecord, *also: str) -> RunRecord:
        """Return a record without the branches and worktrees of finished tasks that have been dropped.

        Landed tasks keep the recorded branches of their attempts, unless they are in `also`.
        """
        keeping = {
            task: one
            for task, one in record.tasks.items()
            if task in also or (one.status in FINAL_STATUSES and (one.branch is not None or _has_kept_worktree(one)))
        }
        hub = find_hub(record.run, self.context.environ)
        trusted = hub.trusted
        if not keeping or record.run.imported is not None or not await anyio.Path(trusted, "HEAD").is_file():
            return record
        from orchestrator.repo.landing import salvage  # noqa: PLC0415  slow, and most runs have no such task
        from orchestrator.repo.worktrees.worktrees import list_worktrees  # noqa: PLC0415

        kept = await salvage.list_unmerged_work(Git(trusted, environ=self.context.environ), record.run.id)
        branches = {one.ref.removeprefix("refs/heads/") for one in kept}
        folders = await anyio.to_thread.run_sync(list_worktrees, hub, record.run.id, keeping)
        worktrees = {(found.task, found.attempt) for found in folders}
        for task, one in keeping.items():
            attempts = tuple(
                made.model_copy(
                    update={
                        "branch": made.branch if made.branch in branches else None,
                        "is_kept": made.is_kept and (task, made.number) in worktrees,
                    }
                )
                for made in one.attempts
            )
            branch = one.branch if one.branch in branches else None
            keeping[task] = one.model_copy(update={"branch": branch, "attempts": attempts})
        return replace(record, tasks={**record.tasks, **keeping})

    def describe(self, record: RunRecord, *, is_live: bool, has_ended: bool | None = None) -> RunReport:
        """Return the report of a run; `is_live` if a process is active in it.

        `has_ended` is by default as recorded.
        """
        has_ended = record.run.ended is not None if has_ended is None else has_ended
        return build_report(
            record,
            logs=self.context.project.logs(record.run.id),
            repository=find_hub(record.run, self.context.environ).trusted,
            has_ended=has_ended,
            is_live=is_live,
            now=self.context.clock.now(),
            damage=self.context.damage,
        )

    async def status(self, run: str, *, allow_missing: bool = False) -> RunReport:
        """Return the current report of a run.

        With `allow_missing`, its repositories may be missing.
        """
        record = await self.without_dropped(await self.record(run, whole=False))
        is_live = False
        if record.run.ended is None:
            try:
                is_live = await self.index.is_live(record.run)
            except RefusedError:
                if not allow_missing:
                    raise
            # A process may have ended the run since.
            if not is_live and await read_run(self.context.store, run) != record.run:
                record = await self.without_dropped(await self.record(run, whole=False))
        described = self.describe(record, is_live=is_live)
        if described.status is RunStatus.INTERRUPTED:
            return replace(described, background=await anyio.to_thread.run_sync(self._background_error, run))
        if described.status is RunStatus.RUNNING:
            return replace(described, sessions=await self._sessions(run))
        return await self.with_merge_state(described, record.run)

    async def with_merge_state(self, report: RunReport, run: RunDocument) -> RunReport:
        """Return a report with the merge state of the run's own branch, if any.

        The state of the repository counts if it is on this machine, because users also merge and delete such branches.
        """
        if not report.awaits_merge:
            return report
        merged_by = await self._merged_by(run)
        awaits_merge = merged_by is None and (run.is_url or await self._is_unmerged(run))
        return replace(report, merged_by=merged_by, awaits_merge=awaits_merge)

    async def _is_unmerged(self, run: RunDocument) -> bool:
        """Return True if the run's branch is not merged into its base, or unknown."""
        git = Git(None, as_user=True, environ=self.context.environ)
        try:
            return await has_unmerged_commits(Path(run.repo), run.target, run.base, git)
        except (GitError, OSError):
            return True

    async def _merged_by(self, run: RunDocument) -> str | None:
        """Return the run that merged the branch of a finished run."""
        since = run.ended or 0.0
        found = [one for one in await self._merges(run.id, {TaskStatus.LANDED}) if one.value["started"] >= since]
        return found[0].key.id if found else None

    async def queued_merge(self, run: str) -> str | None:
        """Return the newest run of `council merge` for a run that is still queued to land."""
        found = await self._merges(run, LANDING_STATUSES)
        return found[-1].key.id if found else None

    async def _merges(self, run: str, statuses: Collection[str]) -> list[Document]:
        """Return the merge runs of a run, oldest first, whose task has such a status."""
        found = []
        for one in sorted(await self.context.store.list("run"), key=start_key):
            if not one.damaged and one.value.get("merges") == run:
                tasks = (await read_tasks(self.context.store, one.key.id)).values()
                if tasks and all(task.value.get("status") in statuses for task in tasks):
                    found.append(one)
        return found

    def _background_error(self, run: str) -> str | None:
        """Return the error that ended the run's last background process. Blocks."""
        try:
            with self.context.project.background_log(run).open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - _TAIL, 0))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return None
        errors = [line.removeprefix(_OF_COUNCIL) for line in lines if line.startswith(_OF_COUNCIL)]
        return errors[-1] if errors else None

    async def all(self) -> list[RunReport]:
        """Return the reports of all runs, oldest first; `damage` lists unreadable ones."""
        found = []
        self.context.unreadable.clear()
        for run in await self.index.ids():
            try:
                found.append(await self.status(run, allow_missing=True))
            except UnreadableDocument as error:
                self.context.unreadable.append(str(error))
            except RefusedError as error:  # such as a run with a missing task
                self.context.unreadable.append(f"run {run}: {error}")
        return found

    async def _sessions(self, run: str) -> list[SessionReport]:
        """Return the activity of a run's sessions, sorted by name."""
        from orchestrator.engine.session_api.contexts import read_active_contexts  # noqa: PLC0415  slow; running runs only

        return [
            SessionReport(
                task=one.task,
                attempt=one.attempt,
                adapter=one.adapter,
                orchestrator=one.orchestrator,
                status=one.status.value,
                file=one.file,
                progress=one.progress,
                message=one.words,
                blocked_on=one.blocked_on,
                files=one.files,
                updated=one.updated,
                conflicts=one.conflicts,
            )
            for one in await read_active_contexts(self.context.store, run)
        ]


def _has_kept_worktree(task: TaskDocument) -> bool:
    """Return True if the worktree of a task's newest attempt is preserved."""
    return bool(task.attempts) and task.attempt.is_kept
