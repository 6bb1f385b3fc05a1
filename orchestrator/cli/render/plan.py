"""A rehearsal as text for a terminal: waves of tasks, and a tree of what follows what. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from orchestrator.cli.render.columns import short_name, wrapped
from orchestrator.cli.render.text import one_line, printable
from orchestrator.config.source.quantities import format_duration
from orchestrator.engine.reports.dry_run import DryRun, PlannedTask, PlannedWave
from orchestrator.errors import join_names

#: Beyond these the rest is counted, not shown.
MAX_WAVES, MAX_TASKS_PER_WAVE, _MOST_LINES, _DEEPEST = 40, 20, 80, 12
_LONGEST = 60


def plan_text(rehearsal: DryRun) -> str:
    """Return all of it, ending in a line break."""
    return "\n".join(map(printable, _lines(rehearsal))) + "\n"


def pluralize(many: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{many} {what}{'' if many == 1 else 's'}"


def _lines(rehearsal: DryRun) -> Iterator[str]:
    waves = rehearsal.waves
    many = sum(len(wave.tasks) for wave in waves)
    sessions = pluralize(rehearsal.sessions, "session")
    yield f"{pluralize(many, 'task')} in {pluralize(len(waves), 'wave')}, up to {sessions} at once"
    yield f"from {rehearsal.base} onto {rehearsal.target} in {rehearsal.repository}, sandbox: {rehearsal.sandbox}"
    if rehearsal.limited_by is not None:
        yield f"limited by this machine: {rehearsal.limited_by}"
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
    """Return the settings that are the same for all tasks, to be told once."""
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
        waiting = sum(task.follows is not None for task in wave.tasks)
        follow = f"; in all {waiting} wait for others that own the same paths" if waiting else ""
        yield f"  and {rest} more{follow}"
    if not wave.is_compared:
        yield "  too many own paths to say of each which others it waits for"


def _settings(task: PlannedTask) -> tuple[str, ...]:
    idle_timeout = "" if task.idle_timeout is None else f", silent for {format_duration(task.idle_timeout)}"
    return (
        f"{task.adapter} ({one_line(task.program, _LONGEST)})",
        *([f"phases {one_line(', '.join(task.phases), _LONGEST)}"] if task.phases else []),
        f"from {task.starts_from}",
        f"{pluralize(task.attempts, 'attempt')} (each {format_duration(task.timeout)}{idle_timeout} at most)",
        f"checks: {one_line('; '.join(task.checks), _LONGEST)}" if task.checks else "no checks",
        *([f"priority {task.priority}"] if task.priority else []),
    )


def _relations(task: PlannedTask) -> Iterator[str]:
    if task.needs:
        yield f"needs {join_names(task.needs)}"
    if task.follows is not None:
        yield f"waits for {task.follows}, which owns some of its paths"


def _tree(waves: Sequence[PlannedWave]) -> Iterator[str]:
    """Draw each task below the last of its needs to land; those without any relation are not drawn."""
    below = _tasks_by_last_need(waves)
    roots = [task for task in waves[0].tasks if task.id in below]
    if not roots:
        return
    related = len(roots) + sum(map(len, below.values()))
    yield ""
    yield "What starts after what:"
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


def flowchart(rehearsal: DryRun) -> str:
    """Return waves as subgraphs and needs as arrows; dotted lines join tasks that own a common path.

    What is beyond the numbers that the text shows is counted: a chart of thousands of nodes is not drawn anyway.
    """
    return "\n".join(_flowchart_lines(rehearsal)) + "\n"


def _flowchart_lines(rehearsal: DryRun) -> Iterator[str]:
    yield "flowchart LR"
    nodes: dict[str, str] = {}
    shown: list[PlannedTask] = []
    for number, wave in enumerate(rehearsal.waves[:MAX_WAVES], 1):
        yield f'    subgraph wave{number}["wave {number}"]'
        for task in wave.tasks[:MAX_TASKS_PER_WAVE]:
            nodes[task.id] = f"task{len(nodes)}"
            shown.append(task)
            yield f'        {nodes[task.id]}["{escape_label(task.id)}"]'
        if len(wave.tasks) > MAX_TASKS_PER_WAVE:
            yield f'        more{number}(["and {len(wave.tasks) - MAX_TASKS_PER_WAVE} more"])'
        yield "    end"
    if len(rehearsal.waves) > MAX_WAVES:
        yield f'    rest(["and {pluralize(len(rehearsal.waves) - MAX_WAVES, "more wave")}"])'
    for task in shown:
        yield from (f"    {nodes[need]} --> {nodes[task.id]}" for need in task.needs if need in nodes)
        if task.follows in nodes:
            yield f"    {nodes[task.follows]} -.- {nodes[task.id]}"


def escape_label(text: str) -> str:
    """Return text for a quoted label: all but letters, digits and a few marks as Mermaid's entity codes."""
    return "".join(char if char.isascii() and (char.isalnum() or char in "._- ") else f"#{ord(char)};" for char in text)
