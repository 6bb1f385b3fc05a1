"""The topic `tasks`: cancel, retry, approve and describe single tasks."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import anyio.to_thread

from orchestrator.api.execution.control import RunController
from orchestrator.api.execution.file_comparison import apply_config_file, compare_with_config_file
from orchestrator.api.topic import Topic
from orchestrator.api.topics.logs import TaskLogs, find_run_adapters
from orchestrator.api.topics.reports import find_landing_times, mark_interrupted
from orchestrator.domain.events.runs import FIXED_KEYS
from orchestrator.domain.events.tasks import TaskMessageSent, TaskMessageWithdrawn
from orchestrator.domain.runs.model import RequestAction, RunDocument, TaskDocument
from orchestrator.domain.runs.statuses import RETRYABLE_STATUSES, TaskStatus
from orchestrator.domain.sessions.messages import MESSAGE_STATUSES, Receiver, UserMessage
from orchestrator.engine.reports.report import RunReport
from orchestrator.engine.reports.task_details import LatestActivity, TaskDefinition, TaskDetails, build_task_details
from orchestrator.engine.scheduler.requests import check_message, check_note, check_reason
from orchestrator.engine.state.records import (
    check_task,
    message_key,
    message_write,
    read_handoffs,
    read_messages,
    read_run,
    read_spec,
    read_task,
    read_tasks,
)
from orchestrator.engine.state.reload import FileChanges
from orchestrator.errors import RefusedError, VersionConflict
from orchestrator.protocols import Capability, Commit, Event, Write
from orchestrator.system.failpoints import failpoint


@dataclass(frozen=True, slots=True)
class SentMessage:
    """A message that was sent to the agents of a task."""

    id: str
    receiver: Receiver
    delivery: str
    """When and how the agents receive it, as a sentence without a full stop."""


def _check_follows(run: str, task: str, status: TaskStatus) -> None:
    """Raise RefusedError if no session of a task follows."""
    if status in MESSAGE_STATUSES:
        return
    message = f"task {task!r} is {status.record.label}, and no session of it follows"
    if status in RETRYABLE_STATUSES:
        raise RefusedError(message, f"`council retry {shlex.quote(task)} --run {run}`, then send it again")
    raise RefusedError(message, "add a task for it to the file, and start a new run")


class Tasks(Topic):
    """The tasks of a run. Available as `council.tasks`.

    If a process is active in the run, it performs the requests. Requests return the report of the run. `run` is a name
    that `council.runs.find` accepts.
    """

    async def cancel(self, *tasks: str, run: str | None = None) -> RunReport:
        """Cancel tasks, by default all unfinished ones.

        Their sessions are stopped, and their work is preserved on branches. Ended tasks do not change.
        """
        return await self._request(run, RequestAction.CANCEL, tasks)

    async def ignore(self, *tasks: str, reason: str, run: str | None = None) -> RunReport:
        """Cancel tasks like `cancel`, and exclude them until `retry`."""
        check_reason(reason)
        return await self._request(run, RequestAction.IGNORE, tasks, reason)

    async def hold(self, *tasks: str, reason: str | None = None, run: str | None = None) -> RunReport:
        """Hold tasks: their work is built, but does not land until `release`.

        A task that is `landing` in the report is not held: the target may already be updated.
        """
        if reason is not None:
            check_reason(reason)
        return await self._request_named(run, RequestAction.HOLD, tasks, reason)

    async def release(self, *tasks: str, run: str | None = None) -> RunReport:
        """Let held tasks land, also those that wait for a predicted conflict.

        Raises RefusedError if a task is not held.
        """
        return await self._request_named(run, RequestAction.RELEASE, tasks)

    async def bump(self, *tasks: str, run: str | None = None) -> RunReport:
        """Move tasks to the front of the merge queue, now or once they are built, in the given order."""
        return await self._request_named(run, RequestAction.BUMP, tuple(reversed(tasks)))

    async def file_changes(self, run: str | None = None) -> FileChanges:
        """Return the changes in a run's file, for tasks that have not succeeded.

        A run uses the settings recorded at its creation; `retry` with `reload` applies those of the file to tasks.
        """
        record = await self._reader.record(await self._find(run), whole=False)
        statuses = {task: one.status for task, one in record.tasks.items()}
        return await compare_with_config_file(self._context, record.run, statuses)

    async def retry(
        self,
        *tasks: str,
        run: str | None = None,
        from_phase: str | None = None,
        reload: FileChanges | None = None,
    ) -> RunReport:
        """Retry tasks that ended without landing.

        Tasks with a workflow continue at their last phase, or at `from_phase`; results of earlier phases are kept. The
        active process of the run starts them immediately; otherwise the next `resume` does.

        With `reload`, from `file_changes`, the prompts, limits and adapters of the file are applied to the tasks first.
        Raises RefusedError, with the reason for each key that can't change.
        """
        return await self._request(run, RequestAction.RETRY, tasks, phase=from_phase, reload=reload)

    async def reload(self, changes: FileChanges, *, run: str | None = None) -> Sequence[str]:
        """Apply the settings of a run's file to all tasks that have not succeeded, and return these tasks.

        `changes` are from `file_changes`. Tasks whose `needs`, `owns` or `workflow` differ keep their settings. Raises
        RefusedError, with the reason for each other key that can't change.
        """
        name = await self._find(run)
        await self._context.check_writable()
        tasks = [task for task, keys in changes.tasks.items() if FIXED_KEYS.keys().isdisjoint(keys)]
        await apply_config_file(self._context, name, tasks, changes)
        return tasks

    async def approve(self, *tasks: str, note: str | None = None, run: str | None = None) -> RunReport:
        """Approve the phase result of each task, so that the task continues.

        The active process of the run continues the tasks immediately; otherwise the next `resume` does. Raises
        RefusedError if a task is not waiting for approval.
        """
        return await self._answer(RequestAction.APPROVE, tasks, note, run)

    async def reject(self, *tasks: str, note: str | None = None, run: str | None = None) -> RunReport:
        """Repeat the phases whose result waits for approval; otherwise like `approve`.

        The note is passed to the sessions of the repeated phases.
        """
        return await self._answer(RequestAction.REJECT, tasks, note, run)

    async def tell(self, task: str, text: str, *, run: str | None = None) -> SentMessage:
        """Send a message to the agents of a task.

        A running agent receives it after its next tool call or when it is about to end its turn, if its CLI supports
        that. Otherwise another session receives it, before the work lands; it continues the conversation if the CLI
        can. Raises RefusedError for an invalid text, and if no session of the task follows.
        """
        name, context = await self._find(run), self._context
        await context.check_writable()
        document = await read_run(context.store, name)
        document.check_not_imported()
        await check_task(context.store, document, task)
        check_message(text, await read_messages(context.store, name, task))
        _check_follows(name, task, (await read_task(context.store, name, task)).status)
        now = context.clock.now()
        message = UserMessage(id=f"{int(now * 1000):x}-{secrets.token_hex(3)}", text=text, time=now)
        sent = TaskMessageSent(run=name, task=task, message=message.id, text=text)
        await context.store.commit(Commit([message_write(name, task, message)], [Event.of(sent)]))
        failpoint("message.sent")
        after = await read_task(context.store, name, task)
        if after.status not in MESSAGE_STATUSES:
            failpoint("message.withdrawing")
            withdrawn = TaskMessageWithdrawn(run=name, task=task, message=message.id)
            with suppress(VersionConflict):  # the task continues because of it
                key = message_key(name, task, message.id)
                await context.store.commit(Commit([Write(key, 1, None)], [Event.of(withdrawn)]))
                _check_follows(name, task, after.status)
        return SentMessage(message.id, *await self._describe_delivery(document, after))

    async def _describe_delivery(self, run: RunDocument, task: TaskDocument) -> tuple[Receiver, str]:
        """Return the receiver of a new message to a task, and when and how it receives the message."""
        if task.status is TaskStatus.AWAITING_APPROVAL:
            text = "its next session receives the message, after you approve or reject the result"
            return Receiver.NEXT_SESSION, text
        if task.status is not TaskStatus.RUNNING:
            text = "its next session receives the message at its start; the task does not land before that"
            return Receiver.NEXT_SESSION, text
        if not await self._index.is_live(run):  # the session was killed with its process
            text = f"its next session receives the message at its start: `council resume {run.id}` starts it"
            return Receiver.NEXT_SESSION, text
        name = task.attempt.adapter
        able = (await find_run_adapters(self._context, run))[name].capabilities()
        if run.coordination.tools and Capability.POST_TOOL in able:
            otherwise = "at the end of its turn" if Capability.STOP_GATE in able else "another session receives it"
            text = f"its running session receives the message after its agent's next tool call, or else {otherwise}"
            return Receiver.SESSION, text
        if run.coordination.tools and Capability.STOP_GATE in able:
            return Receiver.SESSION, "its running session receives the message when it is about to end its turn"
        how = "in the same conversation" if Capability.RESUME in able else "with the whole prompt"
        text = f"{name} takes no messages while it runs: another session follows, {how}, before the task lands"
        return Receiver.NEXT_SESSION, text

    async def _answer(
        self, action: RequestAction, tasks: tuple[str, ...], note: str | None, run: str | None
    ) -> RunReport:
        check_note(note)
        return await self._request_named(run, action, tasks, note)

    async def _request_named(
        self, run: str | None, action: RequestAction, tasks: tuple[str, ...], reason: str | None = None
    ) -> RunReport:
        if not tasks:  # the engine would select all unfinished tasks
            raise RefusedError("no task is named", "`council status` lists the tasks")
        return await self._request(run, action, tasks, reason)

    async def _request(
        self,
        run: str | None,
        action: RequestAction,
        tasks: tuple[str, ...],
        reason: str | None = None,
        phase: str | None = None,
        reload: FileChanges | None = None,
    ) -> RunReport:
        name = await self._find(run)
        await self._context.check_writable()
        controller = RunController(self._context)
        await controller.perform(name, action, tasks, reason, phase, reload)
        return await self._reader.status(name)

    async def details(self, task: str, run: str | None = None) -> TaskDetails:
        """Return a task in full: phases, sessions, handoffs, landing.

        Raises RefusedError if there is no such task.
        """
        name = await self._find(run)
        details = await self._details(name, task)
        if details.status != TaskStatus.RUNNING:
            return details
        latest = await TaskLogs(self._context).latest(task, name)
        return details if latest is None else replace(details, latest_activity=LatestActivity(*latest))

    async def _details(self, run: str, task: str) -> TaskDetails:
        context, reader = self._context, self._reader
        document = await read_run(context.store, run)
        await check_task(context.store, document, task)
        record = await reader.without_dropped(await reader.record(run), task)
        shown, now, logs = record.tasks[task], context.clock.now(), context.project.logs(run)
        is_live = record.run.ended is None and await reader.index.has_live_process(run)
        if not is_live:
            shown = (await anyio.to_thread.run_sync(mark_interrupted, record, {task: shown}, logs, now))[task]
        documents = await read_tasks(context.store, run)
        landed_at = await find_landing_times(context.store, record.run, {task: record.tasks[task]}, documents)
        details = build_task_details(
            run,
            next(one for one in reader.describe(record, is_live=is_live).tasks if one.id == task),
            shown,
            await self._definition(record.run, task),
            {name: one for name, (_, one) in (await read_handoffs(context.store, run, task)).items()},
            target=record.run.target,
            landed_at=landed_at.get(task),
            logs=str(logs),
            now=now,
            damage=context.damage,
        )
        return await anyio.to_thread.run_sync(_without_missing_logs, details)

    async def _definition(self, run: RunDocument, task: str) -> TaskDefinition:
        if run.imported is not None:
            return TaskDefinition()
        spec = await read_spec(self._context.store, run.id, task)
        messages = await read_messages(self._context.store, run.id, task)
        definition = TaskDefinition(
            spec.prompt, spec.tracker, spec.needs, plan=spec.plan, messages=messages, built_needs=spec.built_needs
        )
        if spec.workflow is None:
            return definition
        names = [phase.name for phase in run.workflows[spec.workflow]]
        return replace(definition, workflow=spec.workflow, phases=names)


def _without_missing_logs(details: TaskDetails) -> TaskDetails:
    """Return details without the paths of missing logs. Blocks.

    A session that ended during setup has no log.
    """
    sessions = [
        one if one.log is None or Path(one.log).exists() else one.model_copy(update={"log": None})
        for one in details.sessions
    ]
    return replace(details, sessions=sessions)
