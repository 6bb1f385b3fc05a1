"""Print the tool calls of an Agent Client Protocol agent, whose updates contain only changed fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from acp import schema

from adapters.bridges.lines import write_line
from adapters.bridges.tool_text import edit_diff, input_diff, shorten

#: Keys of paths in a tool's raw input.
_PATH_KEYS: Final = ("file_path", "filePath", "path", "abs_path", "absolute_path", "notebook_path")
#: Keys of text in a tool's raw output.
_OUTPUT_KEYS: Final = ("formatted_output", "output", "stdout")
#: A block of code in Markdown, as which some agents report what a command printed.
_BLOCK: Final = re.compile(r"\s*```\w*\n(.*?)\n?```\s*", re.DOTALL)
_MAX_REASON: Final = 300

ToolUpdate = schema.ToolCallUpdate | schema.ToolCallStart | schema.ToolCallProgress


@dataclass(slots=True)
class _KnownCall:
    """The fields of a tool call so far."""

    kind: str = "other"
    title: str = ""
    command: str = ""
    paths: set[str] = field(default_factory=set)
    diff: str = ""
    output: str = ""

    def update(self, call: ToolUpdate) -> None:
        self.kind, self.title = call.kind or self.kind, call.title or self.title
        self.command = _command_of(call) or self.command
        self.output = "\n".join(_texts_of(call)) or self.output


class ToolCalls:
    """The tool calls of a conversation by id."""

    def __init__(self) -> None:
        self._calls: dict[str, _KnownCall] = {}

    def describe(self, call: ToolUpdate) -> tuple[str, str, Sequence[str]]:
        """Return the kind, title and paths of a call so far."""
        known = self._calls.get(call.tool_call_id, _KnownCall())
        title = " ".join((call.title or known.title or call.tool_call_id).split())
        return call.kind or known.kind, title, sorted({*known.paths, *_paths_of(call)})

    def report(self, call: schema.ToolCallStart | schema.ToolCallProgress, *, is_new: bool) -> bool:
        """Print the changes of a call; return whether there were any."""
        known = self._calls.setdefault(call.tool_call_id, _KnownCall())
        command, diff = known.command, _diff_of(call)
        known.update(call)
        paths = [path for path in dict.fromkeys(_paths_of(call)) if path not in known.paths]
        known.paths.update(paths)
        is_changed = is_new or bool(paths) or known.command != command or diff not in {"", known.diff}
        if is_changed:
            detail = _detail(call.title or "", known.command, paths)
            given = None if diff == known.diff else diff
            write_line("tool", name=known.kind, detail=detail, paths=paths, call=call.tool_call_id, diff=given)
            known.diff = diff or known.diff
        if call.status in {"completed", "failed"}:
            failed = " ".join(known.output.split())[:_MAX_REASON] if call.status == "failed" else None
            write_line("tool_ended", call=call.tool_call_id, failed=failed, output=shorten(known.output) or None)
        return is_changed or call.status in {"completed", "failed"}


def _command_of(call: ToolUpdate) -> str:
    given = call.raw_input.get("command") if isinstance(call.raw_input, dict) else None
    if isinstance(given, list):  # Codex
        given = given[-1] if given else None
    return given if isinstance(given, str) else ""


def _detail(title: str, command: str, paths: Sequence[str]) -> str:
    """Return a tool call as one line: title and, if not contained, main argument."""
    argument = command or next(iter(paths), "")
    named = argument in title or (not command and Path(argument).name in title)
    return " ".join(f"{title} {'' if named else argument}".split())


def _texts_of(call: ToolUpdate) -> Iterator[str]:
    """Yield the result of a tool: the blocks of text, or else the raw output."""
    texts = [
        block.content.text
        for block in call.content or ()
        if isinstance(block, schema.ContentToolCallContent) and isinstance(block.content, schema.TextContentBlock)
    ]
    raw: Any = getattr(call, "raw_output", None)
    if not texts and isinstance(raw, dict):
        raw = next((raw[key] for key in _OUTPUT_KEYS if isinstance(raw.get(key), str)), None)
    for text in texts or ([raw] if isinstance(raw, str) else []):
        block = _BLOCK.fullmatch(text)
        yield block[1] if block else text


def _diff_of(call: ToolUpdate) -> str:
    """Return the changes in the content of a call, or else in its arguments."""
    diff = "\n".join(edit_diff(edit.old_text or "", edit.new_text) for edit in _edits_of(call))
    given: Any = call.raw_input
    is_edit = isinstance(given, dict) and any(key in given for key in _PATH_KEYS)
    return shorten(diff or (input_diff(given) if is_edit else ""))


def _edits_of(call: ToolUpdate) -> Iterable[schema.FileEditToolCallContent]:
    return (block for block in call.content or () if isinstance(block, schema.FileEditToolCallContent))


def _paths_of(call: ToolUpdate) -> Iterator[str]:
    for location in call.locations or ():
        yield location.path
    for edit in _edits_of(call):
        yield edit.path
    if isinstance(call.raw_input, dict):
        yield from (call.raw_input[key] for key in _PATH_KEYS if isinstance(call.raw_input.get(key), str))
