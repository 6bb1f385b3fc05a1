"""Apply and revert deltas, to test that they are complete."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from orchestrator.domain.documents.delta import Delta, Modified, Path


def apply_delta(old: dict[str, Any], delta: Delta) -> dict[str, Any]:
    """Return the new version of a document."""
    made = deepcopy(old)
    for path in reversed(list(delta.removed)):  # the last item of a list first
        del _container(made, path)[path[-1]]
    for path, (_, after) in delta.modified.items():
        _container(made, path)[path[-1]] = after
    for path, value in delta.added.items():
        container = _container(made, path)
        if isinstance(container, list):
            assert path[-1] == len(container), "lists grow at their end"
            container.append(value)
        else:
            assert path[-1] not in container
            container[path[-1]] = value
    return made


def revert_delta(new: dict[str, Any], delta: Delta) -> dict[str, Any]:
    """Return the old version of a document."""
    inverted = {path: Modified(after, before) for path, (before, after) in delta.modified.items()}
    return apply_delta(new, Delta(delta.removed, inverted, delta.added))


def _container(document: Any, path: Path) -> Any:
    for step in path[:-1]:
        document = document[step]
    return document
