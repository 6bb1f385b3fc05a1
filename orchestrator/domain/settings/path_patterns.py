"""Path patterns of owned paths: matching, and overlap between patterns.

    src/models.py    this path, and all paths below it if it is a folder
    src/             a folder: all paths in it, same as `src/**`
    docs/*.md        `*` is any number of characters, `?` is one; neither matches `/`
    [ab] [a-z] [!a]  one character of a set, or not of a set
    **/test_*.py     `**` is any number of whole segments, including none

Paths are relative, with `/` between segments, and compared character by character. `is_match` and `has_overlap` answer
the same question: whether two patterns have a common path. It takes time proportional to the product of their lengths.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from orchestrator.errors import InvalidValue

#: A set of characters as ranges of code points, both ends included.
_Characters = tuple[tuple[int, int], ...]
#: A segment with wildcards: sets of characters; None is any number of characters.
_Wild = tuple[_Characters | None, ...]

_ANY: _Characters = ((1, ord("/") - 1), (ord("/") + 1, sys.maxunicode))
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class _Pattern:
    segments: tuple[str | _Wild | None, ...]
    """Literal segments as text; None is any number of segments."""
    prefix: str
    """The literal prefix of every matching path."""


def check_pattern(text: str) -> str:
    """Return a pattern unchanged; raise InvalidValue if it is invalid."""
    if "\\" in text:
        raise InvalidValue("it contains a backslash", "separate segments with `/`, and write `[*]` for a star")
    for segment in split_path(text):
        if "**" in segment and segment != "**":
            raise InvalidValue(f"`**` is only part of {segment!r}", "make it a whole segment, or write `*`")
        _parse_segment(segment)
    return text


def split_path(path: str) -> list[str]:
    """Return the segments of a repository path; raise InvalidValue if invalid.

    A trailing slash marks a folder, and adds no segment.
    """
    for is_invalid, message, remedy in (
        (not path, "the path is empty", "write the path of a file or folder"),
        ("\0" in path, "it contains a NUL character", "remove it"),
        ("\\" in path, "it contains a backslash", "separate segments with `/`"),
        (path.startswith("/"), "the path is absolute", "write it relative to the root of the repository"),
    ):
        if is_invalid:
            raise InvalidValue(message, remedy)
    segments = path.removesuffix("/").split("/")
    for segment in segments:
        if segment in {"", ".", ".."}:
            raise InvalidValue(f"it contains the segment {segment!r}", "write the path without it")
    return segments


def is_match(pattern: str, path: str) -> bool:
    """Return whether a path, as printed by git, matches a pattern."""
    compiled = _compile(pattern)
    return path.startswith(compiled.prefix) and _meet(compiled.segments, path.split("/"), _segments_meet)


def has_overlap(left: str, right: str) -> bool:
    """Return whether any path can match both patterns."""
    a, b = _compile(left), _compile(right)
    if not (a.prefix.startswith(b.prefix) or b.prefix.startswith(a.prefix)):
        return False
    return left == right or _meet(a.segments, b.segments, _segments_meet)


def has_any_overlap(left: Sequence[str], right: Sequence[str]) -> bool:
    """Return whether any pattern of one list overlaps with any of the other."""
    return any(has_overlap(a, b) for a in left for b in right)


def find_out_of_scope(owned: Sequence[str], paths: Iterable[str]) -> list[str]:
    """Return the paths that match no owned pattern."""
    return [path for path in paths if not any(is_match(pattern, path) for pattern in owned)]


def is_covered(pattern: str, owned: Sequence[str]) -> bool:
    """Return whether a single owned pattern matches every path that a pattern matches.

    A path without wildcards counts as a file. Coverage by several owned patterns together is not detected.
    """
    inner = _compile(pattern).segments
    is_file = _WILDCARD.search(pattern) is None and not pattern.endswith("/")
    variants = [inner, inner[:-1]] if is_file else [inner]
    return any(_covers(_compile(outer).segments, variant, _segment_covers) for outer in owned for variant in variants)


def literal_prefix(pattern: str) -> str:
    """Return the literal prefix of all matches.

    Patterns overlap only if one prefix starts with the other.
    """
    return _compile(pattern).prefix


@lru_cache(maxsize=1 << 16)
def _compile(text: str) -> _Pattern:
    check_pattern(text)
    wildcard = _WILDCARD.search(text)
    prefix = text if wildcard is None else text[: wildcard.start()]
    whole = wildcard is None or text.endswith("/")
    segments = tuple(_parse_segment(segment) for segment in text.removesuffix("/").split("/"))
    return _Pattern((*segments, None) if whole else segments, prefix.rstrip("/"))


def _parse_segment(text: str) -> str | _Wild | None:
    if text == "**":
        return None
    if _WILDCARD.search(text) is None:
        return text
    # A segment has at least one character, even if it consists of stars.
    tokens: list[_Characters | None] = [] if text.strip("*") else [_ANY]
    at = 0
    while at < len(text):
        if text[at] == "[":
            characters, at = _parse_set(text, at)
            tokens.append(characters)
            continue
        tokens.append({"*": None, "?": _ANY}.get(text[at], _literal(text[at])))
        at += 1
    return tuple(tokens)


def _parse_set(text: str, start: int) -> tuple[_Characters, int]:
    """Return the set that opens at `start`, which may contain `]` first, and its end."""
    first = start + 1 + (text[start + 1 : start + 2] in {"!", "^"})
    end = text.find("]", first + 1)
    if end < 0:
        raise InvalidValue(f"the set {text[start:]!r} is not closed by `]`", "close it, or write `[[]` for a bracket")
    ranges: list[tuple[int, int]] = []
    at = first
    while at < end:
        low = high = text[at]
        if text[at + 1] == "-" and at + 2 < end:
            high, at = text[at + 2], at + 2
        if low > high:
            raise InvalidValue(f"the range {low}-{high} is empty", "write the smaller character first")
        ranges.append((ord(low), ord(high)))
        at += 1
    within = _without(_ANY, ranges) if first > start + 1 else _without(_ANY, _without(_ANY, ranges))
    return within, end + 1


def _without(characters: _Characters, taken: Sequence[tuple[int, int]]) -> _Characters:
    left = list(characters)
    for low, high in taken:
        parts = [((a, min(b, low - 1)), (max(a, high + 1), b)) for a, b in left]
        left = [(a, b) for pair in parts for a, b in pair if a <= b]
    return tuple(left)


def _literal(character: str) -> _Characters:
    return ((ord(character), ord(character)),)


def _segments_meet(a: str | _Wild, b: str | _Wild) -> bool:
    if isinstance(a, str) and isinstance(b, str):
        return a == b
    return _meet(_tokens(a), _tokens(b), _characters_meet)


def _tokens(segment: str | _Wild) -> _Wild:
    return tuple(map(_literal, segment)) if isinstance(segment, str) else segment


def _characters_meet(a: _Characters, b: _Characters) -> bool:
    return any(low <= top and bottom <= high for low, high in a for bottom, top in b)


def _meet(left: Sequence[object], right: Sequence[object], meet: Callable[[Any, Any], bool]) -> bool:
    """Return whether two sequences can match the same path; None matches any number of segments."""
    rows = len(right)
    below = [all(one is None for one in right[at:]) for at in range(rows + 1)]
    for a in reversed(left):
        row = [a is None and below[rows]] * (rows + 1)
        for at in range(rows - 1, -1, -1):
            b = right[at]
            if a is None or b is None:
                row[at] = below[at] or row[at + 1]
            else:
                row[at] = below[at + 1] and meet(a, b)
        below = row
    return below[0]


def _segment_covers(outer: str | _Wild, inner: str | _Wild) -> bool:
    is_any = not isinstance(outer, str) and outer[0] == _ANY and set(outer[1:]) == {None}
    return is_any or _covers(_tokens(outer), _tokens(inner), _characters_cover)


def _characters_cover(outer: _Characters, inner: _Characters) -> bool:
    return not _without(inner, outer)


def _covers(outer: Sequence[object], inner: Sequence[object], covers: Callable[[Any, Any], bool]) -> bool:
    """Return whether one sequence covers another; False if unproven part by part."""
    columns = len(inner)
    below = [False] * columns + [True]
    for a in reversed(outer):
        row = [a is None and below[columns]] * (columns + 1)
        for at in range(columns - 1, -1, -1):
            b = inner[at]
            row[at] = below[at] or row[at + 1] if a is None else b is not None and below[at + 1] and covers(a, b)
        below = row
    return below[0]
