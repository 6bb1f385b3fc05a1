"""What the commands print: JSON lines for programs, sentences for people."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import click

from orchestrator.domain.model import REVIVABLE, TaskStatus
from orchestrator.engine.report import AdapterReport, RunReport, RunStatus, TaskReport
from orchestrator.protocols import Event, JsonObject

#: How an event reads; its own fields fill the gaps.
SENTENCES: Mapping[str, str] = {
    "run.created": "run {run} lands on {target}",
    "run.limited": "no more than {sessions} sessions at once: {reason}",
    "run.paused": "nothing starts for {retry_in:g} s: {reason}",
    "repository.changed": "in your repository, not by council, while {sessions} ran: {changes}",
    "adapter.parked": "adapter {adapter} pauses until {until}: {reason}",
    "adapter.closed": "adapter {adapter} is stopped: {reason}",
    "run.interrupted": "interrupted: `council resume {run}` goes on",
    "run.target_unreachable": "the target can't be looked at: {reason}",
    "task.started": "started (attempt {attempt}, {adapter})",
    "task.retrying": "failed: {reason}; another try follows",
    "task.interrupted": "interrupted: {reason}",
    "task.held": "put off: {reason}",
    "task.cancelled": "cancelled",
    "task.revived": "will be tried again",
    "task.failed": "failed: {reason}",
    "task.no_change": "changed nothing",
    "task.queued": "built, waits to land",
    "task.checking": "merged, checks run",
    "task.requeued": "can't land now: {reason}",
    "task.deferred": "can't land now: {reason}",
    "task.conflict": "{reason}",
    "task.landed": "landed as {landed:.10}",
    "task.salvaged": "work that was on no branch is kept on {branch}",
    "task.worktree_kept": "its worktree stays in {worktree}: {reason}",
}


@dataclass(frozen=True, slots=True)
class Output:
    """Prints to stdout as one JSON object a line, or as text."""

    as_json: bool

    def event(self, time: float, event: Event) -> None:
        """Print something that happened."""
        if self.as_json:
            self._line({"event": event.type, "time": time, **event.data})
        elif event.type in SENTENCES:
            at = datetime.fromtimestamp(time, UTC).astimezone()
            task = f"{event.data['task']}: " if "task" in event.data else ""
            _say(f"{at:%H:%M:%S} {task}{plain(SENTENCES[event.type].format_map(_readable(event.data)))}")

    def result(self, report: RunReport, code: int | None = None) -> None:
        """Print how a run stands, as the last thing; `code` is the exit code where that is not the run's own."""
        if self.as_json:
            self._line(report.to_json() | ({} if code is None else {"exit": code}))
            return
        landed = sum(task.landed is not None for task in report.tasks)
        _say(f"run {report.run}: {report.status}, {landed} of {len(report.tasks)} landed on {report.target}")
        for task in report.tasks:
            _say(f"  {_task(task)}")
        for hint in _hints(report):
            _say(hint)

    def facts(self, facts: Mapping[str, str | None]) -> None:
        """Print names with values."""
        if self.as_json:
            self._line(dict(facts))
            return
        width = max(map(len, facts))
        for name, value in facts.items():
            _say(f"{name:<{width}}  {value or '-'}")

    def failure(self, result: JsonObject, message: str) -> None:
        """Print why a command could not do its work."""
        if self.as_json:
            self._line(result)
        else:
            _say(plain(message, keep="\n"), err=True)

    def text(self, text: str, *, err: bool = False, colored: bool = False) -> None:
        """Print what a program wrote, as it is; to a terminal without what that would obey, but for git's colours."""
        stream = sys.stderr if err else sys.stdout
        if stream.isatty():
            parts = _COLOR.split(text) if colored else [text]
            # The expression has one group: each second part is a colour.
            text = "".join(part if odd % 2 else plain(part, keep="\n\t") for odd, part in enumerate(parts))
        _say(text, err=err, newline=False)

    def bytes(self, data: bytes) -> None:
        """Print bytes as they are."""
        _say(data, newline=False)

    def json(self, value: JsonObject) -> None:
        """Print one object, as a line."""
        self._line(value)

    def notice(self, text: str) -> None:
        """Tell a person something that is no event."""
        if not self.as_json:
            _say(text, err=True)

    def _line(self, value: JsonObject) -> None:
        _say(json.dumps(value, ensure_ascii=True, separators=(",", ":")))


_COLOR = re.compile("(\x1b\\[[0-9;]*m)")


def _say(text: str | bytes, *, err: bool = False, newline: bool = True) -> None:
    """Print a line, unless whoever read has gone: the run goes on without them."""
    stream = sys.stderr if err else sys.stdout
    try:
        click.echo(text, file=stream, nl=newline)
    except OSError:  # a closed pipe, a terminal that hung up
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _task(task: TaskReport) -> str:
    text = f"{task.id}: {task.state}"
    if task.landed is not None:
        text += f" as {task.landed[:10]}"
    if task.reason is not None:
        text += f": {plain(one_line(task.reason))}"
    if task.branch is not None:
        # As `council salvage` names it: without council/ and the run.
        text += f"; kept as {task.branch.split('/', 2)[-1]}"
    if task.state == "failed" and task.log is not None:
        text += f"; see `council logs {task.id}`"
    return text


def _hints(report: RunReport) -> Iterator[str]:
    """Say what to type next."""
    for adapter in report.adapters:
        yield _adapter(adapter)
    over = {*REVIVABLE, TaskStatus.LANDED}
    is_stopped = any(adapter.closed is not None for adapter in report.adapters)
    waits = is_stopped or any(task.state not in {*over, "blocked"} for task in report.tasks)
    if report.status is RunStatus.INTERRUPTED or (report.status is RunStatus.INCOMPLETE and waits):
        yield f"`council resume {report.run}` goes on with what is left."
    elif report.status is RunStatus.INCOMPLETE:
        yield "Nothing is left to do in this run; `council retry TASK` has what is over tried again."
    for place in report.damage:
        yield f"The state log is damaged: {place}"
    if any(task.branch is not None for task in report.tasks):
        yield "What is kept can be seen and brought over: `council salvage list`, `show`, `apply`."


def _adapter(adapter: AdapterReport) -> str:
    if adapter.closed is not None:
        return (
            f"Adapter {adapter.name} is stopped: {plain(one_line(adapter.closed))}. Mend that, then `council resume`."
        )
    until = datetime.fromtimestamp(adapter.parked_until or 0.0, UTC).astimezone()
    return f"Adapter {adapter.name} pauses until {until:%Y-%m-%d %H:%M:%S}."


def _readable(data: JsonObject) -> JsonObject:
    """Return an event's fields as a person reads them: instants as local times, lists as words, one line each."""
    told: JsonObject = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in data.items()
    }
    if "until" in told:
        told["until"] = f"{datetime.fromtimestamp(told['until'], UTC).astimezone():%Y-%m-%d %H:%M:%S}"
    if isinstance(told.get("reason"), str):
        told["reason"] = one_line(told["reason"])
    return told


def one_line(text: str, limit: int = 300) -> str:
    """Return the first and the last of what may be many lines: what happened, and what was said last of all."""
    lines = [" ".join(line.split()) for line in text.splitlines() if any(map(str.isalnum, line))] or [""]
    words = lines[0] if len(lines) == 1 else f"{lines[0]}: {lines[-1]}"
    return words if len(words) <= limit else f"{words[: limit // 2]} … {words[-limit // 2 :]}"


def plain(text: str, keep: str = "") -> str:
    """Take out what a terminal would obey: text from agents and repositories is shown, never interpreted."""
    return "".join(char if char.isprintable() or char in keep else "\N{REPLACEMENT CHARACTER}" for char in text)
