"""The topic `logs`: the output of a task's sessions."""

from __future__ import annotations

import codecs
import shlex
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import anyio
import anyio.to_thread

from orchestrator.api.context import ProjectContext
from orchestrator.api.topic import Topic
from orchestrator.config.model import make_adapters, restore_adapters
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.model import Attempt, RunDocument, TaskDocument
from orchestrator.domain.runs.statuses import FINAL_STATUSES, TaskStatus
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.domain.workflow.routing import DEFAULT_PHASES
from orchestrator.engine.state.records import check_task, read_run, read_task
from orchestrator.errors import RefusedError
from orchestrator.protocols import Adapter, Store
from orchestrator.repo.worktrees.hub import find_hub
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.entries import OutputEntry, OutputEntryBuilder, OutputEntryKind
from orchestrator.sessions.output.log_files import list_attempt_streams, log_path, read_tail
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, Transcript

#: Seconds between two reads of a followed file.
_FOLLOW_PAUSE = 0.2
_CHUNK = 1 << 16


class LogSelection(TypedDict, total=False):
    """The selected output of a task: by default that of its newest attempt so far."""

    attempt: int | None
    """The number of an attempt."""
    phase: str | None
    """The newest attempt of this phase."""
    follow: bool
    """Continue with new output, attempt by attempt, until the task has ended or the run is not active."""


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
    """An entry of an attempt's log; standard error and checks consist of lines."""

    attempt: int = 0
    stream: str = "stdout"


@dataclass(frozen=True, slots=True)
class AttemptMarker:
    """The start (`began`) or end of an attempt's log, with the attempt's state.

    The state is `ended`, `running` or `interrupted`: without a recorded end or an active process.
    """

    event: Literal["began", "ended", "running", "interrupted"]
    attempt: Attempt
    used: Transcript = EMPTY_TRANSCRIPT
    """The transcript so far, with the reported usage."""


class TaskLogs(Topic):
    """The output of tasks, available as `council.logs`.

    `run` is a name that `council.runs.find` accepts.
    """

    async def chunks(
        self, task: str, run: str | None = None, **selection: Unpack[LogSelection]
    ) -> AsyncGenerator[LogChunk]:
        """Yield the output of an attempt, with its checks.

        Raises RefusedError if the attempt is unknown.
        """
        async with aclosing(self._poll(await self._find(run), task, **selection)) as reads:
            async for _, found in reads:
                for part in chain.from_iterable(found.values()):
                    yield part

    async def entries(
        self, task: str, run: str | None = None, **selection: Unpack[LogSelection]
    ) -> AsyncGenerator[LogEntry | AttemptMarker]:
        """Yield the output of `chunks` as parsed by the adapters.

        Each attempt has a start marker, entries and an end marker. The task of a merge run has no session: only the
        output of its checks is yielded.
        """
        name = await self._find(run)
        is_merge = (await read_run(self._context.store, name)).merges is not None
        async with aclosing(self._all_entries(name, task, **selection)) as entries:
            async for entry in entries:
                if not (is_merge and isinstance(entry, AttemptMarker)):
                    yield entry

    async def _all_entries(
        self, run: str, task: str, **selection: Unpack[LogSelection]
    ) -> AsyncGenerator[LogEntry | AttemptMarker]:
        logs: dict[int, _SessionLog] = {}
        run_document, document = await read_named_task(self._context.store, run, task)
        adapters = await find_run_adapters(self._context, run_document)
        async with aclosing(self._poll(run, task, **selection)) as reads:
            async for document, found in reads:
                for number, parts in found.items():
                    if number not in logs:
                        for entry in chain.from_iterable(one.end(document) for one in logs.values()):
                            yield entry
                        made = document.attempts[number - 1]
                        logs[number] = await self._session_log(run_document, task, adapters, made)
                        yield AttemptMarker("began", made)
                    for entry in chain.from_iterable(logs[number].read(part, document) for part in parts):
                        yield entry
                    if selection.get("follow") and not parts:
                        for entry in logs[number].pause(document):
                            yield entry
        is_interrupted = document.status is TaskStatus.RUNNING and not await self._index.is_live(run)
        for entry in chain.from_iterable(one.end(document, is_interrupted=is_interrupted) for one in logs.values()):
            yield entry

    async def latest(self, task: str, run: str | None = None) -> tuple[str, float] | None:
        """Return the last line of a task's running session, and its time.

        None if no session is running, it has no output yet, or its output is on another machine.
        """
        name = await self._find(run)
        run_document, document = await read_named_task(self._context.store, name, task)
        if document.status is not TaskStatus.RUNNING:
            return None
        made = document.attempt
        file = log_path(self._context.project.logs(name), task, made.number, "stdout")
        try:
            text, time = await read_tail(file), (await anyio.Path(file).stat()).st_mtime
        except FileNotFoundError:
            return None
        adapters = await find_run_adapters(self._context, run_document)
        log = await self._session_log(run_document, task, adapters, made)
        entries = [*log.read(LogChunk(made.number, "stdout", text), document), *log.end(document)]
        lines = [one.line for one in entries if isinstance(one, LogEntry) and one.line.strip()]
        return (lines[-1].strip().rpartition("\n")[2], time) if lines else None

    async def _poll(
        self, run: str, task: str, *, attempt: int | None = None, phase: str | None = None, follow: bool = False
    ) -> AsyncGenerator[tuple[TaskDocument, dict[int, list[LogChunk]]]]:
        """Yield the new output of each attempt, with the task's record before the read."""
        store, index = self._context.store, self._index
        run_document, document = await read_named_task(store, run, task)
        if phase is not None:
            attempt = find_phase_attempt(run_document, task, document, phase).number
        number = find_attempt(run_document, task, document, attempt).number if document.attempts or not follow else 1
        tails = _LogTails(self._context.project.logs(run), task)
        while True:
            # Read the record first, so that the output up to that time is complete.
            document = await read_task(store, run, task)
            continues = follow and document.status not in FINAL_STATUSES and await index.is_live(run)
            numbers = range(number, len(document.attempts) + 1) if attempt is None else [number]
            yield document, {one: await anyio.to_thread.run_sync(tails.read, one) for one in numbers}
            if not continues:
                break
            await anyio.sleep(_FOLLOW_PAUSE)
        if not document.attempts:  # the followed task ended or stopped without a session
            raise no_attempt_error(await read_run(store, run), task, document)

    async def _session_log(
        self, run: RunDocument, task: str, adapters: Mapping[str, Adapter], made: Attempt
    ) -> _SessionLog:
        worktree = Worktree(find_hub(run, self._context.environ), run.id, task, made.number)
        folder = made.folder or str(await anyio.to_thread.run_sync(lambda: worktree.tree))
        redactor = Redactor(secret_values(self._context.environ))
        return _SessionLog(adapters[made.adapter], made, f"{folder}/", redactor)


async def find_run_adapters(context: ProjectContext, run: RunDocument) -> Mapping[str, Adapter]:
    """Return the adapters of a run by name."""
    loaded = await context.plugins.load()
    return make_adapters(restore_adapters(run.adapters, loaded.adapters, loaded.explain), loaded.adapters)


async def read_named_task(store: Store, run: str, task: str) -> tuple[RunDocument, TaskDocument]:
    """Return the records of a run and of its task.

    Raises RefusedError if there is no such task, or if the run was imported.
    """
    document = await read_run(store, run)
    document.check_not_imported()
    await check_task(store, document, task)
    return document, await read_task(store, run, task)


def find_attempt(run: RunDocument, task: str, document: TaskDocument, number: int | None) -> Attempt:
    """Return an attempt by its number, by default the newest.

    Raises RefusedError if there is none.
    """
    if not document.attempts:
        raise no_attempt_error(run, task, document)
    if number is not None and not 0 < number <= len(document.attempts):
        raise RefusedError(f"task {task!r} has no session {number}", f"use a number from 1 to {len(document.attempts)}")
    return document.attempts[(number or 0) - 1]


def find_phase_attempt(run: RunDocument, task: str, document: TaskDocument, phase: str) -> Attempt:
    """Return the newest attempt of a phase. Raises RefusedError if there is none."""
    if not document.attempts:
        raise no_attempt_error(run, task, document)
    found = [one for one in document.attempts if (one.phase or DEFAULT_PHASES[0].name) == phase]
    if not found:
        known = ", ".join(dict.fromkeys(one.phase or DEFAULT_PHASES[0].name for one in document.attempts))
        raise RefusedError(f"task {task!r} has no session in phase {phase!r}", f"use one of: {known}")
    return found[-1]


def no_attempt_error(run: RunDocument, task: str, document: TaskDocument) -> RefusedError:
    """Return the error for a task without sessions: reason and next command."""
    if document.status in FINAL_STATUSES:
        reason = f" ({document.reason})" if document.reason else ""
        message = f"task {task!r} never started: it was {document.status.replace('_', ' ')}{reason}"
        return RefusedError(message, f"`council retry {shlex.quote(task)} --run {run.id}` queues it")
    message, status = f"task {task!r} has not started yet", f"`council status --run {run.id}`"
    if run.halted is None:
        return RefusedError(message, f"{status} shows what it waits for")
    halt = HaltReason.parse(run.halted)
    log = "" if halt.log is None else f"see {halt.log}, and "
    return RefusedError(f"{message}: the run is halted: {halt.headline}", f"{log}{status}")


def no_running_session_error(run: str, task: str) -> RefusedError:
    """Return the error for a task without a running session."""
    remedy = f"`council diff {task} --run {run}` shows its last changes"
    return RefusedError(f"task {task!r} has no running session", remedy)


class _SessionLog:
    """An incremental reader of one attempt's output.

    Paths in the attempt's worktree become relative.
    """

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

        `is_interrupted`: an attempt without a recorded end is no longer running.
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
            outcome = None if one.outcome is None else self._shown(one.outcome)
            text, diff, output = map(self._shown, (one.text, one.diff, one.output))
            yield LogEntry(one.kind, text, one.tool, outcome, diff, output, self._attempt.number)

    def _shown(self, text: str) -> str:
        """Return decoded text without secrets and without the path of the worktree."""
        return self._redactor.text(text).replace(self._folder, "")


@dataclass(slots=True)
class _LogTails:
    """An incremental reader of the log files of a task's attempts."""

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
