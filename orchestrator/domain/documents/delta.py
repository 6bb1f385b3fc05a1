"""Compute and format the difference between two versions of a document.

Objects are compared member by member. Lists are compared item by item if all items of both versions are objects: such
lists are records that grow at the end and change in place. Any other list is compared as one value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final, NamedTuple

Path = tuple[str | int, ...]
"""Member names and item indexes that lead to a value; the document itself has the empty path."""

#: The maximum length of a displayed value in characters; longer values are shortened in the middle.
MAX_SHOWN_CHARS: Final = 60

_PLAIN_NAME: Final = re.compile(r"[\w-]+")


class Modified(NamedTuple):
    """A value before and after."""

    old: Any
    new: Any


@dataclass(frozen=True, slots=True)
class Delta:
    """Added, modified and removed values by path, in document order.

    A subtree that was added or removed as a whole is one entry.
    """

    added: Mapping[Path, Any]
    modified: Mapping[Path, Modified]
    removed: Mapping[Path, Any]


class _Absent:
    """The type of the marker for a missing value."""


_ABSENT: Final = _Absent()


def compute_delta(old: dict[str, Any], new: dict[str, Any]) -> Delta:
    """Return the difference between two plain JSON objects.

    `{}` represents a missing document. The order of members does not matter; `1`, `1.0` and `true` are different.
    """
    changes = dict(_walk((), old, new))
    return Delta(
        {path: change.new for path, change in changes.items() if change.old is _ABSENT},
        {path: change for path, change in changes.items() if _ABSENT not in (change.old, change.new)},
        {path: change.old for path, change in changes.items() if change.new is _ABSENT},
    )


def format_delta(delta: Delta, longest: int = MAX_SHOWN_CHARS) -> list[str]:
    """Return a line per change, `path: old → new`, sorted by path.

    Values are JSON with at most `longest` characters; `absent`, without quotes, means a missing value.
    """
    changes: dict[Path, Modified] = {
        **{path: Modified(_ABSENT, value) for path, value in delta.added.items()},
        **delta.modified,
        **{path: Modified(value, _ABSENT) for path, value in delta.removed.items()},
    }
    return [
        f"{format_path(path)}: {_format_value(change.old, longest)} → {_format_value(change.new, longest)}"
        for path, change in sorted(changes.items(), key=itemgetter(0))
    ]


def delta_to_json(delta: Delta) -> dict[str, Any]:
    """Return the delta as a JSON object with the lists `added`, `modified`, `removed`.

    Paths are lists.
    """
    return {
        "added": [{"path": list(path), "new": value} for path, value in delta.added.items()],
        "modified": [{"path": list(path), "old": old, "new": new} for path, (old, new) in delta.modified.items()],
        "removed": [{"path": list(path), "old": value} for path, value in delta.removed.items()],
    }


def format_path(path: Path) -> str:
    """Return a path as text, such as `attempts[0].reason`, with odd names quoted."""
    words = [f"[{step}]" if isinstance(step, int) else f".{_format_name(step)}" for step in path]
    return "".join(words).removeprefix(".")


def _walk(path: Path, old: Any, new: Any) -> Iterator[tuple[Path, Modified]]:
    before, after = _children(old), _children(new)
    # Types are compared, because an empty object and an empty list both have no children.
    if type(old) is type(new) and before is not None and after is not None:
        for step in {**before, **after}:
            yield from _walk((*path, step), before.get(step, _ABSENT), after.get(step, _ABSENT))
    elif not _same(old, new):
        yield path, Modified(old, new)


def _children(value: Any) -> dict[str | int, Any] | None:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else None


def _same(old: Any, new: Any) -> bool:
    if _ABSENT in (old, new):
        return False
    # In Python, 1 == 1.0 == True; their JSON texts differ.
    return json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)


def _format_value(value: Any, longest: int) -> str:
    text = "absent" if value is _ABSENT else _text(value)
    if len(text) <= longest:
        return text
    head, tail = longest * 2 // 3, longest - longest * 2 // 3 - 1
    return f"{text[:head]}…{text[len(text) - tail :]}"


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)


def _format_name(name: str) -> str:
    return name if _PLAIN_NAME.fullmatch(name) else _text(name)
