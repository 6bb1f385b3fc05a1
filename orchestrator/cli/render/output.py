"""What the commands print: JSON lines for programs, sentences for people."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING

import click

from orchestrator.cli.render.streams import is_reader_gone, redirect_to_null
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.security.secrets import redact_urls
from orchestrator.system.instants import format_local_time

if TYPE_CHECKING:
    from orchestrator.engine.reports.report import RunReport
    from orchestrator.protocols import Event, JsonObject
    from orchestrator.repo.git.change_counts import Changes

#: How an event reads; its own fields fill the gaps.
EVENT_MESSAGES: Mapping[str, str] = {
    "run.created": "run {run} lands on {target}",
    "run.imported": "imported from {source}",
    "legacy.imported": "imported {tasks} tasks from {sources}",
    "legacy.file_skipped": "not imported as it is: {path}: {reason}",
    "run.capacity_limited": "no more than {sessions} sessions at once: {reason}",
    "run.waiting": "nothing is left to do{before} but to wait for {awaited}",
    "run.paused": "nothing starts for {retry_in:g} s: {reason}",
    "repository.changed": "in your repository, not by council, while {sessions} ran: {changes}",
    "plugin.skipped": "left out: {reason}",
    "sink.failing": "sink {sink} fails and will be tried again: {reason}",
    "sink.recovered": "sink {sink} is told again",
    "sink.undelivered": "sink {sink} has yet to get {left} events: `council resume {run}` delivers them",
    "tracker.failing": "tracker {tracker} fails and will be tried again: {reason}",
    "tracker.recovered": "tracker {tracker} is told again",
    "tracker.undelivered": "tracker {tracker} has yet to get {left} events: `council resume {run}` delivers them",
    "views.failing": "the readable copies of the state can't be written: {reason}",
    "adapter.cooling_down": "adapter {adapter} pauses until {until}: {reason}",
    "adapter.disabled": (
        "adapter {adapter} is stopped: {reason}: fix that, then `council adapters enable {adapter} --run {run}`"
    ),
    "adapter.enabled": "adapter {adapter} is used again",
    "budget.low": "the budget of {of} is nearly used up: {reason}",
    "budget.exhausted": "the budget of {of} is used up: {reason}",
    "budget.untracked": "{of} has printed so much that what it uses up is not known before its end",
    "budget.price_unknown": "what {adapter} costs is not known, and not counted: add {model} to `prices`",
    "base.checking": "running the checks on {branch} ({commit:.10}) before the next session: {checks}",
    "base.passed": "{branch} ({commit:.10}) passes its checks",
    "base.failure_allowed": "checks may fail on the base from now on",
    "run.worker_left": "process {pid} left the run: {headline}",
    "run.halted": "halted: {headline}",
    "run.budget_changed": "the run has other limits now",
    "run.file_changed": "{file} has changed, the run keeps what it recorded: {changed}",
    "task.reloaded": "takes {keys} from the file",
    "run.interrupted": "interrupted: `council resume {run}` goes on",
    "run.removed": "its record was removed, checkpoint {checkpoint} brings it back",
    "run.taken_over": "taken over by process {pid}, to restore a checkpoint",
    "checkpoint.restored": "checkpoint {checkpoint} was restored",
    "run.target_unreachable": "the target can't be looked at: {reason}",
    "task.started": "started (session {attempt}, {adapter})",
    "task.retrying": "failed: {reason}; another try follows",
    "task.interrupted": "interrupted: {reason}",
    "task.postponed": "put off: {reason}",
    "task.cancelled": "cancelled",
    "task.ignored": "ignored: {reason}",
    "task.retry_requested": "will be tried again",
    "task.failed": "failed: {reason}",
    "task.no_change": "changed nothing",
    "task.queued": "built, waits to land",
    "task.checking": "merged, checks run",
    "task.requeued": "can't land now: {reason}",
    "task.deferred": "can't land now: {reason}",
    "task.conflict": "{reason}",
    "task.ownership_extended": "owns what else it changed, too",
    "task.out_of_scope_allowed": "changed what it does not own, and may",
    "task.landed": "landed as {landed:.10}",
    "task.expanded": "its plan became tasks: {count}",
    "task.phase_repeated": "{reason}; another round follows",
    "task.waiting": "a person is to approve this: `council approve {task}`, or `council reject {task} --note TEXT`",
    "task.approved": "phase {phase} is approved{noted}",
    "task.rejected": "phase {phase} is sent back{noted}",
    "task.done": "done",
    "task.changes_discarded": "a phase that is to change nothing changed this, it was discarded: {paths}",
    "phase.entered": "phase {phase} begins",
    "phase.awaiting": "phase {phase} waits for approval",
    "phase.completed": "phase {phase} is complete",
    "phase.failed": "phase {phase} has failed",
    "phase.skipped": "phase {phase} is skipped: {reason}",
    "phase.cancelled": "phase {phase} is cancelled",
    "handoff.invalid": "phase {phase} has handed over what is not valid",
    "shared.put": "shared as {key}",
    "task.salvaged": "work that was on no branch is kept as {kept}",
    "task.claim_lost": "taken over by {by}; {left}",
    "task.session_api_failed": "a question of its session could not be answered: {reason}",
    "task.tools_denied": "{reason}",
    "task.host_denied": "its session was refused {host}, which `network.allow` does not cover",
    "claim.acquired": "claimed by {owner}",
    "claims.taken_over": "{swept} worker {orchestrator} ({reason})",
    "run.joined": "process {pid} on {host} joined",
    "task.after_run_failed": "a command after its session failed: {reason}",
    "slot.setup_started": "{place}: setup runs: {commands}",
    "slot.setup_finished": "{place}: setup took {seconds:g} s",
    "slot.teardown_failed": "{place}: a command of its teardown failed: {reason}",
    "run.hooks_skipped": "landings do not run the hooks in {hooks}: {reason}",
    "slot.ports_changed": "{place} got other ports, somebody else has {lost}",
    "task.worktree_preserved": "its worktree stays in {worktree}: {reason}",
    "note.added": "left a note {note} for later sessions",
}


#: Why a terminal gets lines all the same, beside one that says it is dumb. https://no-color.org is about colour alone.
_NO_TABLES_VARIABLE = "CI"
#: Tasks and keys that are named where a file has changed.
_MAX_CHANGES_SHOWN = 5
_SHOW_CURSOR = "\x1b[?25h"


@dataclass(slots=True)
class Output:
    """Prints to stdout as one JSON object a line, or as text."""

    as_json: bool
    print_above_table: Callable[[str], None] | None = field(default=None, init=False)
    """While a table stands on the terminal: prints a line above it."""
    write_error: OSError | None = field(default=None, init=False)
    """Why not all is there that was to be printed, though somebody wants it."""
    is_reader_gone: bool = field(default=False, init=False)
    """Whether nobody reads any more what is printed."""

    @property
    def can_draw_tables(self) -> bool:
        """Whether there is somebody at a terminal to draw tables for."""
        if self.as_json or os.environ.get(_NO_TABLES_VARIABLE):
            return False
        return os.environ.get("TERM", "dumb") not in {"", "dumb", "unknown"} and sys.stdout.isatty()

    def _say(self, text: str | bytes, *, err: bool = False, newline: bool = True) -> None:
        """Print a line, unless whoever read has gone or there is no room: the run goes on without them.

        This is where all that is printed passes, so that no URL of a store or a repository shows a password.
        """
        stream = sys.stderr if err else sys.stdout
        text = redact_urls(text) if isinstance(text, str) else text
        try:
            click.echo(text, file=stream, nl=newline)
        except OSError as error:
            redirect_to_null(stream)
            if not err and is_reader_gone(error):
                self.is_reader_gone = True
            elif not err:
                self.write_error = error

    def event(self, time: float, event: Event) -> None:
        """Print something that happened."""
        if self.as_json:
            self._line({"event": event.type, "time": time, **event.data})
        elif (line := event_line(time, event)) is not None:
            self._say(line)

    def result(
        self,
        report: RunReport,
        code: int | None = None,
        *,
        changes: Mapping[str, Changes] | None = None,
        is_newest: bool = True,
        whole: bool = True,
    ) -> None:
        """Print how a run stands, as the last thing; `code` is the exit code where that is not the run's own.

        `changes` says how much each task that landed has changed; people are told. Unless it is `whole`, people
        get the totals and what needs attention.
        """
        if self.as_json:
            self._line(report.to_json() | ({} if code is None else {"exit": code}))
            return
        if not whole:
            from orchestrator.cli.render.brief import brief_lines

            for line in brief_lines(report, is_newest=is_newest):
                self._say(line)
            return
        from orchestrator.cli.render import result
        from orchestrator.cli.render.columns import wrapped

        rows = list(result.result_rows(report, changes or {}, is_newest=is_newest, now=time.time()))
        for line in wrapped(result.run_summary(report)):
            self._say(line)
        if self.can_draw_tables:
            from orchestrator.cli.render.rich_tables import render_result_table

            self._say(render_result_table(rows), newline=False)
        else:
            self._say("\n".join(result.result_lines(rows)))
        for hint in chain.from_iterable(hint.splitlines() for hint in result.next_step_hints(report)):
            for line in wrapped(hint):
                self._say(line)

    def facts(self, facts: Mapping[str, str | None]) -> None:
        """Print names with values."""
        if self.as_json:
            self._line(dict(facts))
            return
        width = max(map(len, facts))
        for name, value in facts.items():
            self._say(f"{name:<{width}}  {value or '-'}")

    def failure(self, result: JsonObject, message: str) -> None:
        """Print why a command could not do its work."""
        if self.print_above_table is not None:  # it ends at once, and leaves the table where it is
            self._say(f"\n{_SHOW_CURSOR}", newline=False)
        if self.as_json:
            self._line(result)
        else:
            self._say(printable(message, keep="\n"), err=True)

    def text(self, text: str, *, err: bool = False) -> None:
        """Print what a program wrote, as it is; to a terminal without what that would obey."""
        stream = sys.stderr if err else sys.stdout
        self._say(printable(text, keep="\n\t") if stream.isatty() else text, err=err, newline=False)

    def difference(self, difference: bytes, *, color: bool) -> None:
        """Print a difference that has no colours of its own.

        With `color`, or to a terminal, whatever a terminal would obey or not show is spelled out, and the colours are
        ours. Otherwise its bytes are printed as they are, for a patch to apply.
        """
        if not color and not sys.stdout.isatty():
            self.bytes(difference)
            return
        lines = difference.decode(errors="replace").split("\n")
        self._say("\n".join(_colored(line) if color else escape_unprintable(line) for line in lines), newline=False)

    def bytes(self, data: bytes) -> None:
        """Print bytes as they are."""
        self._say(data, newline=False)

    def json(self, value: JsonObject) -> None:
        """Print one object, as a line."""
        self._line(value)

    def notice(self, text: str) -> None:
        """Tell a person something that is no event."""
        if self.print_above_table is not None:
            self.print_above_table(text)
        elif not self.as_json:
            self._say(text, err=True)

    def _line(self, value: JsonObject) -> None:
        self._say(json.dumps(value, ensure_ascii=True, separators=(",", ":")))


#: How lines of a difference begin, and how they are shown (ECMA-48, SGR): as git does.
_COLORS = (
    *((start, "1") for start in ("diff ", "index ", "--- ", "+++ ", "new file ", "deleted file ", "old mode ")),
    *((start, "1") for start in ("new mode ", "similarity ", "rename ")),
    ("@@", "36"),
    ("+", "32"),
    ("-", "31"),
    ("#", "33"),
)
#: Characters that are printable to Unicode and show nothing: fillers, blanks, joiners and variation selectors.
_INVISIBLE = re.compile(
    "[\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180d\\u180f\\u2800\\u3164\\ufe00-\\ufe0d\\uffa0\\U000e0100-\\U000e01ef]"
)


def event_line(time: float, event: Event) -> str | None:
    """Return an event as a line for people; None if it is not for them."""
    if event.type not in EVENT_MESSAGES:
        return None
    return f"{datetime.fromtimestamp(time, UTC).astimezone():%H:%M:%S} {event_text(event)}"


def event_text(event: Event) -> str:
    """Return an event in words, by its bare name where there are none for it."""
    task = f"{event.data['task']}: " if "task" in event.data else ""
    words = (
        EVENT_MESSAGES[event.type].format_map(_message_fields(event.data))
        if event.type in EVENT_MESSAGES
        else event.type
    )
    return f"{task}{printable(words)}"


def _message_fields(data: JsonObject) -> JsonObject:
    """Return an event's fields as a person reads them: instants as local times, lists as words, one line each."""
    told: JsonObject = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in data.items()
    }
    if told.get("until") is not None:
        told["until"] = format_local_time(told["until"])
    if isinstance(data.get("tasks"), dict) and "keys" in data:
        told["changed"] = describe_file_changes(data["tasks"], data["keys"])
    if "count" in told:
        told["counted"] = pluralize(told["count"], "task")
        told["swept"] = f"took over {told['counted']} from" if told["count"] else "lost"
    told["before"] = f" before {told['until']}" if told.get("until") else ""
    if "approvals" in told:
        who = (told["adapters"], f"somebody to approve {told['approvals']}" if told["approvals"] else "")
        told["awaited"] = ", and for ".join(filter(None, who))
    told["noted"] = f": {one_line(told['note'])}" if told.get("note") else ""
    if "branch" in told:
        told["kept"] = kept = None if told["branch"] is None else salvage_name(told["branch"])
        told["left"] = f"what its session left is kept as {kept}" if kept else "its session left nothing"
    if isinstance(told.get("reason"), str):
        told["headline"] = HaltReason.parse(told["reason"]).headline
        told["reason"] = one_line(told["reason"])
    return told


def describe_file_changes(tasks: Mapping[str, Sequence[str]], keys: Sequence[str]) -> str:
    """Return what a run's file says otherwise than the run, which keeps what it recorded, and how to change that."""
    each = [*(f"{name} ({', '.join(changed)})" for name, changed in tasks.items()), *keys]
    more = f" and {len(each) - _MAX_CHANGES_SHOWN} more" if len(each) > _MAX_CHANGES_SHOWN else ""
    remedy = "`council retry TASK --reload` takes it over for a task" if tasks else "start a new run for that"
    return f"{', '.join(each[:_MAX_CHANGES_SHOWN])}{more}; {remedy}"


def pluralize(count: int, noun: str) -> str:
    """Return a number with its noun, as in `1 task`, `2 tasks` and `no tasks`."""
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def salvage_name(branch: str) -> str:
    """Return the name by which `council salvage` knows a branch of ours, which the user's repository does not have."""
    return branch.split("/", 2)[-1] if branch.startswith("council/") else branch


def one_line(text: str, limit: int = 300) -> str:
    """Return the first and the last of what may be many lines: what happened, and what was said last of all."""
    lines = [" ".join(line.split()) for line in text.splitlines() if any(map(str.isalnum, line))] or [""]
    words = lines[0] if len(lines) == 1 else f"{lines[0]}: {lines[-1]}"
    return words if len(words) <= limit else f"{words[: limit // 2]} … {words[-limit // 2 :]}"


def printable(text: str, keep: str = "") -> str:
    """Take out what a terminal would obey: text from agents and repositories is shown, never interpreted."""
    if text.isprintable() and not _INVISIBLE.search(text):
        return text
    return "".join(char if _is_visible(char) or char in keep else "\N{REPLACEMENT CHARACTER}" for char in text)


def _colored(line: str) -> str:
    code = next((code for start, code in _COLORS if line.startswith(start)), None)
    return escape_unprintable(line) if code is None else f"\x1b[{code}m{escape_unprintable(line)}\x1b[m"


def escape_unprintable(line: str) -> str:
    """Spell out what a terminal would obey, reorder by or not show: `^[` for an escape, `<U+202E>` for an override.

    A tab stays.
    """
    if line.isprintable() and not _INVISIBLE.search(line):
        return line
    return "".join(char if _is_visible(char) or char == "\t" else _escape_character(char) for char in line)


def _is_visible(char: str) -> bool:
    return char.isprintable() and not _INVISIBLE.match(char)


def _escape_character(char: str) -> str:
    return f"^{chr(ord(char) ^ 0x40)}" if ord(char) < 0x20 or char == "\x7f" else f"<U+{ord(char):04X}>"


def format_line_counts(changes: Changes) -> str:
    """Return how many lines were changed, as in `+12 -3`."""
    return f"+{changes.added} -{changes.removed}"
