"""What a CLI runs before its agent edits a file, where it can be told to: the edit is denied if another has the file.

The hook reads a JSON object from standard input with `hook_event_name` and `tool_input`, and prints one that denies, or
nothing: the form of Claude Code (https://code.claude.com/docs/en/hooks) and of those that took it over, and that of
Gemini CLI (https://geminicli.com/docs/hooks/reference). Whatever is wrong with it or with the orchestrator, the edit is
allowed: what lands is checked all the same.
"""

from __future__ import annotations

import json
import os

from orchestrator.client.commands import CHECK_EDIT, MAX_REQUEST_BYTES
from orchestrator.client.session import SessionRequestError, find_session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, BinaryIO, TextIO

_PATIENCE = 5.0  # seconds: an agent waits for it at each edit
_LONGEST_INPUT = 1 << 26  # it holds the whole new text of the file
_MOST_PATHS = 200
_PATHS = ("file_path", "notebook_path", "path", "filePath", "absolute_path")
_TEXTS = ("command", "input", "patch", "patchText")
_PATCH = ("*** Add File: ", "*** Update File: ", "*** Delete File: ", "*** Move to: ")


def run(given: BinaryIO, out: TextIO) -> int:
    """Answer one call of the hook; return the exit code, which is always 0."""
    try:
        call = json.loads(given.read(_LONGEST_INPUT))
        reason = _denial_reason(call)
        if reason is not None:
            out.write(json.dumps(_denial(call.get("hook_event_name"), reason)) + "\n")
    except (SessionRequestError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # a hook that fails must keep nobody from working
    return 0


def _denial_reason(call: dict[str, Any]) -> str | None:
    """Return why the edit is denied; None if it is not. Raises AskError, and whatever odd input leads to."""
    cwd = call.get("cwd") or os.getcwd()
    paths = dict.fromkeys(_paths(call["tool_input"]))
    if not paths:
        return None
    session = find_session(os.environ, cwd)
    for path in list(paths)[:_MOST_PATHS]:
        inside = session.within(path, cwd)
        if inside is None or len(inside) > MAX_REQUEST_BYTES:
            continue
        answer = session.ask(CHECK_EDIT.name, {"path": inside}, _PATIENCE)
        if answer["allowed"] is False:
            owner = answer["owner"] or "another session"
            why = f": {answer['reason']}" if answer["reason"] else ""
            remedy = f"Work at other files, or take it with `council lock {inside} --wait 60` once it is free."
            return f"{inside} belongs to {owner}{why}. {remedy}"
    return None


def _paths(given: dict[str, Any]) -> Iterator[str]:
    for name in _PATHS:
        if isinstance(given.get(name), str):
            yield given[name]
    for name in _TEXTS:
        text = given.get(name)
        if isinstance(text, str) and "*** Begin Patch" in text:
            for line in text.splitlines():
                yield from (line.removeprefix(mark).strip() for mark in _PATCH if line.startswith(mark))


def _denial(event: object, reason: str) -> dict[str, Any]:
    if event == "BeforeTool":
        return {"decision": "deny", "reason": reason}
    denied = {"hookEventName": "PreToolUse", "permissionDecision": "deny", "permissionDecisionReason": reason}
    return {"hookSpecificOutput": denied}
