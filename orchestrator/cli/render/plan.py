"""The plan of a dry run as text: waves of tasks and a dependency tree. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from orchestrator.cli.render.text import one_line, pluralize, printable, short_name, wrapped
from orchestrator.domain.settings.quantities import format_duration
from orchestrator.domain.wording import join_names

if TYPE_CHECKING:
    from orchestrator.engine.reports.dry_run import DryRun, PlannedTask, PlannedWave

#: The maximum numbers of shown items; the rest is counted.
MAX_WAVES, MAX_TASKS_PER_WAVE, _MOST_LINES, _DEEPEST = 40, 20, 80, 12
_LONGEST = 60


def plan_text(plan: DryRun) -> str:
    """Return the complete plan as text."""
    return "\n".join(map(printable, _lines(plan))) + "\n"


def _lines(plan: DryRun) -> Iterator[str]:
    waves = plan.waves
    many = sum(len(wave.tasks) for wave in waves)
    sessions = pluralize(plan.sessions, "session")
    yield f"{pluralize(many, 'task')} in {pluralize(len(waves), 'wave')}, up to {sessions} at once"
    yield f"from {plan.base} onto {plan.target} in {plan.repository}, sandbox: {plan.sandbox}"
    if plan.limited_by is not None:
        yield f"limited by this machine: {plan.limited_by}"
    shared = _shared(waves)
    if shared:
        yield f"each task: {', '.join(shared)}"
    for number, wave in enumerate(waves[:MAX_WAVES], 1):
        yield ""
        yield from _wave(number, wave, shared)
    if len(waves) > MAX_WAVES:
        rest = sum(len(wave.tasks) for wave in waves[MAX_WAVES:])
        yield ""
        yield f"and {pluralize(len(waves) - MAX_WAVES, 'more wave')} with {pluralize(rest, 'task')}"
    yield from _tree(waves)


def _shared(waves: Sequence[PlannedWave]) -> list[str]:
    """Return the settings that all tasks share."""
    first = _settings(waves[0].tasks[0])
    others = {
        fact for facts in {_settings(task) for wave in waves for task in wave.tasks} for fact in {*first} - {*facts}
    }
    return [fact for fact in first if fact not in others]


def _wave(number: int, wave: PlannedWave, shared: Sequence[str]) -> Iterator[str]:
    yield f"Wave {number}: {pluralize(len(wave.tasks), 'task')}, {wave.sessions} at once"
    shown = wave.tasks[:MAX_TASKS_PER_WAVE]
    width = max(len(short_name(task.id)) for task in shown)
    for task in shown:
        facts = [*(fact for fact in _settings(task) if fact not in shared), *_relations(task)]
        yield from wrapped(", ".join(facts), head=f"  {short_name(task.id):<{width}}  ", indent="      ")
    rest = len(wave.tasks) - len(shown)
    if rest:
        waiting = sum(task.waits_for is not None for task in wave.tasks)
        follow = f"; {waiting} wait for tasks with the same owned paths" if waiting else ""
        yield f"  and {rest} more{follow}"
    if not wave.is_exact:
        yield "  too many owned paths to show which tasks wait for others"


def _settings(task: PlannedTask) -> tuple[str, ...]:
    idle_timeout = "" if task.idle_timeout is None else f" (idle {format_duration(task.idle_timeout)})"
    return (
        f"{task.adapter} ({one_line(task.program, _LONGEST)})",
        *([f"phases {one_line(', '.join(task.phases), _LONGEST)}"] if task.phases else []),
        f"from {task.starts_from}",
        f"{pluralize(task.attempts, 'attempt')} of at most {format_duration(task.timeout)}{idle_timeout}",
        f"checks: {one_line('; '.join(task.checks), _LONGEST)}" if task.checks else "no checks",
        *([f"priority {task.priority}"] if task.priority else []),
    )


def _relations(task: PlannedTask) -> Iterator[str]:
    if task.needs:
        yield f"needs {join_names(task.needs)}"
    if task.waits_for is not None:
        yield f"waits for {task.waits_for}, which owns some of its paths"


def _tree(waves: Sequence[PlannedWave]) -> Iterator[str]:
    """Draw each task below its last need; omit tasks without dependencies."""
    below = _tasks_by_last_need(waves)
    roots = [task for task in waves[0].tasks if task.id in below]
    if not roots:
        return
    related = len(roots) + sum(map(len, below.values()))
    yield ""
    yield "Dependencies:"
    drawn = 0
    waiting = [(task, "  ", "  ", 0) for task in reversed(roots)]
    while waiting and drawn < _MOST_LINES:
        task, own, inner, depth = waiting.pop()
        drawn += 1
        yield f"{own}{short_name(task.id)}{_other_needs(task)}"
        children = below.get(task.id, []) if depth < _DEEPEST else []
        branches = [(child, f"{inner}├─ ", f"{inner}│  ", depth + 1) for child in children[:-1]]
        branches += [(child, f"{inner}└─ ", f"{inner}   ", depth + 1) for child in children[-1:]]
        waiting += reversed(branches)
    if drawn < related:
        yield f"  and {related - drawn} more"


def _tasks_by_last_need(waves: Sequence[PlannedWave]) -> dict[str, list[PlannedTask]]:
    wave_of = {task.id: number for number, wave in enumerate(waves) for task in wave.tasks}
    below: dict[str, list[PlannedTask]] = defaultdict(list)
    for wave in waves[1:]:
        for task in wave.tasks:
            below[_last_need(task, wave_of)].append(task)
    return dict(below)


def _last_need(task: PlannedTask, wave_of: dict[str, int]) -> str:
    return max(task.needs, key=wave_of.__getitem__)


def _other_needs(task: PlannedTask) -> str:
    return f" (needs {join_names(task.needs)})" if len(task.needs) > 1 else ""


def flowchart(plan: DryRun) -> str:
    """Return waves as subgraphs and dependencies as arrows.

    Dotted lines join tasks that own a common path. Items beyond the limits of the text are counted.
    """
    return "\n".join(_flowchart_lines(plan)) + "\n"


def _flowchart_lines(plan: DryRun) -> Iterator[str]:
    yield "flowchart LR"
    nodes: dict[str, str] = {}
    shown: list[PlannedTask] = []
    for number, wave in enumerate(plan.waves[:MAX_WAVES], 1):
        yield f'    subgraph wave{number}["wave {number}"]'
        for task in wave.tasks[:MAX_TASKS_PER_WAVE]:
            nodes[task.id] = f"task{len(nodes)}"
            shown.append(task)
            yield f'        {nodes[task.id]}["{escape_label(task.id)}"]'
        if len(wave.tasks) > MAX_TASKS_PER_WAVE:
            yield f'        more{number}(["and {len(wave.tasks) - MAX_TASKS_PER_WAVE} more"])'
        yield "    end"
    if len(plan.waves) > MAX_WAVES:
        yield f'    rest(["and {pluralize(len(plan.waves) - MAX_WAVES, "more wave")}"])'
    for task in shown:
        yield from (f"    {nodes[need]} --> {nodes[task.id]}" for need in task.needs if need in nodes)
        if task.waits_for in nodes:
            yield f"    {nodes[task.waits_for]} -.- {nodes[task.id]}"


def escape_label(text: str) -> str:
    """Return text for a quoted Mermaid label, with special characters as entity codes."""
    return "".join(char if char.isascii() and (char.isalnum() or char in "._- ") else f"#{ord(char)};" for char in text)
