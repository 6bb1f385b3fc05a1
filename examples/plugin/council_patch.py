"""An adapter for patch(1): the prompt of a task is a patch, which is merged, checked and landed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar

import pluggy
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterAdapter
from orchestrator.protocols import (
    Capability,
    CliWarning,
    Failed,
    FailureClass,
    Program,
    SessionCommand,
    SessionEnd,
    SessionEvent,
    SessionRequest,
    ToolCall,
)

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


class PatchOptions(BaseModel):
    """Options of an adapter with `use: patch`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    strip: Annotated[int, Field(ge=0, le=9)] = 1
    """The number of leading path components to strip, as for `patch -p`."""


class PatchAdapter:
    """Applies the prompt in the session's worktree."""

    Options: ClassVar[type[BaseModel]] = PatchOptions

    def __init__(self, options: PatchOptions, /) -> None:
        self._options = options

    def capabilities(self) -> frozenset[Capability]:
        """Return the optional features."""
        return frozenset()

    def programs(self) -> Sequence[Program]:
        """Return the programs that must be on PATH before a run starts."""
        return [Program("patch", install="install GNU patch", version=["--version"], supported=">=2.7,<3")]

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the command; the prompt is in a file."""
        options = ["--batch", "--forward", "--no-backup-if-mismatch", "--reject-file=-"]
        return SessionCommand(["patch", *options, f"--strip={self._options.strip}", f"--input={request.prompt_file}"])

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events of a line of standard output."""
        if found := re.fullmatch(r"patching file '?(.+?)'?", line):
            return [ToolCall("patch", found[1], [found[1]])]
        if re.match(r"Hunk #\d+ (FAILED|succeeded)", line):
            return [CliWarning(line)]
        return []

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Refuse a patch that does not apply: another attempt would not help.

        patch exits with 1 for such a patch.
        """
        if end.exit == 1:
            warned = [event.text for event in end.events if isinstance(event, CliWarning)]
            return Failed(FailureClass.REFUSED, f"the patch does not apply: {'; '.join(warned)}")
        return None


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: patch`."""
    register("patch", PatchAdapter)
