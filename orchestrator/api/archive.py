"""Logs, changes and preserved work of a project's tasks, with commands to apply or drop that work."""

from __future__ import annotations

import codecs
import shlex
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import anyio
import anyio.to_thread

from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.model import FINAL_STATUSES, Attempt, RunDocument, TaskDocument, TaskStatus
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.domain.workflow.routing import DEFAULT_PHASES
from orchestrator.engine.session_api.details import (
    SessionDetails,
    find_session_files,
    find_workspace,
    read_session_details,
)
from orchestrator.engine.state.records import check_task, read_run, read_task
from orchestrator.errors import RefusedError
from orchestrator.project import Project
from orchestrator.protocols import Adapter, Store
from orchestrator.repo.git.change_counts import Changes, count
from orchestrator.repo.git.command import Git
from orchestrator.repo.git.reading import CommitSummary, read_commits
from orchestrator.repo.intake import diffs
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.landing import salvage
from orchestrator.repo.landing.salvage import UnmergedWork
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.preserved import is_preserved
from orchestrator.repo.worktrees.slots import empty_trash
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.entries import OutputEntry, OutputEntryBuilder, OutputEntryKind
from orchestrator.sessions.output.log_files import list_attempt_streams, log_path, read_tail
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, Transcript

#: Seconds between two reads of a followed file.
_FOLLOW_PAUSE = 0.2
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class LogChunk:
    """A part of an attempt's output.

    `stream` is `stdout`, `stderr`, or `before`, `after` or `check` with the number of the user's command.
    """

    attempt: int
    stream: str
    text: str


@dataclass(frozen=True, slots=True)
class LogEntry(OutputEntry):
    """An entry of an attempt's log; other streams than standard output consist of lines."""

    attempt: int = 0
    stream: str = "stdout"


@dataclass(frozen=True, slots=True)
class AttemptMarker:
    """Where an attempt's log begins (`began`) and ends: its attempt has `ended`, is `running`, or was `interrupted`.

    It was interrupted if it has no recorded end and no process is active on its run.
    """

    event: Literal["began", "ended", "running", "interrupted"]
    attempt: Attempt
    used: Transcript = EMPTY_TRANSCRIPT
    """The transcript so far, with the reported usage."""


@dataclass(frozen=True, slots=True)
class PreservedWork:
    """Unmerged work: a ref of council's repository, or a worktree that could not be collected completely."""

    name: str
    run: str
    task: str
    status: str
    subject: str
    commit: str | None
    committed: int | None
    """Seconds since the epoch."""
    worktree: str | None
    """The folder of a worktree, once it has no git configuration of an agent; a worktree has no commit."""


class Archive:
    """The archive of a project's tasks; `is_live` returns True if a process is active in a run."""

    def __init__(
        self,
        project: Project,
        store: Store,
        environ: Mapping[str, str],
        is_live: Callable[[str], Awaitable[bool]],
    ) -> None:
        self._project, self._store, self._environ, self._is_live = project, store, environ, is_live

    async def log(
        self, run: str, task: str, *, attempt: int | None = None, phase: str | None = None, follow: bool = False
    ) -> AsyncGenerator[LogChunk]:
        """Yield the output of an attempt of a task (by default the newest, or the newest of a phase), with its checks.

        With `follow`, continue with new output, attempt by attempt, until the task has ended or the run is not active.
        RefusedError if there is no such attempt.
        """
        async with aclosing(self._poll(run, task, attempt, phase, follow=follow)) as looks:
            async for _, found in looks:
                for part in chain.from_iterable(found.values()):
                    yield part

    async def entries(
        self,
        run: str,
        task: str,
        adapters: Mapping[str, Adapter],
        *,
        attempt: int | None = None,
        phase: str | None = None,
        follow: bool = False,
    ) -> AsyncGenerator[LogEntry | AttemptMarker]:
        """Yield the output of `log` as parsed by the adapters.

        Each attempt has a begin marker, entries and an end marker.

        The task of a merge run has no session: only the output of its checks follows.
        """
        is_merge = (await read_run(self._store, run)).merges is not None
        async with aclosing(self._all_entries(run, task, adapters, attempt, phase, follow=follow)) as entries:
            async for entry in entries:
                if not (is_merge and isinstance(entry, AttemptMarker)):
                    yield entry

    async def _all_entries(
        self,
        run: str,
        task: str,
        adapters: Mapping[str, Adapter],
        attempt: int | None,
        phase: str | None,
        *,
        follow: bool,
    ) -> AsyncGenerator[LogEntry | AttemptMarker]:
        logs: dict[int, _SessionLog] = {}
        document = await self._task(run, task)
        async with aclosing(self._poll(run, task, attempt, phase, follow=follow)) as looks:
            async for document, found in looks:
                for number, parts in found.items():
                    if number not in logs:
                        for entry in chain.from_iterable(one.end(document) for one in logs.values()):
                            yield entry
                        logs[number] = await self._session_log(run, task, adapters, document.attempts[number - 1])
                        yield AttemptMarker("began", document.attempts[number - 1])
                    for entry in chain.from_iterable(logs[number].read(part, document) for part in parts):
                        yield entry
                    if follow and not parts:
                        for entry in logs[number].pause(document):
                            yield entry
        is_interrupted = document.status is TaskStatus.RUNNING and not await self._is_live(run)
        for entry in chain.from_iterable(one.end(document, is_interrupted=is_interrupted) for one in logs.values()):
            yield entry

    async def latest(self, run: str, task: str, adapters: Mapping[str, Adapter]) -> tuple[str, float] | None:
        """Return the last line of a task's running session, and the time of its last output.

        None if no session is running, it has no output yet, or its output is on another machine.
        """
        document = await self._task(run, task)
        if document.status is not TaskStatus.RUNNING:
            return None
        made = document.attempt
        file = log_path(self._project.logs(run), task, made.number, "stdout")
        log = await self._session_log(run, task, adapters, made)
        try:
            text, time = await read_tail(file), (await anyio.Path(file).stat()).st_mtime
        except FileNotFoundError:
            return None
        entries = [*log.read(LogChunk(made.number, "stdout", text), document), *log.end(document)]
        lines = [one.line for one in entries if isinstance(one, LogEntry) and one.line.strip()]
        return (lines[-1].strip().rpartition("\n")[2], time) if lines else None

    async def _poll(
        self, run: str, task: str, attempt: int | None, phase: str | None, *, follow: bool
    ) -> AsyncGenerator[tuple[TaskDocument, dict[int, list[LogChunk]]]]:
        """Yield the new output of each attempt since the last read, with the task's record from before that."""
        document = await self._task(run, task)
        attempt = (await self._attempt_at(run, task, document, phase)).number if phase is not None else attempt
        number = (await self._attempt(run, task, document, attempt)).number if document.attempts or not follow else 1
        tails = _LogTails(self._project.logs(run), task)
        while True:
            # Read the record first: output from before that time is then complete.
            document = await read_task(self._store, run, task)
            continues = follow and document.status not in FINAL_STATUSES and await self._is_live(run)
            numbers = range(number, len(document.attempts) + 1) if attempt is None else [number]
            yield document, {one: await anyio.to_thread.run_sync(tails.read, one) for one in numbers}
            if not continues:
                break
            await anyio.sleep(_FOLLOW_PAUSE)
        if not document.attempts:  # the followed task ended or stopped without a session
            raise await self._no_attempt_error(run, task)

    async def diff(self, run: str, task: str, *, stat: bool = False) -> bytes:
        """Return what a task has changed, as git shows it: from the worktree of a running or interrupted session."""
        document, git = await self._task(run, task), await self._git(run)
        if document.status is TaskStatus.RUNNING and await self._has_worktree(run, task, document.attempt):
            return await self._live_diff(run, task, document.attempt, stat=stat)
        return await diffs.diff_commits(git, *await self._diff_range(git, run, task, document), stat=stat)

    async def changes(self, run: str, task: str) -> Changes:
        """Return the size of a task's changes; of a running session so far. RefusedError if there are none."""
        document, git = await self._task(run, task), await self._git(run)
        if document.status is TaskStatus.RUNNING:
            worktree, admit = await self._session(run, task, document.attempt)
            return await diffs.count_session_changes(git, worktree, document.attempt.base, admit=admit)
        return await count(git, *await self._diff_range(git, run, task, document))

    async def details(self, run: str, task: str, adapters: Mapping[str, Adapter]) -> SessionDetails:
        """Return what the running session of a task has done so far; RefusedError if none is running."""
        document = await self._task(run, task)
        if document.status is not TaskStatus.RUNNING or not await self._is_live(run):
            raise RefusedError(f"task {task!r} has no running session", f"`council diff {task}` shows its last changes")
        session, redactor = SessionName(run, task, document.attempt.number), self._redactor()
        at = await find_workspace(self._store, adapters, self._project.logs_folder, redactor, session)
        return await read_session_details(await self._git(run), at, redactor)

    async def kept(self, run: str) -> list[PreservedWork]:
        """Return all preserved work of a run that is not on the target."""
        git = await self._git(run)
        listed = await salvage.list_unmerged_work(git, run)
        commits = await read_commits(git, [one.commit for one in listed])
        found = [await self._describe(one, commits[one.commit]) for one in listed]
        if await self._is_live(run):
            return found
        return [*found, *[await self._worktree(one) for one in await self._leftover_worktrees(run)]]

    async def show(self, run: str, name: str, *, stat: bool = False) -> bytes:
        """Return the changes of preserved work as a git diff."""
        git = await self._git(run)
        if (worktree := await self._kept_worktree(run, name)) is not None:
            document = await self._task(run, worktree.task)
            attempt = await self._attempt(worktree.run, worktree.task, document, worktree.attempt)
            return await self._live_diff(run, worktree.task, attempt, stat=stat)
        found = salvage.find_unmerged_work(await salvage.list_unmerged_work(git, run), name)
        return await diffs.diff_commits(git, await self._base(git, found), found.commit, stat=stat)

    async def apply(self, run: str, name: str, branch: str | None = None) -> Sequence[str]:
        """Apply preserved work to the user's checkout as uncommitted changes, or as a new branch.

        Applies all of it or nothing. Returns the changed paths, or the branch.
        """
        git, document = await self._git(run), await read_run(self._store, run)
        if await self._kept_worktree(run, name) is not None:
            raise RefusedError(f"{name!r} is a worktree without a commit", "copy files from it manually")
        found = salvage.find_unmerged_work(await salvage.list_unmerged_work(git, run), name)
        site = await find_run_repository(document.repo, is_url=document.is_url, environ=self._environ)
        if branch is not None:
            await salvage.create_branch(site.source(git), found.commit, branch)
            return (branch,)
        if site.repository is None or site.repository.top is None:
            raise RefusedError(f"{document.repo} has no checkout", "create a branch instead (--branch)")
        users = Git(None, as_user=True, environ=self._environ)
        base = await self._base(git, found)
        return await salvage.apply_to_checkout(git, users, site.repository.top, base, found.commit)

    async def drop(self, run: str, names: Sequence[str]) -> None:
        """Delete preserved work; RefusedError, with nothing deleted, if the run still needs any of it."""
        git = await self._git(run)
        refs, folders = [], []
        listed = await salvage.list_unmerged_work(git, run)
        for name in names:
            worktree = await self._kept_worktree(run, name)
            found = None if worktree else salvage.find_unmerged_work(listed, name)
            task = worktree.task if worktree else found.task if found else ""
            document = await read_task(self._store, run, task)
            if document.status not in FINAL_STATUSES:
                raise RefusedError(f"{name!r} belongs to an unfinished task", "cancel the task first, or wait for it")
            folders += [worktree] if worktree else []
            refs += [found] if found else []
        await salvage.delete_refs(git, refs)
        for worktree in folders:
            await worktrees.remove_worktree(worktree)
            await empty_trash(worktree.hub, git.environ)

    async def _diff_range(self, git: Git, run: str, task: str, document: TaskDocument) -> tuple[str, str]:
        """Return the base and the commit of a task's newest preserved work."""
        kept = [one for one in document.attempts if one.branch is not None]
        if not document.attempts:
            raise await self._no_attempt_error(run, task)
        if not kept or (document.commit is None and not await git.has_branch(str(kept[-1].branch))):
            raise RefusedError(f"task {task!r} has no preserved changes", f"see `council logs {task}`")
        return kept[-1].base, document.commit or f"refs/heads/{kept[-1].branch}"

    async def _live_diff(self, run: str, task: str, attempt: Attempt, *, stat: bool) -> bytes:
        worktree, admit = await self._session(run, task, attempt)
        git = await self._git(run)
        return await diffs.diff_session(git, worktree, attempt.base, admit=admit, stat=stat)

    async def _session(self, run: str, task: str, attempt: Attempt) -> tuple[Worktree, IntakeRules]:
        """Return the worktree of an attempt, and the rules for showing its files."""
        return await find_session_files(self._store, SessionName(run, task, attempt.number), self._redactor())

    def _redactor(self) -> Redactor:
        return Redactor(secret_values(self._environ))

    async def _describe(self, one: UnmergedWork, made: CommitSummary) -> PreservedWork:
        status = (await read_task(self._store, one.run, one.task)).status
        return PreservedWork(one.name, one.run, one.task, status, made.subject, one.commit, made.committed, None)

    async def _worktree(self, one: Worktree) -> PreservedWork:
        document = await read_task(self._store, one.run, one.task)
        # Before that the user's own git would run programs that the agent has configured in there.
        is_safe = await anyio.to_thread.run_sync(is_preserved, one)
        subject = "a worktree that could not be collected completely"
        if not is_safe:
            subject = f"a worktree of an interrupted session: `council resume {one.run}` saves it"
        folder = str(one.tree) if is_safe else None
        return PreservedWork(_name(one), one.run, one.task, document.status, subject, None, None, folder)

    async def _kept_worktree(self, run: str, name: str) -> Worktree | None:
        return next((one for one in await self._leftover_worktrees(run) if _name(one) == name), None)

    async def _has_worktree(self, run: str, task: str, attempt: Attempt) -> bool:
        """Whether the session of an attempt runs, or was interrupted and left its worktree."""
        if await self._is_live(run):
            return True
        left = await self._leftover_worktrees(run)
        return any((one.task, one.attempt) == (task, attempt.number) for one in left)

    async def _leftover_worktrees(self, run: str) -> list[Worktree]:
        document = await read_run(self._store, run)
        hub = Hub(Path(document.hub))
        left = await anyio.to_thread.run_sync(worktrees.list_worktrees, hub, run, document.tasks)
        return [one for one in left if not one.is_check]

    async def _base(self, git: Git, found: UnmergedWork) -> str:
        document = await read_task(self._store, found.run, found.task)
        number = found.part.partition("/")[0]
        if not number.isdecimal():  # a merge of both sides of a conflict: its first parent is the target
            return await git.line("rev-parse", f"{found.commit}^1")
        return document.attempts[int(number) - 1].base

    async def _git(self, run: str) -> Git:
        document: RunDocument = await read_run(self._store, run)
        document.check_not_imported()
        return Git(Hub(Path(document.hub)).trusted, environ=self._environ)

    async def _task(self, run: str, task: str) -> TaskDocument:
        document = await read_run(self._store, run)
        document.check_not_imported()
        await check_task(self._store, document, task)
        return await read_task(self._store, run, task)

    async def _session_log(self, run: str, task: str, adapters: Mapping[str, Adapter], made: Attempt) -> _SessionLog:
        worktree = Worktree(Hub(Path((await read_run(self._store, run)).hub)), run, task, made.number)
        folder = made.folder or str(await anyio.to_thread.run_sync(lambda: worktree.tree))
        return _SessionLog(adapters[made.adapter], made, f"{folder}/", self._redactor())

    async def _attempt_at(self, run: str, task: str, document: TaskDocument, phase: str) -> Attempt:
        """Return the newest attempt of a phase."""
        if not document.attempts:
            raise await self._no_attempt_error(run, task)
        found = [one for one in document.attempts if (one.phase or DEFAULT_PHASES[0].name) == phase]
        if not found:
            known = ", ".join(dict.fromkeys(one.phase or DEFAULT_PHASES[0].name for one in document.attempts))
            what = f"task {task!r} has no session in phase {phase!r}"
            raise RefusedError(what, f"name one of: {known}")
        return found[-1]

    async def _attempt(self, run: str, task: str, document: TaskDocument, number: int | None) -> Attempt:
        if not document.attempts:
            raise await self._no_attempt_error(run, task)
        if number is not None and not 0 < number <= len(document.attempts):
            raise RefusedError(f"task {task!r} has no session {number}", f"name one from 1 to {len(document.attempts)}")
        return document.attempts[(number or 0) - 1]

    async def _no_attempt_error(self, run: str, task: str) -> RefusedError:
        """Return the error for a task without sessions: why it has none, and the next command."""
        document, halted = await read_task(self._store, run, task), (await read_run(self._store, run)).halted
        if document.status in FINAL_STATUSES:
            reason = f" ({document.reason})" if document.reason else ""
            what = f"task {task!r} never started: it was {document.status.replace('_', ' ')}{reason}"
            return RefusedError(what, f"`council retry {shlex.quote(task)} --run {run}` starts it")
        what, status = f"task {task!r} has not started yet", f"`council status --run {run}`"
        if halted is None:
            return RefusedError(what, f"{status} shows what it waits for")
        halt = HaltReason.parse(halted)
        log = "" if halt.log is None else f"see {halt.log}, and "
        return RefusedError(f"{what}: the run is halted: {halt.headline}", f"{log}{status}")


class _SessionLog:
    """Reads the output of one attempt in parts; paths in its worktree become relative."""

    def __init__(self, adapter: Adapter, attempt: Attempt, folder: str, redactor: Redactor) -> None:
        self._adapter, self._attempt, self._folder, self._redactor = adapter, attempt, folder, redactor
        self._entries, self._rest = OutputEntryBuilder(), dict[str, str]()
        self._has_ended = False

    def read(self, part: LogChunk, document: TaskDocument) -> Iterator[LogEntry | AttemptMarker]:
        """Yield the entries of all complete lines up to the end of a part of the output."""
        if part.stream.startswith(("after", "check")):
            yield from self._ended(document)
        *lines, self._rest[part.stream] = (self._rest.get(part.stream, "") + part.text).split("\n")
        yield from self._read(part.stream, lines)

    def pause(self, document: TaskDocument) -> Iterator[LogEntry | AttemptMarker]:
        """Yield buffered entries: there is no new output for now."""
        yield from self._made(self._entries.flush())
        if document.attempts[self._attempt.number - 1].ended is not None:
            yield from self._ended(document)

    def end(self, document: TaskDocument, *, is_interrupted: bool = False) -> Iterator[LogEntry | AttemptMarker]:
        """Yield buffered entries: there is no more output.

        `is_interrupted`: an attempt without a recorded end does not run any more.
        """
        for stream, rest in self._rest.items():
            yield from self._read(stream, [rest] if rest else [])
        self._rest.clear()
        yield from self._ended(document, is_interrupted=is_interrupted)

    def _ended(self, document: TaskDocument, *, is_interrupted: bool = False) -> Iterator[LogEntry | AttemptMarker]:
        if not self._has_ended:
            self._has_ended = True
            yield from self._made(self._entries.end())
            attempt = document.attempts[self._attempt.number - 1]
            event: Literal["ended", "running", "interrupted"] = "ended"
            if attempt.ended is None:
                event = "interrupted" if is_interrupted else "running"
            yield AttemptMarker(event, attempt, self._entries.transcript)

    def _read(self, stream: str, lines: Sequence[str]) -> Iterator[LogEntry]:
        for line in lines:
            if stream == "stdout":
                yield from self._made(self._entries.read(self._adapter, line.rstrip("\r")))
            else:
                yield LogEntry(OutputEntryKind.LINE, line, attempt=self._attempt.number, stream=stream)

    def _made(self, entries: Sequence[OutputEntry]) -> Iterator[LogEntry]:
        for one in entries:
            text, outcome = self._shown(one.text), None if one.outcome is None else self._shown(one.outcome)
            yield LogEntry(one.kind, text, one.tool, outcome, self._attempt.number)

    def _shown(self, text: str) -> str:
        """Return text that was decoded from JSON without secrets and without the worktree's path."""
        return self._redactor.text(text).replace(self._folder, "")


def _name(worktree: Worktree) -> str:
    return f"{worktree.task}/{worktree.attempt}/worktree"


@dataclass(slots=True)
class _LogTails:
    """Reads the log files of a task's attempts incrementally."""

    logs: Path
    task: str
    _read: dict[Path, tuple[int, codecs.IncrementalDecoder]] = field(default_factory=dict)

    def read(self, attempt: int) -> list[LogChunk]:
        """Return the output since the last read."""
        parts = []
        for stream in self._streams(attempt):
            path = log_path(self.logs, self.task, attempt, stream)
            at, decoder = self._read.get(path, (0, codecs.getincrementaldecoder("utf-8")("replace")))
            with path.open("rb") as file:
                if path.stat().st_size < at:  # the checks of a repeated merge
                    at = 0
                file.seek(at)
                while data := file.read(_CHUNK):
                    at += len(data)
                    if text := decoder.decode(data):
                        parts.append(LogChunk(attempt, stream, text))
            self._read[path] = at, decoder
        return parts

    def _streams(self, attempt: int) -> list[str]:
        prefix = f"{self.task}.{attempt}."
        return list_attempt_streams(path.name.removeprefix(prefix) for path in self.logs.glob(f"{prefix}*"))
