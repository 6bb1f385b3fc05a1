"""The text of tools and plans in logs: shortened output, changed lines of edits, and steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import unified_diff
from typing import Any, Final

#: Maximum characters of a tool's output or of an edit: the rest is in the original output.
MAX_TOOL_CHARS: Final = 4_000
#: Texts with more lines are not compared, which would be slow: all of their lines count as changed.
_MAX_COMPARED: Final = 500
#: The usual names of the replaced and the new text in the arguments of tools that edit files.
_BEFORE: Final = ("old_string", "oldString", "old_str", "old_text", "oldText")
_AFTER: Final = ("new_string", "newString", "new_str", "new_text", "newText", "content", "file_text", "new_source")
#: The marks of steps by status, in the words of several programs.
_MARKS: Final = {"completed": "x", "done": "x", "cancelled": "-", "in_progress": ">"}


def plan_text(steps: Iterable[tuple[str, str]]) -> str:
    """Return the steps of a plan, given as pairs of words and status, one per line."""
    return "\n".join(f"[{_MARKS.get(status, ' ')}] {' '.join(words.split())}" for words, status in steps)


def shorten(text: str) -> str:
    """Return a text without its middle if it is too long, with whole lines where possible."""
    text = text.strip("\n")
    if len(text) <= MAX_TOOL_CHARS:
        return text
    half = MAX_TOOL_CHARS // 2
    head, tail = text[:half], text[-half:]
    head, tail = head.rpartition("\n")[0] or head, tail.partition("\n")[2] or tail
    return f"{head}\n[{len(text) - len(head) - len(tail)} characters omitted]\n{tail}"


def edit_diff(before: str, after: str) -> str:
    """Return the changed lines of an edit after `+` or `-`, with a line around them."""
    old, new = before.splitlines(), after.splitlines()
    if not before or not after or len(old) + len(new) > _MAX_COMPARED:
        lines = [*(f"-{line}" for line in old), *(f"+{line}" for line in new)]
    else:
        lines = [line for line in [*unified_diff(old, new, n=1, lineterm="")][2:] if not line.startswith("@@")]
    return shorten("\n".join(lines))


def input_diff(given: Mapping[str, Any]) -> str:
    """Return the changed lines in the arguments of a tool that edits a file; empty if there are none."""
    edits = given.get("edits")
    found = [edit for edit in (given, *(edits if isinstance(edits, list) else ())) if isinstance(edit, dict)]
    pairs = ((_first_text(edit, _BEFORE), _first_text(edit, _AFTER)) for edit in found)
    return shorten("\n".join(edit_diff(before, after) for before, after in pairs if before or after))


def _first_text(given: Mapping[str, Any], keys: Iterable[str]) -> str:
    return next((given[key] for key in keys if isinstance(given.get(key), str)), "")
