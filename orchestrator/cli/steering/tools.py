"""The tools of the steering server: each is a model of its arguments that performs a call.

They use the Python API. Those with a `uri` are read-only, and are also available as resources.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Annotated, ClassVar, Final

import anyio
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.api import execution
from orchestrator.api.council import Council
from orchestrator.api.loading import load_confirmed
from orchestrator.api.topics.logs import AttemptMarker
from orchestrator.cli.core.error_boundary import ErrorLog
from orchestrator.cli.render.events import event_text, is_shown
from orchestrator.cli.render.text import printable
from orchestrator.domain.runs.statuses import LANDING_STATUSES, TaskStatus
from orchestrator.engine.reports.report import RunReport, RunStatus
from orchestrator.errors import RefusedError
from orchestrator.protocols import JsonObject

RUNS_URI: Final = "council://runs"
#: The most events that a call of `watch`, and lines that one of `logs` returns.
_MOST_EVENTS, _MOST_LINES = 100, 400
#: The most characters of a diff.
_MOST_CHARS: Final = 100_000
#: Seconds in which `watch` collects events that follow the first one.
_COLLECTING: Final = 0.5

_Run = Annotated[str | None, Field(description="The run: an id, the beginning of one, or null for the newest.")]
_Task = Annotated[str, Field(description="The id of a task.")]
_Tasks = Annotated[list[str], Field(min_length=1, description="The ids of tasks.")]
_Note = Annotated[str | None, Field(description="A note for the next sessions of the task.")]
_File = Annotated[str, Field(description="The YAML file of a run, in the server's folder or absolute.")]


class SteeringTool(BaseModel):
    """Base of the tools; the docstring of a tool is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: ClassVar[str]
    uri: ClassVar[str | None] = None
    """The template of its resources, with the names of arguments in braces."""
    only_reads: ClassVar[bool] = False
    is_destructive: ClassVar[bool] = False

    async def perform(self, client: str, log: ErrorLog) -> JsonObject:
        """Record a call of a client, perform it, and return its result. Raises CouncilError."""
        async with self._open() as council:
            log.path = council.project.log_file
            known = self.model_dump(include={"run"})
            run = await council.runs.find(known["run"]) if known else None
            await council.state.record_call(client, self.name, self.model_dump(exclude_unset=True), run=run)
            return await self._perform(council)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Council]:
        """Open the council for the body: by default that of the current folder."""
        async with Council.open() as council:
            yield council

    async def _perform(self, council: Council) -> JsonObject:
        raise NotImplementedError


class _FileTool(SteeringTool):
    file: _File = "council.yaml"

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Council]:
        plugins, config = await load_confirmed(Path(self.file), os.environ)
        async with Council.open(config, plugins=plugins) as council:
            yield council


class _TaskTool(SteeringTool):
    run: _Run = None
    task: _Task


class _TasksTool(SteeringTool):
    run: _Run = None
    tasks: _Tasks


class _ReviewTool(_TasksTool):
    note: _Note = None


class Plan(_FileTool):
    """Check a YAML file and return the plan of its run: waves of tasks, adapters and problems. Starts nothing."""

    name = "plan"
    only_reads = True

    async def _perform(self, council: Council) -> JsonObject:
        if council.config is None:
            raise RefusedError("no file was opened", "give a `file`")
        return (await execution.perform_dry_run(council.config, council.plugins)).to_json()


class Start(_FileTool):
    """Start a run of a YAML file in the background. Returns its id, and a cursor for `watch`.

    Sessions of AI agents cost money: `plan` shows how many there are.
    """

    name = "start"
    allow_deferred: Annotated[
        bool, Field(description="Start even if the target's checkout has uncommitted changes.")
    ] = False

    async def _perform(self, council: Council) -> JsonObject:
        cursor = await council.history.position()
        return await _start(council, await council.runs.create(allow_deferred=self.allow_deferred), cursor)


class Resume(SteeringTool):
    """Resume an interrupted run in the background, or one with tasks that were retried, approved or queued."""

    name = "resume"
    run: _Run = None

    async def _perform(self, council: Council) -> JsonObject:
        cursor = await council.history.position()
        return await _start(council, await council.runs.find(self.run), cursor)


class Merge(SteeringTool):
    """Merge the branch of an ended run into its base, with all checks, in a run of its own in the background.

    Only a run without a `target` has such a branch; other runs land on their target themselves.
    """

    name = "merge"
    is_destructive = True
    run: _Run = None

    async def _perform(self, council: Council) -> JsonObject:
        report = await council.runs.status(self.run)
        if await council.runs.is_live(report.run):
            raise RefusedError(f"run {report.run} is running", "merge it when `watch` reports its end")
        if any(task.status in LANDING_STATUSES for task in report.tasks):
            raise RefusedError(f"tasks of run {report.run} are queued to land", "`resume` it first, which lands them")
        if report.target != f"council/{report.run}":
            raise RefusedError(f"run {report.run} lands on {report.target} itself", "merge that branch with git")
        cursor = await council.history.position()
        return await _start(council, await council.runs.create_merge(report.run), cursor)


class Watch(SteeringTool):
    """Wait for events of a run. Returns them with a cursor: pass it to the next call, until `is_live` is false.

    Returns at the first events, or without any after `wait` seconds.
    """

    name = "watch"
    only_reads = True
    run: _Run = None
    cursor: Annotated[int, Field(ge=0, description="The cursor of the previous call; 0: the run's beginning.")] = 0
    wait: Annotated[float, Field(ge=0, le=50, description="Seconds to wait for an event.")] = 20

    async def _perform(self, council: Council) -> JsonObject:
        run = await council.runs.find(self.run)
        events: deque[JsonObject] = deque()
        cursor, end = self.cursor, await council.history.position()
        is_live = await council.runs.is_live(run)
        if cursor > end:
            raise RefusedError(f"the cursor {cursor} is after the newest event ({end})", "pass an earlier one")
        wait = max(self.wait, _COLLECTING) if cursor < end else self.wait if is_live else 0
        with anyio.move_on_after(wait) as waiting:
            async with aclosing(council.history.follow(cursor)) as commits:
                async for commit in commits:
                    cursor = commit.position
                    shown = [one for one in commit.events if one.data.get("run") == run and is_shown(one)]
                    events += [{"time": commit.time, "type": one.type, "text": event_text(one)} for one in shown]
                    if len(events) >= _MOST_EVENTS or (cursor >= end and not is_live):
                        break
                    if events:
                        waiting.deadline = min(waiting.deadline, anyio.current_time() + _COLLECTING)
        report = await council.runs.status(run)
        # The end of a run may be recorded after the events that were read.
        has_more = cursor < (await council.history.position() if is_live else end)
        return {
            "run": run,
            "status": report.status,
            "is_live": report.status is RunStatus.RUNNING or has_more,
            "events": list(events),
            "cursor": cursor,
            "awaiting_approval": [one.id for one in report.tasks if one.status == TaskStatus.AWAITING_APPROVAL],
        }


class Runs(SteeringTool):
    """List the runs of this project, oldest first, each with its status."""

    name = "runs"
    only_reads = True
    uri = RUNS_URI

    async def _perform(self, council: Council) -> JsonObject:
        reports = await council.runs.list()
        return {"runs": [{"run": one.run, "status": one.status, "tasks": len(one.tasks)} for one in reports]}


class Status(SteeringTool):
    """Return the state of a run with all of its tasks, as `council status --json` does."""

    name = "status"
    only_reads = True
    uri = f"{RUNS_URI}/{{run}}"
    run: _Run = None

    async def _perform(self, council: Council) -> JsonObject:
        return (await council.runs.status(self.run)).to_json()


class Show(_TaskTool):
    """Return a task in full: prompt, phases, sessions, handoffs, cost, landing."""

    name = "show"
    only_reads = True
    uri = f"{RUNS_URI}/{{run}}/tasks/{{task}}"

    async def _perform(self, council: Council) -> JsonObject:
        return (await council.tasks.details(self.task, self.run)).to_json()


class Logs(_TaskTool):
    """Return the end of the log of a task's newest session: messages, tool calls, errors, checks."""

    name = "logs"
    only_reads = True
    uri = f"{RUNS_URI}/{{run}}/tasks/{{task}}/log"

    async def _perform(self, council: Council) -> JsonObject:
        lines: deque[str] = deque(maxlen=_MOST_LINES)
        count = 0
        async with aclosing(council.logs.entries(self.task, self.run)) as entries:
            async for one in entries:
                line = f"session {one.attempt.number}: {one.event}" if isinstance(one, AttemptMarker) else one.line
                lines.append(printable(line, keep="\n\t"))
                count += 1
        return {"text": "\n".join(lines), "omitted": count - len(lines)}


class Diff(_TaskTool):
    """Return the changes of a task as a git diff, including those of a running session."""

    name = "diff"
    only_reads = True
    uri = f"{RUNS_URI}/{{run}}/tasks/{{task}}/diff"

    async def _perform(self, council: Council) -> JsonObject:
        text = (await council.changes.diff(self.task, self.run)).decode(errors="replace")
        return {"text": text[:_MOST_CHARS], "omitted": max(len(text) - _MOST_CHARS, 0)}


class Tell(_TaskTool):
    """Send a message to the agents of a task; its running session receives it, or else the next one."""

    name = "tell"
    text: Annotated[str, Field(min_length=1, description="The message.")]

    async def _perform(self, council: Council) -> JsonObject:
        sent = await council.tasks.tell(self.task, self.text, run=self.run)
        return {"message": sent.id, "receiver": sent.receiver, "delivery": sent.delivery}


class Approve(_ReviewTool):
    """Approve the waiting result of each task's phase, so that the task continues. Read it with `show` first."""

    name = "approve"
    is_destructive = True

    async def _perform(self, council: Council) -> JsonObject:
        return _statuses(await council.tasks.approve(*self.tasks, note=self.note, run=self.run))


class Reject(_ReviewTool):
    """Reject the waiting result of each task's phase; the phase is repeated with the note."""

    name = "reject"

    async def _perform(self, council: Council) -> JsonObject:
        return _statuses(await council.tasks.reject(*self.tasks, note=self.note, run=self.run))


class Retry(_TasksTool):
    """Retry tasks that ended without landing; if the run is not live, `resume` it afterwards."""

    name = "retry"

    async def _perform(self, council: Council) -> JsonObject:
        return _statuses(await council.tasks.retry(*self.tasks, run=self.run))


class Cancel(_TasksTool):
    """Cancel tasks: their sessions are stopped, and their work is preserved on branches."""

    name = "cancel"
    is_destructive = True

    async def _perform(self, council: Council) -> JsonObject:
        return _statuses(await council.tasks.cancel(*self.tasks, run=self.run))


def _statuses(report: RunReport) -> JsonObject:
    return {"run": report.run, "status": report.status, "tasks": {one.id: one.status for one in report.tasks}}


async def _start(council: Council, run: str, cursor: int) -> JsonObject:
    await council.runs.start(run)
    return {"run": run, "cursor": cursor}


TOOLS: Final[Mapping[str, type[SteeringTool]]] = {
    one.name: one
    for one in (
        *(Plan, Start, Resume, Watch, Runs, Status, Show, Logs, Diff),
        *(Tell, Approve, Reject, Retry, Cancel, Merge),
    )
}
