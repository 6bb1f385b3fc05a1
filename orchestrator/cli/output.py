"""What the commands print: JSON lines for programs, sentences for people."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import click

from orchestrator.engine.report import RunReport, RunStatus, TaskReport
from orchestrator.protocols import Event, JsonObject

#: How an event reads; its own fields fill the gaps.
SENTENCES: Mapping[str, str] = {
    "run.created": "run {run} lands on {target}",
    "run.interrupted": "interrupted: `council resume {run}` goes on",
    "run.target_unreachable": "the target can't be looked at: {reason}",
    "task.started": "started (attempt {attempt}, {adapter})",
    "task.retrying": "failed: {reason}; next try in {retry_in} s",
    "task.interrupted": "interrupted: {reason}",
    "task.failed": "failed: {reason}",
    "task.no_change": "changed nothing",
    "task.queued": "built, waits to land",
    "task.deferred": "can't land now: {reason}",
    "task.conflict": "{reason}",
    "task.landed": "landed as {landed:.10}",
    "task.salvaged": "the work of a cut-off attempt is kept on {branch}",
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
            _say(f"{at:%H:%M:%S} {task}{_plain(SENTENCES[event.type].format_map(event.data))}")

    def result(self, report: RunReport) -> None:
        """Print how a run stands, as the last thing."""
        if self.as_json:
            self._line(report.to_json())
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
            _say(_plain(message, keep="\n"), err=True)

    def notice(self, text: str) -> None:
        """Tell a person something that is no event."""
        if not self.as_json:
            _say(text, err=True)

    def _line(self, value: JsonObject) -> None:
        _say(json.dumps(value, ensure_ascii=True, separators=(",", ":")))


def _say(text: str, *, err: bool = False) -> None:
    """Print a line, unless whoever read has gone: the run goes on without them."""
    stream = sys.stderr if err else sys.stdout
    try:
        click.echo(text, file=stream)
    except OSError:  # a closed pipe, a terminal that hung up
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _task(task: TaskReport) -> str:
    text = f"{task.id}: {task.state}"
    if task.landed is not None:
        text += f" as {task.landed[:10]}"
    if task.reason is not None:
        text += f": {_plain(task.reason)}"
    if task.branch is not None:
        text += f"; kept on {task.branch}"
    if task.state == "failed" and task.log is not None:
        text += f"; output in {task.log}"
    return text


def _hints(report: RunReport) -> Iterator[str]:
    """Say what to type next."""
    waits = any(task.state in {"queued", "landing"} for task in report.tasks)
    if report.status is RunStatus.INTERRUPTED or (report.status is RunStatus.INCOMPLETE and waits):
        yield f"`council resume {report.run}` goes on with what is left."
    elif report.status is RunStatus.INCOMPLETE:
        yield "Nothing is left to do in this run; what did not land can be tried again in a new one."
    for place in report.damage:
        yield f"The state log is damaged: {place}"
    if any(task.branch is not None for task in report.tasks):
        yield f"What is kept is in a repository of council's: git fetch {report.repository} BRANCH:A-NAME-OF-YOURS"


def _plain(text: str, keep: str = "") -> str:
    """Take out what a terminal would obey: text from agents and repositories is shown, never interpreted."""
    return "".join(char if char.isprintable() or char in keep else "\N{REPLACEMENT CHARACTER}" for char in text)
