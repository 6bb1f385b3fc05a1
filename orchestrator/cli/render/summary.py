"""The final summary of a run: totals, problems and next commands. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from rich.cells import cell_len, set_cell_size

from orchestrator.cli.render.next_steps import format_saved, task_steps
from orchestrator.cli.render.result import (
    adapter_line,
    background_error_lines,
    enable_adapter_command,
    format_flaky_check,
    format_reason,
    format_session_status,
    format_state,
    next_line,
    retry_hint,
    run_summary,
    state_counts,
)
from orchestrator.cli.render.text import (
    COLUMNS,
    format_count,
    one_line,
    pluralize,
    printable,
    short_name,
    split_commands,
    truncate_end,
    truncate_start,
    wrapped,
)
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.model import HaltCause
from orchestrator.domain.runs.statuses import SUCCESS_STATUSES, TaskStatus
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.wording import format_cost
from orchestrator.engine.reports.report import RunReport
from orchestrator.engine.reports.task_report import TaskReport

MAX_LINES = 10
"""The maximum number of lines."""
#: Statuses that need no attention.
_NO_ATTENTION = frozenset({*SUCCESS_STATUSES, TaskStatus.PENDING})
#: Statuses that are listed after all others, in this order.
_LATE = (TaskStatus.NO_CHANGE, TaskStatus.CANCELLED, "blocked")
#: The ends of clauses, where text is cut.
_CLAUSE_ENDS = re.compile(r"[:;,.](?= )")


@dataclass(frozen=True)
class _Entry:
    """A text that is cut to its number of lines, followed by lines that are never cut."""

    text: str
    fixed: Sequence[str] = ()
    indent: str = ""
    min_lines: int = 1
    """The minimum number of lines of a long text."""

    @cached_property
    def whole(self) -> Sequence[str]:
        """All lines of the text."""
        return list(wrapped(self.text, head=self.indent, indent=f"{self.indent}  ")) if self.text else []

    @property
    def shortest(self) -> int:
        """The minimum number of lines."""
        return min(self.min_lines, len(self.whole)) + len(self.fixed)

    @property
    def longest(self) -> int:
        """The number of lines of the whole text and the fixed lines."""
        return len(self.whole) + len(self.fixed)

    def lines(self, count: int) -> list[str]:
        """Return `count` lines, of which the last of the text has all remaining commands."""
        room = count - len(self.fixed)
        if room >= len(self.whole):
            return [*map(_shortened, self.whole), *self.fixed]
        *first, last = self.whole[:room]
        rest = " ".join([last, *(line.strip() for line in self.whole[room:])])
        return [*map(_shortened, first), _shortened(rest), *self.fixed]


def summary_lines(report: RunReport, *, is_newest: bool = True, was_finished: bool = False) -> list[str]:
    """Return the totals of a run, the tasks that need attention, and next commands.

    Commands name the run unless it is the newest. `was_finished`: nothing was left to resume. Reasons are cut to one
    line each; the first ones get the remaining lines.
    """
    run = "" if is_newest else f" --run {report.run}"
    head = [*wrapped(run_summary(report)), *(truncate_end(line, COLUMNS) for line in _totals(report))]
    most = MAX_LINES - len(head)
    foot, halt = [*_next(report)], list[str]()
    if was_finished:
        foot = [*foot[: most - 1], _Entry("", [retry_hint(report, is_newest=is_newest)])]
    foot = foot[:most]
    if report.halted is not None and report.halt_cause is not HaltCause.BUDGET:
        foot = foot[: most // 2]
        halt = _halt(HaltReason.parse(report.halted), most - len(foot), f"How to fix it: council status{run}")
    tasks = sorted(
        (task for task in report.tasks if task.status not in _NO_ATTENTION),
        key=lambda task: _LATE.index(task.status) + 1 if task.status in _LATE else 0,
    )
    room = most - len(foot) - len(halt)
    shown, more = list[_Entry](), list[str]()
    for left, task in zip(range(len(tasks), 0, -1), tasks, strict=True):
        entry = _task(task, report, is_newest=is_newest)
        if entry.shortest + (left > 1) > room:
            more = [f"  and {left} more: council status{run}"][:room]
            break
        shown.append(entry)
        room -= entry.shortest
    room -= len(more)
    lines: list[Sequence[str]] = []
    for entry in (*shown, *foot):
        count = min(entry.longest, entry.shortest + room)
        room -= count - entry.shortest
        lines.append(entry.lines(count))
    listed, notes = lines[: len(shown)], lines[len(shown) :]
    return [*head, *chain(*listed), *more, *chain(*notes), *halt]


def _totals(report: RunReport) -> Iterator[str]:
    parts = state_counts(report)
    if tokens := sum(task.input_tokens + task.output_tokens for task in report.tasks):
        parts.append(f"{format_count(tokens)} tokens")
    costs = [task.cost for task in report.tasks if task.cost is not None]
    if costs:
        parts.append(format_cost(sum(costs)))
    if parts:
        yield f"  {', '.join(parts)}"
    flaky = [
        f"{short_name(task.id)} {format_flaky_check(check)}" for task in report.tasks for check in task.flaky_checks
    ]
    if flaky:
        yield printable(f"  {pluralize(len(flaky), 'FLAKY check')}: {flaky[0]}")


def _task(task: TaskReport, report: RunReport, *, is_newest: bool) -> _Entry:
    sessions = {one.task: one for one in report.sessions}
    message = format_session_status(sessions[task.id]) if task.id in sessions else format_reason(task)
    if task.preserved_worktree is not None:  # no next command names it
        message = "; ".join(filter(None, [message, format_saved(task)]))
    text = printable(": ".join(filter(None, [f"{short_name(task.id)} {format_state(task.status, report)}", message])))
    steps = task_steps(task, report, is_newest=is_newest)
    fixed = [line for step in (steps if report.merges is not None else steps[:1]) for line in _step_lines(str(step))]
    # These reasons end with the cause or the fix.
    is_long = task.failure == FailureClass.SETUP_FAILED or task.status == TaskStatus.QUEUED
    return _Entry(text, fixed, "  ", MAX_LINES // 2 if is_long else 1)


def _step_lines(step: str) -> Iterator[str]:
    first, *others = split_commands(printable(f"    {step}"))
    yield first
    yield from (f"      {one}" for one in others)


def _shortened(text: str) -> str:
    """Return text cut to the width of a line.

    Commands in backticks, and a path on its own line, are never cut.
    """
    if cell_len(text) <= COLUMNS or ("/" in text and len(text.split()) == 1):
        return text
    lost = [one for one in re.finditer(r"`[^`]*`", text) if cell_len(text[: one.end()]) >= COLUMNS]
    commands = " ".join(one.group() for one in lost)
    prose = text[: lost[0].start()] if lost else text
    room = max(COLUMNS - 1 - cell_len(commands), COLUMNS // 4)
    kept = set_cell_size(prose, room - 2) if cell_len(prose) > room - 2 else prose
    clauses = [one.start() for one in _CLAUSE_ENDS.finditer(f"{kept} ")]
    if lost and clauses and clauses[-1] > len(kept) // 2:  # a shorter clause is better than half a sentence
        kept = kept[: clauses[-1]]
    elif kept != prose and (words := kept.rpartition(" ")[0].rstrip()):
        kept = words
    return f"{kept.rstrip()} … {commands}".rstrip()


def _next(report: RunReport) -> Iterator[_Entry]:
    """Yield the problems and hints of the run as a whole, most urgent first."""
    if report.damage:
        damaged = f"The state log is damaged in {pluralize(len(report.damage), 'place')}."
        yield _Entry("", [f"{damaged} Next: council state verify"])
    for adapter in report.adapters:
        again = enable_adapter_command(adapter.name, report)
        yield _Entry(printable(adapter_line(adapter, again)))
    yield from map(_Entry, background_error_lines(report))
    if report.halted is not None and report.halt_cause is HaltCause.BUDGET:
        yield _Entry(f"Halted: {printable(one_line(report.halted))}.")
    yield from (_Entry("", [line]) for line in next_line(report))


def _halt(halted: HaltReason, room: int, more: str) -> list[str]:
    """Return the reason for a halt in at most `room` lines.

    The output is shortened first; the path of the log is always kept. A remedy that does not fit is replaced by `more`.
    """
    head = list(wrapped(printable(f"Halted: {halted.headline}")))
    log = [] if halted.log is None else [printable(f"log: {halted.log}")]
    remedy = [line for one in halted.remedy for line in wrapped(printable(one))]
    if remedy and len(head) + len(log) + len(remedy) > room:
        remedy = [more]
    left = max(room - len(head) - len(log) - len(remedy), 0)
    *before, last = [printable(line.expandtabs()) for line in halted.output if line.strip()] or [""]
    output = [*(truncate_end(line, COLUMNS) for line in before), *_end(last)]
    shown = output[-left:] if left else []
    return [*head[: room - len(log) - len(remedy)], *shown, *log, *remedy]


def _end(line: str) -> list[str]:
    """Return the end of the last line of output; empty if its last word is too long."""
    return [] if not line or cell_len(line.rsplit(maxsplit=1)[-1]) > COLUMNS else [truncate_start(line, COLUMNS)]
