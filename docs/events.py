"""Write the tables of `docs/events.md` from the event classes.

    python docs/events.py [--check]

With `--check` the exit code is 1 if the page differs from the classes.
"""

# ruff: noqa: INP001  a script

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from orchestrator.cli.commands.setup.schema import event_schema
from orchestrator.domain.events import EVENT_TYPES, TypedEvent, coordination, phases, runs, state, tasks
from orchestrator.protocols import JsonObject

PAGE = Path(__file__).parent / "events.md"
#: The tables of the page by the name of their marker.
TOPICS = {"runs": runs, "tasks": tasks, "phases": phases, "coordination": coordination, "state": state}
#: Fields that the page explains above the tables.
COMMON = {"run", "task", "attempt"}


def table(module: ModuleType, schemas: Mapping[str, JsonObject]) -> Iterator[str]:
    """Yield the lines of the table of a module's events."""
    yield "| event | when | further fields |"
    yield "|---|---|---|"
    for event in EVENT_TYPES.values():
        if event.__module__ == module.__name__:
            yield f"| `{event.type}` | {on_one_line(event.__doc__)} | {', '.join(fields(event, schemas[event.type]))} |"


def fields(event: type[TypedEvent], schema: JsonObject) -> Iterator[str]:
    """Yield the fields of an event and their descriptions; `?` marks optional ones."""
    for name in event.field_types:
        if name not in COMMON or (name == "run" and name not in event.context):
            text = on_one_line(schema["properties"][name].get("description"))
            text = text[:1].lower() + text[1:] if text[1:2].islower() else text
            yield f"`{name}`{'' if name in schema['required'] else '?'}{f' ({text})' if text else ''}"


def on_one_line(docstring: str | None) -> str:
    """Return a docstring on one line, without the final period."""
    return " ".join((docstring or "").split()).removesuffix(".")


def rendered(page: str) -> str:
    """Return the page with all tables written again."""
    schemas = {schema["title"]: schema for schema in event_schema()["anyOf"]}
    for topic, module in TOPICS.items():
        start, end = f"<!-- events: {topic} -->\n", "<!-- end -->"
        head, rest = page.split(start)
        page = head + start + "\n".join(table(module, schemas)) + "\n" + rest[rest.index(end) :]
    return page


def main() -> int:
    """Write the page, or check it."""
    page = PAGE.read_text()
    if "--check" in sys.argv:
        return int(rendered(page) != page)
    PAGE.write_text(rendered(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
