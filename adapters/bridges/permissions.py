"""Decide on the permission requests of an agent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import anyio

from adapters.bridges.lines import DENIED_BY_MODE
from adapters.bridges.worktree import ConfinedWorktree, OutsideWorktreeError

#: Kinds of tools, as in the protocol.
_EDITS: Final = frozenset({"edit", "delete", "move"})
_HARMLESS: Final = frozenset({"read", "search", "think", "switch_mode"})
#: The tools of our own server, which are always allowed, by the usual forms of their names.
_OWN_TOOL: Final = re.compile(r"\bcouncil\b|mcp__council__|\bcouncil_")


@dataclass(frozen=True, slots=True)
class Permissions:
    """The rules for permission requests."""

    worktree: ConfinedWorktree
    allowed: Literal["all", "edits"] = "all"
    """`edits`: no commands and no other tools than those that read or edit files."""
    read_only: bool = False
    pre_edit: Sequence[str] = ()
    """A command to run before each edit (`SessionRequest.pre_edit`)."""

    async def denial_reason(self, kind: str, title: str, paths: Iterable[str]) -> str | None:
        """Return why a tool call is denied, or None if it is allowed."""
        try:
            files = [self.worktree.resolve(path) for path in paths]
        except OutsideWorktreeError as error:
            return str(error)
        if kind in _EDITS:
            return await self.edit_denial_reason(files)
        is_own = kind == "other" and _OWN_TOOL.search(title)
        return DENIED_BY_MODE if self.allowed == "edits" and kind not in _HARMLESS and not is_own else None

    async def edit_denial_reason(self, files: Iterable[Path]) -> str | None:
        """Return why an edit of files in the worktree is denied, or None if it is allowed."""
        if self.read_only:
            return "this session must not change files"
        for file in files if self.pre_edit else ():
            if (reason := await _ask(self.pre_edit, self.worktree.top, file)) is not None:
                return reason
        return None


async def _ask(command: Sequence[str], top: Path, file: Path) -> str | None:
    call = {"hook_event_name": "PreToolUse", "cwd": str(top), "tool_input": {"file_path": str(file)}}
    done = await anyio.run_process(command, input=json.dumps(call).encode(), cwd=top, stderr=None, check=False)
    try:
        answer = json.loads(done.stdout)["hookSpecificOutput"]
        return str(answer["permissionDecisionReason"]) if answer["permissionDecision"] == "deny" else None
    except (ValueError, LookupError, TypeError):  # it prints nothing if the edit is allowed
        return None
