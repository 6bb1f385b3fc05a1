"""Draw the diagrams of `docs/architecture.md` from the code: the packages, and the path of one task.

    python docs/diagrams.py [--check]

With `--check` the exit code is 1 where the file differs from what the code says.
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
    "engine": ("engine", "builtin", "views"),
    "work": ("sessions", "repo", "locking"),
    "state": ("state",),
    "input and contracts": ("config", "plugins", "project", "hookspecs", "protocols"),
    "foundation": ("system", "domain", "sandbox", "client", "errors", "lazy"),
}
#: Imports between two layers from which on the diagram shows them.
OFTEN = 15
#: Transitions that a task without faults, phases and requests makes.
MAIN = {Trigger.START, Trigger.BUILD, Trigger.CHECK, Trigger.INTEND, Trigger.LAND}
#: Triggers that apply in this many statuses are left out; they would hide the rest.
MANY = 4
#: Triggers that are left out: those above, and others of people that aren't part of the path of a task.
EVERYWHERE = {
    Trigger.IGNORE,
    *(trigger for trigger in Trigger if sum(trigger is one for _, one in TRANSITIONS) >= MANY),
}


def imports() -> Counter[tuple[str, str]]:
    """Count the imports between the packages of `orchestrator`, late ones included."""
    found = Counter[tuple[str, str]]()
    for file in (TOP / "orchestrator").rglob("*.py"):
        importer = file.relative_to(TOP / "orchestrator").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orchestrator."):
                imported = str(node.module).split(".")[1]
                found[importer, imported] += importer != imported
    return +found


def packages() -> Iterator[str]:
    """Yield a flowchart of the layers, with an arrow where one imports another often."""
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
    """Yield a state diagram of a task; cancelled, ignored and adopted tasks are left out."""
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
    """Write the page, or compare it."""
    page = PAGE.read_text()
    if "--check" in sys.argv:
        sys.exit(render(page) != page)
    PAGE.write_text(render(page))


if __name__ == "__main__":
    main()
