"""Verify the resolution of a merge conflict, without trusting its author.

A resolution may only fill the hunks that git could not merge. Each hunk must have the changes of both sides and
nothing else: no side is dropped, no line is invented, no marker remains, and everything else is as git merged it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: The largest hunk to verify: lines of one side, and bytes of all.
_MAX_LINES = 2_000
_MAX_BYTES = 100_000
#: Words, other characters, line ends and indentation; the amount of other spaces is not compared.
_TOKEN = re.compile(rb"(?m)^[ \t]+|\w+|\n|[^\w\s]")
_MARKERS = (b"<<<<<<< ", b"||||||| ", b">>>>>>> ")


@dataclass(frozen=True, slots=True)
class ConflictHunk:
    """The lines of a hunk that git could not merge, without line ends."""

    base: tuple[bytes, ...]
    ours: tuple[bytes, ...]
    theirs: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ConflictingFile:
    """A file that git merged in part: `merged` has the lines before, between and after the hunks."""

    merged: tuple[tuple[bytes, ...], ...]
    hunks: tuple[ConflictHunk, ...]


def parse_conflicting_file(text: bytes, marker_size: int) -> ConflictingFile:
    """Return the parts of the output of `git merge-file --diff3`; no line of the file may look like its markers."""
    merged: list[tuple[bytes, ...]] = []
    hunks: list[ConflictHunk] = []
    parts: list[list[bytes]] = [[]]
    marks = [sign * marker_size for sign in (b"<", b"|", b"=", b">")]
    for line in text.split(b"\n"):
        match next((number for number, mark in enumerate(marks) if line.startswith(mark)), None):
            case None:
                parts[-1].append(line)
            case 3:
                before, ours, base, theirs = map(tuple, parts)
                merged.append(before)
                hunks.append(ConflictHunk(base, ours, theirs))
                parts = [[]]
            case _:
                parts.append([])
    return ConflictingFile((*merged, tuple(parts[0])), tuple(hunks))


def find_resolution_problem(file: ConflictingFile, resolved: bytes) -> str | None:
    """Return the reason to reject the resolution of a file, or None."""
    lines = resolved.split(b"\n")
    expected = {line for part in file.merged for line in part}
    expected |= {line for hunk in file.hunks for line in (*hunk.ours, *hunk.theirs)}
    if any(line.startswith(_MARKERS) and line not in expected for line in lines):
        return "a conflict marker remains"
    if not all(map(_is_comparable, file.hunks)):
        return "a hunk is too large to verify"
    first, *others = file.merged
    starts = {len(first)} if tuple(lines[: len(first)]) == first else set[int]()
    for hunk, after in zip(file.hunks, others, strict=True):
        length = len(hunk.base) + len(hunk.ours) + len(hunk.theirs)
        starts = {
            end + len(after)
            for start in starts
            for end in range(start, min(start + length, len(lines)) + 1)
            if tuple(lines[end : end + len(after)]) == after and _has_both_sides(hunk, lines[start:end])
        }
    return None if len(lines) in starts else "it drops a change of one side, or changes something else"


def _is_comparable(hunk: ConflictHunk) -> bool:
    sides = hunk.base, hunk.ours, hunk.theirs
    return max(map(len, sides)) <= _MAX_LINES and sum(len(line) for side in sides for line in side) <= _MAX_BYTES


def _has_both_sides(hunk: ConflictHunk, region: Sequence[bytes]) -> bool:
    if sum(map(len, region)) > _MAX_BYTES:
        return False
    if _combines(hunk.base, hunk.ours, hunk.theirs, region, are_lines=True):
        return True
    # Both sides changed the same line: each word of both changes must be there, and no other.
    sides = (hunk.base, hunk.ours, hunk.theirs, region)
    base, ours, theirs, resolved = (_TOKEN.findall(b"\n".join(side)) for side in sides)
    return _combines(base, ours, theirs, resolved, are_lines=False)


def _combines(
    base: Sequence[bytes], ours: Sequence[bytes], theirs: Sequence[bytes], resolved: Sequence[bytes], *, are_lines: bool
) -> bool:
    """Return True if `resolved` has the additions and removals of both sides, in their order, and nothing else.

    Empty lines don't count, and the same addition or removal of lines by both sides may count once.
    """
    before, one, other, found = map(Counter, (base, ours, theirs, resolved))
    for item in before | one | other | found:
        if are_lines and not item.strip():
            continue
        first, second = one[item] - before[item], other[item] - before[item]
        low = high = max(before[item] + first + second, 0)
        if are_lines and first * second > 0:
            low, high = sorted((low, before[item] + (max if first > 0 else min)(first, second)))
        if not low <= found[item] <= high:
            return False
    # What the other side removes may be missing, everything else is in the order of each side.
    sides = ((ours, before - other), (theirs, before - one))
    return all(
        _is_subsequence((item for item in side if item not in removed and (item.strip() or not are_lines)), resolved)
        for side, removed in sides
    )


def _is_subsequence(items: Iterable[bytes], sequence: Sequence[bytes]) -> bool:
    rest = iter(sequence)
    return all(item in rest for item in items)
