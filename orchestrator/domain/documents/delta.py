"""The difference between two versions of a document, by the path of what differs; for display and export.

Objects are walked. A list is walked, too, item by item from the first, if all that it holds are objects, before as
after: such lists are records, which grow at the end and change in place. Any other list is one value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from orchestrator.errors import RefusedError

Path = tuple[str | int, ...]
"""The names of members and the indexes of items that lead to a value; the document itself has the empty path."""

#: Characters of a value that are shown; of longer ones the middle is left out.
MAX_SHOWN_CHARS: Final = 60

_PLAIN_NAME: Final = re.compile(r"[\w-]+")


class Modified(NamedTuple):
    """A value before and after."""

    old: Any
    new: Any


@dataclass(frozen=True, slots=True)
class Delta:
    """What was added, modified and removed, each by its path and in the order of the documents.

    What was added or removed as a whole is there once, with all that it holds.
    """

    added: Mapping[Path, Any]
    modified: Mapping[Path, Modified]
    removed: Mapping[Path, Any]


class _Absent:
    """What stands for a value where there is none."""


_ABSENT: Final = _Absent()


def compute_delta(old: dict[str, Any], new: dict[str, Any]) -> Delta:
    """Return the difference between two plain JSON objects; for a document that is not there take `{}`.

    The order of members is no difference; that between `1`, `1.0` and `true` is one.
    """
    found = dict(_walk((), old, new))
    return Delta(
        {path: one.new for path, one in found.items() if one.old is _ABSENT},
        {path: one for path, one in found.items() if _ABSENT not in (one.old, one.new)},
        {path: one.old for path, one in found.items() if one.new is _ABSENT},
    )


def apply_delta(old: dict[str, Any], delta: Delta) -> dict[str, Any]:
    """Return the new version, made from the old one, which stays as it is.

    Raises RefusedError where the delta was not made from `old`.
    """
    made = deepcopy(old)
    for path, value in reversed(list(delta.removed.items())):  # the last item of a list first
        _set(made, path, value, _ABSENT)
    for path, (before, after) in delta.modified.items():
        _set(made, path, before, after)
    for path, value in delta.added.items():
        _set(made, path, _ABSENT, value)
    return made


def revert_delta(new: dict[str, Any], delta: Delta) -> dict[str, Any]:
    """Return the old version, made from the new one, which stays as it is. Raises RefusedError as `apply` does."""
    turned = {path: Modified(after, before) for path, (before, after) in delta.modified.items()}
    return apply_delta(new, Delta(delta.removed, turned, delta.added))


def format_delta(delta: Delta, longest: int = MAX_SHOWN_CHARS) -> list[str]:
    """Return a line for each change, `path: old → new`, in order of the paths.

    Values are JSON, of which at most `longest` characters are shown; `absent`, without quotes, is no value.
    """
    changes: dict[Path, Modified] = {
        **{path: Modified(_ABSENT, value) for path, value in delta.added.items()},
        **delta.modified,
        **{path: Modified(value, _ABSENT) for path, value in delta.removed.items()},
    }
    return [
        f"{format_path(path)}: {_shown(changes[path].old, longest)} → {_shown(changes[path].new, longest)}"
        for path in sorted(changes)
    ]


def delta_to_json(delta: Delta) -> dict[str, Any]:
    """Return the delta as a plain JSON object of lists: `added`, `modified`, `removed`; a path is a list, too."""
    return {
        "added": [{"path": list(path), "new": value} for path, value in delta.added.items()],
        "modified": [{"path": list(path), "old": old, "new": new} for path, (old, new) in delta.modified.items()],
        "removed": [{"path": list(path), "old": value} for path, value in delta.removed.items()],
    }


def format_path(path: Path) -> str:
    """Return a path as people read it, as in `attempts[0].reason`; names with other characters are quoted."""
    words = [f"[{step}]" if isinstance(step, int) else f".{_shown_name(step)}" for step in path]
    return "".join(words).removeprefix(".")


def _walk(path: Path, old: Any, new: Any) -> Iterator[tuple[Path, Modified]]:
    one, other = _children(old), _children(new)
    # An empty object and an empty list have the same children, which are none.
    if type(old) is type(new) and one is not None and other is not None:
        for step in {**one, **other}:
            yield from _walk((*path, step), one.get(step, _ABSENT), other.get(step, _ABSENT))
    elif not _same(old, new):
        yield path, Modified(old, new)


def _children(value: Any) -> dict[str | int, Any] | None:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else None


def _same(old: Any, new: Any) -> bool:
    if _ABSENT in (old, new):
        return False
    # To Python 1, 1.0 and True are equal; their texts are not.
    return json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)


def _set(document: dict[str, Any], path: Path, old: Any, new: Any) -> None:
    """Replace what is at a path by a copy of `new`; either may be absent."""
    place: Any = document
    for step in path[:-1]:
        place = _at(place, step)
    step, found = path[-1], _at(place, path[-1])
    remedy = "apply a delta only to the version that it was made from"
    if found is not old and not _same(found, old):
        raise RefusedError(
            f"{format_path(path)} is {_shown(found, MAX_SHOWN_CHARS)}, not {_shown(old, MAX_SHOWN_CHARS)}", remedy
        )
    if not _has_room(place, step, old, new):
        where = format_path(path)
        raise RefusedError(f"there is no place for {where}" if old is _ABSENT else f"{where} is not the last", remedy)
    if new is _ABSENT:
        del place[step]
    elif isinstance(place, list) and old is _ABSENT:
        place.append(deepcopy(new))
    else:
        place[step] = deepcopy(new)


def _has_room(place: Any, step: str | int, old: Any, new: Any) -> bool:
    if isinstance(place, list) and _ABSENT in (old, new):  # lists grow and shrink at their end
        return step == len(place) - (new is _ABSENT)
    return isinstance(place, dict) == isinstance(step, str)


def _at(place: Any, step: str | int) -> Any:
    if isinstance(place, list) and isinstance(step, int):
        return place[step] if step < len(place) else _ABSENT
    return place.get(step, _ABSENT) if isinstance(place, dict) else _ABSENT


def _shown(value: Any, longest: int) -> str:
    text = "absent" if value is _ABSENT else _text(value)
    if len(text) <= longest:
        return text
    head, tail = longest * 2 // 3, longest - longest * 2 // 3 - 1
    return f"{text[:head]}…{text[len(text) - tail :]}"


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)


def _shown_name(name: str) -> str:
    return name if _PLAIN_NAME.fullmatch(name) else _text(name)
