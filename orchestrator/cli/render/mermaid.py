"""A rehearsal as a Mermaid flowchart (mermaid.js.org/syntax/flowchart.html). Pure."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.cli.render.plan import MAX_TASKS_PER_WAVE, MAX_WAVES, pluralize
from orchestrator.engine.reports.dry_run import DryRun, PlannedTask


def flowchart(rehearsal: DryRun) -> str:
    """Return waves as subgraphs and needs as arrows; dotted lines join tasks that own a common path.

    What is beyond the numbers that the text shows is counted: a chart of thousands of nodes is not drawn anyway.
    """
    return "\n".join(_lines(rehearsal)) + "\n"


def _lines(rehearsal: DryRun) -> Iterator[str]:
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
