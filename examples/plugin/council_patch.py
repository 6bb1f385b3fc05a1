"""An adapter for patch(1): a task's prompt is a patch, and what lands is that patch, merged and checked."""

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
    """What stands under an adapter that says `use: patch`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    strip: Annotated[int, Field(ge=0, le=9)] = 1
    """How many leading folders of the paths in the patch are left out."""


class PatchAdapter:
    """Applies the prompt in the session's worktree."""

    Options: ClassVar[type[BaseModel]] = PatchOptions

    def __init__(self, options: PatchOptions, /) -> None:
        self._options = options

    def capabilities(self) -> frozenset[Capability]:
        """Return what it can be asked for beside the prompt."""
        return frozenset()

    def programs(self) -> Sequence[Program]:
        """Return what must be on PATH before a run starts."""
        return [Program("patch", install="install GNU patch", version=["--version"], known=">=2.7,<3")]

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return what to run; the prompt lies in a file."""
        options = ["--batch", "--forward", "--no-backup-if-mismatch", "--reject-file=-"]
        return SessionCommand(["patch", *options, f"--strip={self._options.strip}", f"--input={request.prompt_file}"])

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return what a line of standard output means."""
        if found := re.fullmatch(r"patching file '?(.+?)'?", line):
            return [ToolCall("patch", found[1], [found[1]])]
        if re.match(r"Hunk #\d+ (FAILED|succeeded)", line):
            return [CliWarning(line)]
        return []

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Say that a patch which does not apply is not worth another attempt; 1 is patch's word for that."""
        if end.exit == 1:
            warned = [event.text for event in end.events if isinstance(event, CliWarning)]
            return Failed(FailureClass.REFUSED, f"the patch does not apply: {'; '.join(warned)}")
        return None


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: patch`."""
    register("patch", PatchAdapter)
