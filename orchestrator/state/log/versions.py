"""Read the past from the log: the versions of a document, and all documents as of a commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from orchestrator.errors import RefusedError
from orchestrator.protocols import DocumentVersion, Key, StateSnapshot
from orchestrator.state.log.codec import LogLine, to_version
from orchestrator.state.log.table import DocumentTable, TableEntry


def read_versions(
    entry: TableEntry | None, key: Key, limit: int, line_at: Callable[[int], LogLine | None]
) -> list[DocumentVersion]:
    """Return the newest versions of a document, the newest first; `line_at` returns the line of a commit, or None.

    Each line has the position of the version before.
    """
    versions: list[DocumentVersion] = []
    position = entry.position if entry else 0
    while position and len(versions) < limit:
        line = line_at(position)
        change = next((change for change in line.changes if change.key == key), None) if line else None
        if line is None or change is None:  # pruned or lost
            break
        versions.append(to_version(line, key))
        position = change.previous
    return versions


def rebuild_state(position: int, lines: Iterable[LogLine], first: int = 0) -> StateSnapshot:
    """Return the state right after a commit, from the lines up to it; of those up to `first` some may be missing."""
    table = DocumentTable()
    time = 0.0
    for line in lines:
        if line.position > position:
            break
        table.apply(line)
        time = line.time
    table.position = max(table.position, min(first, position))
    if table.position < position:
        raise RefusedError(f"the newest commit is {table.position}, there is no {position} yet", "name an earlier one")
    return StateSnapshot(table.position, time, table.all_documents(time))
