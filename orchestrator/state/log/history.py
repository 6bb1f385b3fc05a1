"""What the log knows of the past: the versions of a document, and all documents as of a commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from orchestrator.errors import RefusedError
from orchestrator.protocols import Key, State, Version
from orchestrator.state.log.codec import Line, to_version
from orchestrator.state.log.table import Entry, Table


def versions(entry: Entry | None, key: Key, limit: int, line_at: Callable[[int], Line | None]) -> list[Version]:
    """Return the newest versions of a document, the newest first; `line_at` gives the line of a commit, if it is there.

    Each line says where the version before was written.
    """
    found: list[Version] = []
    position = entry.position if entry else 0
    while position and len(found) < limit:
        line = line_at(position)
        change = next((change for change in line.changes if change.key == key), None) if line else None
        if line is None or change is None:  # no longer kept, or lost
            break
        found.append(to_version(line, key))
        position = change.previous
    return found


def state_at(position: int, lines: Iterable[Line], first: int = 0) -> State:
    """Return the state right after a commit, from the lines up to it; of those up to `first` some may be missing."""
    table = Table()
    time = 0.0
    for line in lines:
        if line.position > position:
            break
        table.apply(line)
        time = line.time
    table.position = max(table.position, min(first, position))
    if table.position < position:
        raise RefusedError(f"the newest commit is {table.position}, there is no {position} yet", "name an earlier one")
    return State(table.position, time, table.all_documents(time))
