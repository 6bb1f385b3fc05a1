"""Read the runs of a project and report their status, without importing the code that executes runs."""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio.to_thread
from pydantic import ValidationError

from orchestrator.domain.runs.model import FINAL_STATUSES, LANDING_STATUSES, RunDocument, TaskStatus
from orchestrator.domain.scheduling.dispatch import with_subtasks
from orchestrator.engine.reports.report import ReportPaths, RunRecord, RunReport, RunStatus, SessionReport, build_report
from orchestrator.engine.state.records import (
    read_adapters,
    read_entries,
    read_run,
    read_task,
    read_tasks,
    read_whole,
    task_documents,
)
from orchestrator.errors import GitError, RefusedError, UnreadableDocument
from orchestrator.locking.orchestrators import read_orchestrators
from orchestrator.project import Project
from orchestrator.protocols import Document, Store
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.system.clock import Clock

if TYPE_CHECKING:
    from orchestrator.config.model import Retention
    from orchestrator.repo.git.change_counts import Changes

#: Bytes at the end of a background log that are searched for an error, and the prefix of its line.
_TAIL, _OF_COUNCIL = 8192, "council: "
#: The name of the newest run.
LATEST: Final = "latest"
#: The number of runs listed for an ambiguous name.
_MOST_NAMED: Final = 5


@dataclass(frozen=True, slots=True)
class ProjectRuns:
    """The runs of a project; `environ` replaces the process's environment."""

    project: Project
    store: Store
    url: str
    """The URL of the store."""
    clock: Clock
    environ: Mapping[str, str]
    follows_file: bool = False
    """Whether the store is that of the run's file, or the project's own; False if the user has chosen another."""
    unreadable: list[str] = field(default_factory=list)
    """Errors of the runs that the last call of `all` had to skip."""

    async def ids(self) -> list[str]:
        """Return the ids of all readable runs, the oldest first."""
        found = await self.store.list("run")
        return [one.key.id for one in sorted(found, key=_start_key) if not one.damaged]

    async def newest(self) -> str:
        """Return the id of the newest run, ignoring runs that merge another run's branch."""
        runs = await self.store.list("run")
        if not runs and self.damage:
            what = f"no run can be read, the state log is damaged: {'; '.join(self.damage)}"
            raise RefusedError(what, "start a new run; landed commits stay on their targets")
        if not runs:
            raise RefusedError("there is no run in this project", "start one with `council run FILE`")
        if len(runs) == 1:  # reading a run of thousands of tasks takes long
            return runs[0].key.id
        return max([one for one in runs if one.value.get("merges") is None] or runs, key=_start_key).key.id

    async def find(self, name: str | None) -> str:
        """Return the id of the run with a name: an id, a unique prefix of one, or `latest`; None is the newest run.

        RefusedError, with the closest ids, if no run or several match.
        """
        if name is None:
            return await self.newest()
        known = [one.key.id for one in sorted(await self.store.list("run"), key=_start_key)]
        if name in known:
            return name
        if name == LATEST:
            return await self.newest()
        matching = [run for run in known if name and run.startswith(name)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            what = f"{len(matching)} runs begin with {name!r}"
            raise RefusedError(what, f"name one of: {', '.join(matching[: -_MOST_NAMED - 1 : -1])}")
        near = difflib.get_close_matches(name, known, n=1)
        raise RefusedError(
            f"there is no run {name!r}", f"did you mean {near[0]!r}?" if near else "`council runs` lists them"
        )

    async def retention(self) -> Retention:
        """Return the log retention of the newest run."""
        # Late: commands that only show a run don't need it.
        from orchestrator.config.model import Retention  # noqa: PLC0415

        for run in reversed(await self.ids()):
            with suppress(RefusedError, ValidationError):  # skip unreadable runs
                return Retention.model_validate((await read_run(self.store, run)).retention)
        return Retention()

    async def record(self, run: str, *, whole: bool = True) -> RunRecord:
        """Return the record of a run; unless `whole`, with the specs of tasks that wait or never started only."""
        return await read_whole(self.store, run, partial(self._read_record, run, whole=whole))

    async def _read_record(self, run: str, *, whole: bool) -> RunRecord:
        document = await read_run(self.store, run)
        found = await read_tasks(self.store, run)
        is_imported = document.imported is not None
        tasks = task_documents(found, document.tasks)
        begun = {task for task, one in tasks.items() if one.status is not TaskStatus.PENDING and one.attempts}
        blank = document.tasks if is_imported else () if whole else begun
        entries = with_subtasks(await read_entries(self.store, document, blank), tasks)
        damaged = [task for task, one in found.items() if one.damaged]
        adapters, others = await read_adapters(self.store, document), await read_orchestrators(self.store, run)
        return RunRecord(document, tasks, entries, adapters, damaged, list(others.values()))

    async def without_dropped(self, record: RunRecord, *also: str) -> RunRecord:
        """Return a record without the branches of finished tasks that were dropped since.

        Landed tasks keep the branches of their attempts on record, unless they are in `also`.
        """
        keeping = {
            task: one
            for task, one in record.tasks.items()
            if task in also or (one.status in FINAL_STATUSES and one.branch is not None)
        }
        trusted = Hub(Path(record.run.hub)).trusted
        if not keeping or record.run.imported is not None or not await anyio.Path(trusted, "HEAD").is_file():
            return record
        # Late: most runs have no such task.
        from orchestrator.repo.git.command import Git  # noqa: PLC0415
        from orchestrator.repo.landing import salvage  # noqa: PLC0415

        kept = await salvage.list_unmerged_work(Git(trusted, environ=self.environ), record.run.id)
        branches = {one.ref.removeprefix("refs/heads/") for one in kept}
        for task, one in keeping.items():
            attempts = tuple(
                made if made.branch in branches else made.model_copy(update={"branch": None}) for made in one.attempts
            )
            branch = one.branch if one.branch in branches else None
            keeping[task] = one.model_copy(update={"branch": branch, "attempts": attempts})
        return replace(record, tasks={**record.tasks, **keeping})

    def describe(self, record: RunRecord, *, is_live: bool, has_ended: bool | None = None) -> RunReport:
        """Return the report of a run; `is_live`: a process is active on it; `has_ended` by default as recorded."""
        paths = ReportPaths(self.project.logs(record.run.id), Hub(Path(record.run.hub)).trusted)
        has_ended = record.run.ended is not None if has_ended is None else has_ended
        return build_report(
            record, paths=paths, has_ended=has_ended, is_live=is_live, now=self.clock.now(), damage=self.damage
        )

    async def status(self, run: str, *, allow_missing: bool = False) -> RunReport:
        """Return the current report of a run; with `allow_missing` even if its repositories are missing."""
        record = await self.without_dropped(await self.record(run, whole=False))
        is_live = False
        if record.run.ended is None:
            try:
                is_live = await self._is_live(record.run)
            except RefusedError:
                if not allow_missing:
                    raise
        described = self.describe(record, is_live=is_live)
        if described.status is RunStatus.INTERRUPTED:
            return replace(described, background=await anyio.to_thread.run_sync(self._background_error, run))
        if described.status is RunStatus.RUNNING:
            return replace(described, sessions=await self._sessions(run))
        return await self.with_merge_state(described, record.run)

    async def with_merge_state(self, report: RunReport, run: RunDocument) -> RunReport:
        """Return the report of a run that has ended with what became of its own branch, if it landed on one.

        The repository decides, if it is on this machine: users merge and delete such branches, too.
        """
        if not report.awaits_merge:
            return report
        merged_by = await self._merged_by(run)
        awaits_merge = merged_by is None and (run.is_url or await self._is_unmerged(run))
        return replace(report, merged_by=merged_by, awaits_merge=awaits_merge)

    async def _is_unmerged(self, run: RunDocument) -> bool:
        """Whether the own branch of a run is not merged into its base, also where that can't be read."""
        # Late: most runs land on a branch of the user's.
        from orchestrator.repo.git.command import Git  # noqa: PLC0415
        from orchestrator.repo.source.branches import has_unmerged_commits  # noqa: PLC0415

        git = Git(None, as_user=True, environ=self.environ)
        try:
            return await has_unmerged_commits(Path(run.repo), run.target, run.base, git)
        except (GitError, OSError):
            return True

    async def landed(self, run: str, commits: Mapping[str, str]) -> dict[str, Changes]:
        """Return the size of each task's changes; `commits` maps tasks to the commits by which they landed.

        A landing may also bring commits of the user from the base onto the target: they do not count.
        """
        # Late: only output for people has these numbers.
        from orchestrator.repo.git.change_counts import count_many  # noqa: PLC0415
        from orchestrator.repo.git.command import Git  # noqa: PLC0415

        document = await read_run(self.store, run)
        document.check_not_imported()
        works = {task: await self._landed_work(run, task, commit) for task, commit in commits.items()}
        counted = await count_many(Git(Hub(Path(document.hub)).trusted, environ=self.environ), dict(works.values()))
        return {task: counted[commit] for task, (commit, _) in works.items()}

    async def _landed_work(self, run: str, task: str, landed: str) -> tuple[str, str | None]:
        """Return the commit that a task built and its base, or the commit by which it landed and None."""
        with suppress(RefusedError):
            document = await read_task(self.store, run, task)
            if document.landed == landed and document.commit is not None:
                return document.commit, document.building_attempt.base
        return landed, None

    async def _merged_by(self, run: RunDocument) -> str | None:
        """Return the run that merged the branch of a run after its end."""
        since = run.ended or 0.0
        found = [one for one in await self._merges(run.id, {TaskStatus.LANDED}) if one.value["started"] >= since]
        return found[0].key.id if found else None

    async def queued_merge(self, run: str) -> str | None:
        """Return the newest run of `council merge` for a run that is still queued to land."""
        found = await self._merges(run, LANDING_STATUSES)
        return found[-1].key.id if found else None

    async def _merges(self, run: str, statuses: Collection[str]) -> list[Document]:
        """Return the runs that merge a run's branch and whose task has one of the statuses, the oldest first."""
        found = []
        for one in sorted(await self.store.list("run"), key=_start_key):
            if not one.damaged and one.value.get("merges") == run:
                tasks = (await read_tasks(self.store, one.key.id)).values()
                if tasks and all(task.value.get("status") in statuses for task in tasks):
                    found.append(one)
        return found

    def _background_error(self, run: str) -> str | None:
        """Return the error that ended the run's last background process. Blocks."""
        try:
            with self.project.background_log(run).open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - _TAIL, 0))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return None
        errors = [line.removeprefix(_OF_COUNCIL) for line in lines if line.startswith(_OF_COUNCIL)]
        return errors[-1] if errors else None

    async def all(self) -> list[RunReport]:
        """Return the reports of all runs, the oldest first; `damage` lists the unreadable ones."""
        found = []
        self.unreadable.clear()
        for run in await self.ids():
            try:
                found.append(await self.status(run, allow_missing=True))
            except UnreadableDocument as error:
                self.unreadable.append(str(error))
            except RefusedError as error:  # such as a run with a missing task
                self.unreadable.append(f"run {run}: {error}")
        return found

    async def _sessions(self, run: str) -> list[SessionReport]:
        """Return the activity of a run's sessions, sorted by name."""
        from orchestrator.domain.sessions.contexts import filter_active  # noqa: PLC0415  only of a run at work
        from orchestrator.engine.session_api.contexts import read_contexts  # noqa: PLC0415  the same

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
            )
            for one in filter_active(await read_contexts(self.store, run))
        ]

    async def hub(self, run: RunDocument) -> Hub:
        """Return the repositories of a run; RefusedError if they are missing, or the run was imported."""
        run.check_not_imported()
        hub = Hub(Path(run.hub))
        # An attempt that was still active may have created its own folder again, but nothing else.
        if not await anyio.to_thread.run_sync(hub.trusted.is_dir):
            raise RefusedError(f"the repositories of run {run.id} are gone from {hub.root}", "start a new run")
        return hub

    async def is_live(self, run: str) -> bool:
        """Return True if a process is active in a run."""
        document = await read_run(self.store, run)
        return document.imported is None and await self._is_live(document)

    async def _is_live(self, run: RunDocument) -> bool:
        hub = await self.hub(run)
        if await hub.run_lock(run.id).is_held() or await hub.liveness_locks.held(run.id):
            return True
        others = (await read_orchestrators(self.store, run.id)).values()
        here, now = socket.gethostname(), self.clock.now()
        return any(one.ended is None and one.owner.host != here and now < one.expires for one in others)

    async def interrupted(self) -> list[str]:
        """Return the ids of unfinished runs without an active process, the oldest first.

        Runs whose repositories are missing can't be resumed, and are skipped.
        """
        found = []
        for run in sorted(await self.store.list("run"), key=_start_key):
            if run.damaged or run.value.get("ended") is not None or run.value.get("imported") is not None:
                continue
            with suppress(RefusedError, UnreadableDocument):
                if not await self.is_live(run.key.id):
                    found.append(run.key.id)
        return found

    async def has_live_process(self, run: str) -> bool:
        """Return True if a process is visibly active in a run; False if its repositories are missing."""
        with suppress(RefusedError):
            return await self.is_live(run)
        return False

    @property
    def damage(self) -> tuple[str, ...]:
        """Descriptions of the damage found since the state was opened, and errors of unreadable runs."""
        return (*(one.describe() for one in self.store.damage), *self.unreadable)


def _start_key(run: Document) -> tuple[float, str]:
    """Return the sort key of a run, which may have no readable start time."""
    started = run.value.get("started")
    return float(started) if isinstance(started, int | float) else 0.0, run.key.id
