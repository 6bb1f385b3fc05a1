"""What differs between two versions of a document, field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any, Final

from orchestrator.cli.output import plain
from orchestrator.protocols import JsonObject

_ABSENT: Final = object()
#: Characters of a value that are shown.
_LONGEST: Final = 60


def field_changes(old: JsonObject | None, new: JsonObject | None) -> JsonObject:
    """Return lists of what was `added`, `modified` and `removed`, each with its path; None stands for no document."""
    told: dict[str, list[JsonObject]] = {"added": [], "modified": [], "removed": []}
    for path, before, after in _walk((), old or {}, new or {}):
        kind = "added" if before is _ABSENT else "removed" if after is _ABSENT else "modified"
        values = {name: value for name, value in (("old", before), ("new", after)) if value is not _ABSENT}
        told[kind].append({"path": list(path), **values})
    return told


def field_lines(old: JsonObject | None, new: JsonObject | None) -> list[str]:
    """Return a line for each field that differs, `path: old → new`, as text that a terminal only shows."""
    return [
        plain(f"{_place(path)}: {_shown(before)} → {_shown(after)}")
        for path, before, after in sorted(_walk((), old or {}, new or {}), key=itemgetter(0))
    ]


def _walk(path: tuple[str | int, ...], old: Any, new: Any) -> Iterator[tuple[tuple[str | int, ...], Any, Any]]:
    before, after = _children(old), _children(new)
    if before is not None and after is not None and type(old) is type(new):
        for step in {**before, **after}:
            yield from _walk((*path, step), before.get(step, _ABSENT), after.get(step, _ABSENT))
    elif old != new:
        yield path, old, new


def _children(value: Any) -> dict[str | int, Any] | None:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else None


def _place(path: Sequence[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _shown(value: Any) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST * 2 // 3]}…{text[-_LONGEST // 3 + 1 :]}"
