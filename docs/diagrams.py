"""Draw the diagrams of `docs/architecture.md` from the code.

    python docs/diagrams.py [--check]

With `--check` the page is not written, and the exit code is 1 if it does not match the code.
"""

# ruff: noqa: INP001  a script

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from orchestrator.domain.runs.statuses import TRANSITIONS, TaskStatus, Trigger

TOP = Path(__file__).parents[1]
PAGE = TOP / "docs" / "architecture.md"
#: Packages by layer, as in the import rules of pyproject.toml.
LAYERS = {
    "interfaces": ("cli", "mcp_server"),
    "API": ("api",),
    "engine": ("engine", "builtin"),
    "work": ("sessions", "repo", "locking"),
    "state": ("state",),
    "input and contracts": ("config", "plugins", "project", "hookspecs", "protocols"),
    "foundation": ("system", "domain", "sandbox", "client", "errors", "lazy"),
}
#: Minimum number of imports between two layers for an arrow in the diagram.
OFTEN = 15
#: Triggers of a task without faults, phases and user requests.
MAIN = {Trigger.START, Trigger.BUILD, Trigger.CHECK, Trigger.INTEND, Trigger.LAND}
#: Triggers that apply in at least this many statuses are left out, because they would clutter the diagram.
MANY = 4
#: Omitted triggers: those above, and user requests that aren't part of the normal path of a task.
EVERYWHERE = {
    Trigger.IGNORE,
    *(trigger for trigger in Trigger if sum(trigger is one for _, one in TRANSITIONS) >= MANY),
}


def imports() -> Counter[tuple[str, str]]:
    """Count the imports between packages, including imports inside functions."""
    found = Counter[tuple[str, str]]()
    for file in (TOP / "orchestrator").rglob("*.py"):
        importer = file.relative_to(TOP / "orchestrator").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orchestrator."):
                imported = str(node.module).split(".")[1]
                found[importer, imported] += importer != imported
    return +found


def packages() -> Iterator[str]:
    """Yield a flowchart of the layers, with an arrow for at least OFTEN imports."""
    layer_of = {package: number for number, names in enumerate(LAYERS.values(), 1) for package in names}
    counts = Counter[tuple[int, int]]()
    for (importer, imported), count in imports().items():
        if importer in layer_of and imported in layer_of and layer_of[importer] != layer_of[imported]:
            counts[layer_of[importer], layer_of[imported]] += count
    yield "flowchart TB"
    for level, (layer, names) in enumerate(LAYERS.items(), 1):
        yield f'  L{level}["{level} {layer}: {", ".join(names)}"]'
    for upper in range(1, len(LAYERS) + 1):
        if lower := [f"L{level}" for level in range(1, len(LAYERS) + 1) if counts[upper, level] >= OFTEN]:
            yield f"  L{upper} --> {' & '.join(lower)}"


def task() -> Iterator[str]:
    """Yield a task's state diagram, without cancelled, ignored and adopted tasks."""
    yield "stateDiagram-v2"
    yield "  [*] --> pending"
    labels: dict[tuple[TaskStatus, TaskStatus], list[str]] = {}
    for (before, trigger), after in TRANSITIONS.items():
        if trigger not in EVERYWHERE:
            label = trigger.value.upper() if trigger in MAIN else trigger.value
            labels.setdefault((before, after), []).append(label)
    for (before, after), triggers in labels.items():
        yield f"  {before.value} --> {after.value}: {', '.join(triggers)}"


def render(page: str) -> str:
    """Return the page with both diagrams replaced."""
    for name, lines in (("packages", packages()), ("task", task())):
        block = "\n".join(lines)
        before, mark, rest = page.partition(f"<!-- diagram: {name} -->\n```mermaid\n")
        page = f"{before}{mark}{block}\n```{rest.partition('```')[2]}"
    return page


def main() -> None:
    """Write the page, or check it."""
    page = PAGE.read_text()
    if "--check" in sys.argv:
        sys.exit(render(page) != page)
    PAGE.write_text(render(page))


if __name__ == "__main__":
    main()
