"""Single values as printable text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from orchestrator.repo.git.change_counts import Changes

#: Characters that Unicode defines as printable but that are invisible: fillers, blanks, joiners, variation selectors.
_INVISIBLE = re.compile(
    "[\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180d\\u180f\\u2800\\u3164\\ufe00-\\ufe0d\\uffa0\\U000e0100-\\U000e01ef]"
)


def pluralize(count: int, noun: str) -> str:
    """Return a number with its noun, for example `1 task`, `2 tasks` and `no tasks`."""
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def one_line(text: str, limit: int = 300) -> str:
    """Return the first and last line of text as one line, up to `limit` characters."""
    lines = [" ".join(line.split()) for line in text.splitlines() if any(map(str.isalnum, line))] or [""]
    words = lines[0] if len(lines) == 1 else f"{lines[0]}: {lines[-1]}"
    if len(words) <= limit:
        return words
    head, tail = words[: limit // 2], words[-limit // 2 :]
    return f"{head.rpartition(' ')[0] or head} … {tail.partition(' ')[2] or tail}"  # cut between words


def printable(text: str, keep: str = "") -> str:
    """Return text with control and invisible characters replaced, except `keep`.

    Agents and repositories may write any text: a terminal must not interpret it.
    """
    if text.isprintable() and (text.isascii() or not _INVISIBLE.search(text)):
        return text
    return "".join(char if _is_visible(char) or char in keep else "\N{REPLACEMENT CHARACTER}" for char in text)


def escape_unprintable(line: str) -> str:
    """Return a line with unprintable characters escaped, such as `^[` or `<U+202E>`.

    These are control, bidirectional and invisible characters. Tabs are kept.
    """
    if line.isprintable() and (line.isascii() or not _INVISIBLE.search(line)):
        return line
    return "".join(char if _is_visible(char) or char == "\t" else _escape_character(char) for char in line)


def _is_visible(char: str) -> bool:
    return char.isprintable() and not _INVISIBLE.match(char)


def _escape_character(char: str) -> str:
    return f"^{chr(ord(char) ^ 0x40)}" if ord(char) < 0x20 or char == "\x7f" else f"<U+{ord(char):04X}>"


def format_line_counts(changes: Changes) -> str:
    """Return the number of added and removed lines, for example `+12 -3`."""
    return f"+{changes.added} -{changes.removed}"


COLUMNS = 80
"""The maximum width of a line in terminal cells, except for longer words such as commands and paths."""
#: The maximum width of a name in a table.
_LONGEST_NAME = 24
#: Words that are never broken; a command in backticks is one word.
_WORDS = re.compile(r"[^\s`]*`[^`]*`\S*|\S+")
_AFTER_AND = re.compile(r"(?<=&&) ")


def short_name(name: str) -> str:
    """Return a name shortened in the middle, for a table. Not for commands."""
    if _width(name) <= _LONGEST_NAME:
        return name
    half = _LONGEST_NAME // 2
    return f"{set_cell_size(name, half).rstrip()}…{set_cell_size(name[::-1], half - 1).rstrip()[::-1]}"


def _width(text: str) -> int:
    """Return the number of cells of printable text."""
    return len(text) if text.isascii() else cell_len(text)  # most text is ASCII, which needs no table


def wrapped(text: str, *, head: str = "", indent: str = "") -> Iterator[str]:
    """Yield text wrapped between words, the first line after `head`, others indented.

    Never breaks a path, or a command in backticks, except after the `&&` of commands that don't fit on a line.
    """
    words = _WORDS.findall(text) if "`" in text else text.split()
    words = [part for word in words for part in split_commands(word, indent)]
    whole = head + " ".join(words)
    if _width(whole) <= COLUMNS:
        words, head = [], whole
    line, gap = head, ""
    for word in words:
        if line and _width(f"{line}{gap}{word}") > COLUMNS:
            yield line.rstrip()
            line, gap = indent, ""
        line, gap = f"{line}{gap}{word}", " "
    if line:
        yield line.rstrip()


def split_commands(text: str, indent: str = "") -> Sequence[str]:
    """Split commands joined by `&&` that don't fit on a line; a shell accepts the lines as they are."""
    return [text] if _width(f"{indent}{text}") <= COLUMNS else _AFTER_AND.split(text)


def described(rows: Sequence[Sequence[str]], indent: str = "") -> Iterator[str]:
    """Yield rows in columns; the last column is prose and wraps."""
    heads = align_columns([[*row[:-1], "|"] for row in rows], indent)
    for row, head in zip(rows, heads, strict=True):
        first, text = head.removesuffix("|"), printable(row[-1])
        if _width(f"{first}{text}") <= COLUMNS:  # as it is, for example indented
            yield f"{first}{text}".rstrip()
        else:
            yield from wrapped(text, head=first, indent=f"{indent}    ")


def align_columns(rows: Sequence[Sequence[str]], indent: str = "") -> Iterator[str]:
    """Yield a printable line for each row; rows may have fewer columns."""
    shown = [list(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip_longest(*shown, fillvalue="")]
    for row in shown:
        yield f"{indent}{'  '.join(map(str.ljust, row, widths))}".rstrip()


def truncate_end(text: str, width: int) -> str:
    """Return text cut at its end to a width in terminal cells."""
    return text if cell_len(text) <= width else f"{set_cell_size(text, max(width - 1, 0))}…"[:width]


def truncate_start(text: str, width: int) -> str:
    """Return text cut at its start to a width in terminal cells."""
    return text if cell_len(text) <= width else f"…{set_cell_size(text[::-1], width - 1)[::-1]}"


def format_elapsed(seconds: float) -> str:
    """Return a duration in seconds in the format of a clock, such as 0:42, 12:03 or 1:02:03."""
    whole = max(int(seconds), 0)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def format_age(time: float, now: float) -> str:
    """Return the age of a point in time, for example `0:42 ago`."""
    return f"{format_elapsed(now - time)} ago"


def format_count(number: int) -> str:
    """Return a number in short form, such as 950, 12.3k or 4.5M."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
