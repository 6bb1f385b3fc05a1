"""Format single values as printable text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.repo.git.change_counts import Changes


#: Characters that are printable to Unicode and show nothing: fillers, blanks, joiners and variation selectors.
_INVISIBLE = re.compile(
    "[\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180d\\u180f\\u2800\\u3164\\ufe00-\\ufe0d\\uffa0\\U000e0100-\\U000e01ef]"
)


def pluralize(count: int, noun: str) -> str:
    """Return a number with its noun, as in `1 task`, `2 tasks` and `no tasks`."""
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def one_line(text: str, limit: int = 300) -> str:
    """Return the first and the last of what may be many lines: what happened, and what was said last of all."""
    lines = [" ".join(line.split()) for line in text.splitlines() if any(map(str.isalnum, line))] or [""]
    words = lines[0] if len(lines) == 1 else f"{lines[0]}: {lines[-1]}"
    return words if len(words) <= limit else f"{words[: limit // 2]} … {words[-limit // 2 :]}"


def printable(text: str, keep: str = "") -> str:
    """Take out what a terminal would obey: text from agents and repositories is shown, never interpreted."""
    if text.isprintable() and (text.isascii() or not _INVISIBLE.search(text)):
        return text
    return "".join(char if _is_visible(char) or char in keep else "\N{REPLACEMENT CHARACTER}" for char in text)


def escape_unprintable(line: str) -> str:
    """Spell out what a terminal would obey, reorder by or not show: `^[` for an escape, `<U+202E>` for an override.

    A tab stays.
    """
    if line.isprintable() and (line.isascii() or not _INVISIBLE.search(line)):
        return line
    return "".join(char if _is_visible(char) or char == "\t" else _escape_character(char) for char in line)


def _is_visible(char: str) -> bool:
    return char.isprintable() and not _INVISIBLE.match(char)


def _escape_character(char: str) -> str:
    return f"^{chr(ord(char) ^ 0x40)}" if ord(char) < 0x20 or char == "\x7f" else f"<U+{ord(char):04X}>"


def format_line_counts(changes: Changes) -> str:
    """Return how many lines were changed, as in `+12 -3`."""
    return f"+{changes.added} -{changes.removed}"
